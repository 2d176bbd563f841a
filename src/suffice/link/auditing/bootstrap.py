"""Means with intervals: percentile bootstrap over repeats, Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from suffice.study.intervals import Interval, over_seeds

__all__ = ["Interval", "bootstrap", "over_seeds"]


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
