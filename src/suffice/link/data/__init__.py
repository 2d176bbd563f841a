"""Graphs, data sets, files and checkpoints."""
