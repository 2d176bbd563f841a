"""The registered attention function and the padding of attention calls."""
