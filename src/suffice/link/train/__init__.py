"""Training and evaluation of link predictors, and the alignment of what they learn with the node classes."""
