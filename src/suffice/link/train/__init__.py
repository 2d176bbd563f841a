"""Training, evaluation and alignment of link predictors."""
