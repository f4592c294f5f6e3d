"""Methods that score classes: the logits of a classifier, and where a teacher ranks them."""
