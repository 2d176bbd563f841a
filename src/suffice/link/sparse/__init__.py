"""Sparse graph primitives: adjacency, neighbourhoods, propagation, overlap and sketches."""
