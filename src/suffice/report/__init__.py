"""Figures and pages: they draw what they are given and know neither half of the library."""
