"""Measure compressed caches: answer questions, evaluate fidelity, compare policies, tune the budget."""
