"""What a study found: means over seeds with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from suffice.study.intervals import Interval, over_seeds
from suffice.study.keys import canonical
from suffice.study.store import Record

Values = dict[int, float]


@dataclass(frozen=True)
class Group:
    """The same settings with every seed.

    Args:
        settings: complete, those of a run's `rows` included.
        values: by metric, then by seed.

    """

    settings: Mapping[str, Any]
    values: dict[str, Values] = field(default_factory=dict[str, Values])

    def interval(self, metric: str) -> Interval:
        """Return a metric's mean and 95 % t interval over seeds."""
        return over_seeds(list(self.values[metric].values()))


def group(records: Iterable[Record]) -> list[Group]:
    """Bring together finished runs that differ in their seeds only, in the order of the plan."""
    found: dict[tuple[int | str, str], Group] = {}
    texts: dict[int, str] = {}
    kept: list[Mapping[str, Any]] = []  # so that an id stays its own
    for record in records:
        if record.state != "done":
            continue
        # Records share the settings they were read from: their text is made once.
        name = id(record.settings)
        if name not in texts:
            texts[name] = canonical(record.settings)
            kept.append(record.settings)
        for own, values in _rows(record.result):
            key = (texts[name], canonical(own) if own else "")
            if key not in found:
                found[key] = Group({**record.settings, **own})
            for metric, value in values.items():
                if isinstance(value, int | float):
                    found[key].values.setdefault(metric, {})[record.seed] = float(value)
    return list(found.values())


def _rows(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    rows = [(row.get("settings", {}), row["values"]) for row in result.get("rows", ())]
    return [({}, result["values"]), *rows] if "values" in result else rows


def varying(groups: Sequence[Group]) -> list[str]:
    """Return the settings that are not the same in all groups."""
    names = list(dict.fromkeys(name for one in groups for name in one.settings))
    return [name for name in names if len({repr(one.settings.get(name)) for one in groups}) > 1]


def metrics(groups: Sequence[Group]) -> list[str]:
    """Return every metric, in the order in which they first appear."""
    return list(dict.fromkeys(metric for one in groups for metric in one.values))


def summarise(groups: Sequence[Group], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each group and metric: settings (those that vary), mean, 95 % t interval, number of seeds."""
    names = varying(groups) if names is None else names
    rows: list[dict[str, Any]] = []
    for one in groups:
        chosen = {name: one.settings.get(name) for name in names}
        for metric, values in one.values.items():
            found = one.interval(metric)
            row = {"metric": metric, "mean": found.mean, "low": found.low, "high": found.high, "seeds": len(values)}
            rows.append({**chosen, **row})
    return rows


def differences(groups: Sequence[Group], setting: str, baseline: Any = None) -> list[dict[str, Any]]:
    """Return how each value of a setting differs from a baseline, seed by seed, all else equal.

    Args:
        groups: of a study.
        setting: which setting is compared.
        baseline: its value to compare with; the first one without it.

    Returns:
        a row for each other value, each combination of the other settings that vary, and each metric.

    Raises:
        ValueError: the setting doesn't vary, or never has the baseline's value.

    """
    names = varying(groups)
    if setting not in names:
        raise ValueError(f"setting is {setting!r}; accepted: one that varies ({', '.join(names) or 'none does'})")
    values = [one.settings.get(setting) for one in groups]
    if baseline is None:
        baseline = values[0]
    if baseline not in values:
        raise ValueError(f"baseline is {baseline!r}; accepted: one of {list(dict.fromkeys(map(str, values)))}")
    others = [name for name in names if name != setting]
    by: dict[str, Group] = {_rest(one, others): one for one in groups if one.settings.get(setting) == baseline}
    rows: list[dict[str, Any]] = []
    for one in groups:
        base = by.get(_rest(one, others))
        if base is None or one is base:
            continue
        for metric in one.values:
            seeds = [seed for seed in one.values[metric] if seed in base.values.get(metric, {})]
            if not seeds:
                continue
            found = over_seeds([one.values[metric][seed] - base.values[metric][seed] for seed in seeds])
            rows.append(
                {
                    **{name: one.settings.get(name) for name in others},
                    "of": one.settings.get(setting),
                    "minus": baseline,
                    "metric": metric,
                    "mean": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "seeds": len(seeds),
                }
            )
    return rows


def _rest(one: Group, names: Sequence[str]) -> str:
    return canonical([one.settings.get(name) for name in names])
