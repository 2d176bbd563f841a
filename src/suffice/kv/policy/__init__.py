"""Eviction policies: weights, directions, estimators, selections, and the registry of named policies."""
