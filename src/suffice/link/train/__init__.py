"""Training and evaluation of link predictors, and the alignment of their representations with the node classes."""
