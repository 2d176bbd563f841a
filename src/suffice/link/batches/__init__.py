"""Mini-batches of positive and negative edges."""
