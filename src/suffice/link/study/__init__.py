"""Studies of composition bias: arms trained on the same splits, audited, measured and compared."""
