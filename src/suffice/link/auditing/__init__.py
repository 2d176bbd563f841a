"""Audit of composition bias: how much the score of an edge depends on the rest of its batch."""
