"""Means over seeds with Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Interval:
    """A mean and its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low) and not math.isnan(self.mean):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean of seeds with Student's t interval; of paired differences, a paired t interval.

    With a single seed the interval is without bound: NaN.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile((1 + confidence) / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t at a probability of at least one half.

    Without SciPy, which takes longer to import than a study takes to show.

    Args:
        probability: from .5 up to 1.
        freedom: degrees of freedom, at least 1.

    Raises:
        ValueError: an argument is out of range.

    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability, freedom are {probability}, {freedom}; accepted: .5 up to 1, at least 1")
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) in closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= square * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
