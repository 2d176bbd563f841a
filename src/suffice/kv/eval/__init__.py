"""Measurements on a compressed cache: answers, fidelity, comparisons, tuning."""
