"""Results of a study: means with confidence intervals, paired differences, and groups of runs that differ by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from suffice.arguments import check_number
from suffice.study.run_key import canonical_json
from suffice.study.store import Record


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; both bounds are NaN if there is only one value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.mean) or self.has_bounds:
            return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}"

    @property
    def has_bounds(self) -> bool:
        """Whether there were enough values for an interval."""
        return not math.isnan(self.low)


def mean_interval(values: Iterable[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean of independent values and its Student's t interval.

    Args:
        values: one value for each seed; paired differences give the paired t interval.
        confidence: two-sided confidence level, above 0 and below 1.

    Returns:
        the mean and its bounds; the bounds of a single value are NaN.

    Raises:
        ValueError: there are no values, or the confidence is out of range.

    Example:
        >>> str(mean_interval([1.0, 2.0, 3.0]))
        '2.000 [-0.484, 4.484]'

    """
    values = list(values)
    _check_confidence(confidence)
    mean = _mean(values)
    margin = _margin(values, mean, (1 + confidence) / 2)
    return Interval(mean, mean - margin, mean + margin)


def mean_bound(values: Iterable[float], *, confidence: float = 0.95, upper: bool = True) -> float:
    """Return the one-sided Student's t bound of a mean.

    Args:
        values: independent values.
        confidence: one-sided confidence level, above 0 and below 1.
        upper: True for the upper bound, False for the lower one.

    Returns:
        the bound; NaN for a single value.

    Raises:
        ValueError: there are no values, or the confidence is out of range.

    """
    values = list(values)
    _check_confidence(confidence)
    mean = _mean(values)
    margin = _margin(values, mean, confidence)
    return mean + margin if upper else mean - margin


def skewed_mean_bound(values: Iterable[float], *, confidence: float = 0.95, upper: bool = True) -> float:
    """Return a one-sided bound of a mean that holds better than Student's t if the values are skewed.

    If a few values are much larger than the others, samples without one of them have a mean and a standard deviation
    that are both too small, and the upper t bound is too low. A transformation of the t statistic removes its skewness,
    which is estimated from the values (P. Hall, On the removal of skewness by transformation, Journal of the Royal
    Statistical Society B 54, 1992). The bound is never closer to the mean than Student's t bound, and equals it for
    fewer than three values, and if the values are skewed to the other side.

    Args:
        values: independent values.
        confidence: one-sided confidence level, above 0 and below 1.
        upper: True for the upper bound, False for the lower one.

    Returns:
        the bound; NaN for a single value.

    Raises:
        ValueError: there are no values, or the confidence is out of range.

    """
    values = list(values)
    student = mean_bound(values, confidence=confidence, upper=upper)
    count = len(values)
    if count < 3:
        return student
    mean, sign = _mean(values), 1 if upper else -1
    margin = sign * (student - mean)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (count - 1))
    if deviation == 0:
        return student
    third_moment = sign * math.fsum((value - mean) ** 3 for value in values) / count
    skewness = math.sqrt(count * (count - 1)) / (count - 2) * third_moment / (squares / count) ** 1.5
    if skewness < 1e-6:
        return student
    shifted = margin / deviation + skewness / (6 * count)
    transformed = 3 / skewness * (1 - float(np.cbrt(1 - skewness * shifted)))
    return mean + sign * max(margin, deviation * transformed)


def bootstrap_interval(
    values: Iterable[float], *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean of repeated measurements and its percentile bootstrap interval.

    Args:
        values: one value for each repeat; NaN values are left out.
        confidence: two-sided confidence level, above 0 and below 1.
        num_resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        the mean and its bounds; all NaN if every value is NaN.

    Raises:
        ValueError: the confidence is out of range.

    """
    _check_confidence(confidence)
    kept = np.array([value for value in values if not math.isnan(value)])
    if len(kept) == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(kept.mean())
    if bool((kept == kept[0]).all()):
        return Interval(mean, mean, mean)
    drawn = np.random.default_rng(seed).integers(0, len(kept), (num_resamples, len(kept)))
    tail = (1 - confidence) / 2
    low, high = np.percentile(kept[drawn].mean(axis=1), [100 * tail, 100 * (1 - tail)])
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of one metric between two groups of runs, paired by seed.

    Args:
        interval: mean difference and its Student's t interval.
        num_seeds: number of seeds that both groups have.

    """

    interval: Interval
    num_seeds: int


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95
) -> PairedDifference | None:
    """Return the mean of `values - baseline` over the seeds that both have.

    Args:
        values: a metric by seed.
        baseline: the metric to subtract, by seed.
        confidence: two-sided confidence level, above 0 and below 1.

    Returns:
        the paired difference, or None if no seed is in both.

    Raises:
        ValueError: the confidence is out of range.

    Example:
        >>> paired_difference({0: 3.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 2.0})
        PairedDifference(interval=Interval(mean=2.0, low=2.0, high=2.0), num_seeds=2)

    """
    _check_confidence(confidence)
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    return PairedDifference(mean_interval(differences, confidence=confidence), len(seeds))


@dataclass(frozen=True)
class Group:
    """Finished runs with the same settings and different seeds.

    Args:
        settings: settings of all runs of the group by dotted name, including those of a result's `rows`.
        values: `values[metric][seed]` is the value of a metric in the run with a seed.

    """

    settings: Mapping[str, Any]
    values: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])

    def interval(self, metric: str) -> Interval:
        """Return the mean of a metric over seeds and its 95 % Student's t interval."""
        return mean_interval(self.values[metric].values())

    def difference(self, baseline: Group, metric: str) -> PairedDifference | None:
        """Return the difference of a metric from a baseline, paired by seed; None if no seed has a value in both."""
        return paired_difference(self.values.get(metric, {}), baseline.values.get(metric, {}))


