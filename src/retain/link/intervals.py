"""Means with intervals: percentile bootstrap over repeats, Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of repeats with its percentile bootstrap interval (SciPy's), NaN repeats left out."""
    kept = np.array([value for value in values if not math.isnan(value)])
    if len(kept) == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(kept.mean())
    if len(kept) == 1 or bool((kept == kept[0]).all()):
        return Interval(mean, mean, mean)
    drawn = stats.bootstrap(
        (kept,),
        np.mean,
        n_resamples=1000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high))


def over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean of seeds with Student's t interval; of paired differences, a paired t interval.

    With a single seed the interval is without bound: NaN.
    """
    kept = np.asarray(values, dtype=float)
    mean = float(kept.mean())
    if len(kept) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, len(kept) - 1)) * float(stats.sem(kept))
    return Interval(mean, mean - half, mean + half)
