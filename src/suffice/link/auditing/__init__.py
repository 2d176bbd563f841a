"""Audit of composition bias: how much the score of an edge depends on the rest of its batch.

`kappa_tau.py` computes κ, τ and A_pure, `audit.py` scores the batches, `verdict.py` judges.
"""
