"""What a whole command does: from a recipe to a run folder with a report."""
