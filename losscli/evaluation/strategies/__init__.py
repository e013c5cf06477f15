"""Ways to evaluate a batch at several points at once."""
