"""Methods that score the experts of a mixture and keep those that matter."""
