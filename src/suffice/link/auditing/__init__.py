"""The audit: how the score of an edge depends on the rest of its batch."""