def group_records(records: Iterable[Record]) -> list[Group]:
    """Group the finished runs whose settings differ only in the seed; groups keep the order of the records."""
    groups: dict[tuple[str, str], Group] = {}
    # Records of one query share their settings objects, so that each is serialized only once. Holding the objects
    # keeps their ids unique.
    texts: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for record in records:
        if record.state != "done":
            continue
        if id(record.flat_settings) not in texts:
            texts[id(record.flat_settings)] = (canonical_json(record.flat_settings), record.flat_settings)
        text, settings = texts[id(record.flat_settings)]
        for row_settings, values in record.rows():
            key = (text, canonical_json(row_settings) if row_settings else "")
            if key not in groups:
                groups[key] = Group({**settings, **row_settings})
            for metric, value in values.items():
                if isinstance(value, int | float):
                    groups[key].values.setdefault(metric, {})[record.seed] = float(value)
    return list(groups.values())


def select_groups(groups: Sequence[Group], where: Mapping[str, str]) -> list[Group]:
    """Return the groups whose settings have given values.

    Args:
        groups: groups of runs.
        where: value of a setting as text, by the name of the setting.

    Raises:
        ValueError: a setting is unknown, or is the same in all groups.

    """
    names = varying_settings(groups)
    for name in where:
        if name not in names:
            raise ValueError(f"where must name settings that vary ({', '.join(names) or 'none does'}), got {name!r}")
    return [group for group in groups if all(str(group.settings.get(name)) == where[name] for name in where)]


def varying_settings(groups: Sequence[Group]) -> list[str]:
    """Return the names of the settings that are not the same in all groups."""
    names = list(dict.fromkeys(name for group in groups for name in group.settings))
    return [name for name in names if len({repr(group.settings.get(name)) for group in groups}) > 1]


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Return the name of every metric, in the order of first appearance."""
    return list(dict.fromkeys(metric for group in groups for metric in group.values))


def summarize(
    groups: Sequence[Group],
    names: Sequence[str] | None = None,
    interval: Callable[[Group, str], Interval] = Group.interval,
) -> list[dict[str, Any]]:
    """Return the mean of every metric in every group as rows of a table.

    Args:
        groups: groups of runs.
        names: settings to include as columns; by default those that vary.
        interval: returns the mean and the interval of a metric of a group; by default the 95 % Student's t interval.

    Returns:
        one row for each group and metric: the settings, `metric`, `mean`, `low` and `high`, and `seeds` (the number of
        seeds).

    """
    names = varying_settings(groups) if names is None else names
    return [
        {
            **{name: group.settings.get(name) for name in names},
            "metric": metric,
            **asdict(interval(group, metric)),
            "seeds": len(values),
        }
        for group in groups
        for metric, values in group.values.items()
    ]


def compare_groups(groups: Sequence[Group], setting: str, baseline: Any = None) -> list[dict[str, Any]]:
    """Compare the values of one setting with a baseline value, all other settings being equal.

    Args:
        groups: groups of runs.
        setting: name of the setting whose values are compared.
        baseline: the value to compare with; by default that of the first group.

    Returns:
        one row for each other value of the setting, each combination of the other settings that vary, and each
        metric: these settings, `baseline`, `metric`, `mean`, `low` and `high` of the difference, paired by seed (95 %
        Student's t interval), and `seeds` (the number of pairs).

    Raises:
        ValueError: the setting does not vary, or no group has the baseline value.

    """
    names = varying_settings(groups)
    if setting not in names:
        raise ValueError(f"setting must be one that varies ({', '.join(names) or 'none does'}), got {setting!r}")
    values = [group.settings.get(setting) for group in groups]
    if baseline is None:
        baseline = values[0]
    if baseline not in values:
        raise ValueError(f"baseline must be one of {list(dict.fromkeys(map(str, values)))}, got {baseline!r}")
    others = [name for name in names if name != setting]

    def other_settings(group: Group) -> dict[str, Any]:
        return {name: group.settings.get(name) for name in others}

    baselines = {canonical_json(other_settings(g)): g for g in groups if g.settings.get(setting) == baseline}
    rows: list[dict[str, Any]] = []
    for group in groups:
        compared = baselines.get(canonical_json(other_settings(group)))
        if compared is None or compared is group:
            continue
        for metric in group.values:
            difference = group.difference(compared, metric)
            if difference is not None:
                rows.append(
                    {
                        **other_settings(group),
                        setting: group.settings.get(setting),
                        "baseline": baseline,
                        "metric": metric,
                        **asdict(difference.interval),
                        "seeds": difference.num_seeds,
                    }
                )
    return rows


def _check_confidence(confidence: float) -> None:
    check_number("confidence", confidence, above=0, below=1)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("values must hold at least one number, got none")
    return math.fsum(values) / len(values)


def _margin(values: Sequence[float], mean: float, probability: float) -> float:
    """Return the t quantile at a probability times the standard error of the mean; NaN for a single value."""
    count = len(values)
    if count < 2:
        return math.nan
    from scipy.special import stdtrit  # imported here so that commands that need no interval start faster

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return float(stdtrit(count - 1, probability)) * deviation / math.sqrt(count)
