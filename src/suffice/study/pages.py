"""The report of any study: what ran, what it found, what differs, and how to make it again."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from suffice.report.blocks import Code, Figure, Table, Text
from suffice.report.figures import Point, lines
from suffice.report.page import Page
from suffice.report.plots import Difference, forest
from suffice.study.kinds import Kind, refuse_unknown, resolve
from suffice.study.results import (
    Group,
    Interval,
    compare_groups,
    group_records,
    metric_names,
    varying_settings,
)
from suffice.study.store import Record, Store

_ROWS, _LINES, _PANELS = 400, 8, 3


def study_page(
    folder: str | Path,
    *,
    study: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
    only: Sequence[str] = (),
    compare: str | None = None,
    baseline: str | None = None,
    command: str = "",
) -> Page:
    """Return the report of a study.

    Args:
        folder: of the store, which is only read.
        study: which, where the folder holds several.
        kinds: known kinds of runs; that of the study adds its own sections.
        only: metrics to show; all without it.
        compare: setting whose values are compared, pair by pair; the first that varies and is text without it.
        baseline: the value that the others are compared with; the first without it.
        command: the command that makes the page.

    Raises:
        StoreError: the folder holds no such study.
        ValueError: a metric or setting is unknown.

    """
    with Store(folder, write=False) as store:
        name = store.only(study)
        about, counts = store.studies()[name], store.counts(name)
        records = list(store.records(name))
    groups = group_records(records)
    known = metric_names(groups)
    refuse_unknown(only, known, "metrics")
    shown = [metric for metric in known if not only or metric in only]
    seeds = sorted({record.seed for record in records})
    page = Page(
        title=name,
        lead=f"{counts['done']} of {sum(counts.values())} runs of {about['kind']} are done, "
        f"with {len(seeds)} seed{'s' * (len(seeds) != 1)}."
        + (f" {counts['failed']} failed." if counts["failed"] else ""),
        command=command or shlex.join(["suffice", "report", str(folder)]),
        made_with=_versions(records),
    )
    kind = (kinds or {}).get(about["kind"])
    done = [record for record in records if record.state == "done"]
    if kind is not None and kind.view and done:
        view: Callable[[Page, Sequence[Record], Path], None] = resolve(kind.view)
        view(page, done, Path(folder))
    if groups:
        _results(page, groups, shown)
        _curves(page, groups, shown)
        _differences(page, groups, shown, compare or (kind.compares if kind else ""), baseline)
    _how(page, about, groups, records)
    return page


def _results(page: Page, groups: Sequence[Group], shown: Sequence[str]) -> None:
    names = varying_settings(groups)
    rows = [
        [_said(one, names), *(str(one.interval(m)) if m in one.values else "" for m in shown), _seeds(one)]
        for one in groups[:_ROWS]
    ]
    caption = "Mean over seeds and its 95 % t interval."
    if len(groups) > _ROWS:
        caption += f" The first {_ROWS} of {len(groups)} rows; `suffice study export` writes all."
    page.add("Results", Table([" · ".join(names) or "settings", *shown, "seeds"], rows, caption))


def _curves(page: Page, groups: Sequence[Group], shown: Sequence[str]) -> None:
    """Draw each metric against the first setting that is a number."""
    names = varying_settings(groups)
    numeric = [
        name
        for name in names
        if all(isinstance(g.settings.get(name), int | float) and not isinstance(g.settings[name], bool) for g in groups)
        and len({g.settings[name] for g in groups}) > 2
    ]
    if not numeric:
        return
    x, others = numeric[0], [name for name in names if name != numeric[0]]
    blocks: list[Figure | Text] = []
    for metric in shown[:_PANELS]:
        series: dict[str, list[tuple[float, Interval]]] = {}
        for one in groups:
            if metric in one.values:
                point = (float(one.settings[x]), one.interval(metric))
                series.setdefault(_said(one, others) or metric, []).append(point)
        drawn = {name: sorted(points, key=lambda p: p[0]) for name, points in list(series.items())[:_LINES]}
        cells = [[name, f"{at:g}", str(y)] for name, points in drawn.items() for at, y in points]
        blocks.append(
            Figure(
                lines(
                    {name: [_point(*p) for p in points] for name, points in drawn.items()}, x_label=x, y_label=metric
                ),
                f"{metric} by {x}: mean over seeds, 95 % t interval."
                + (f" The first {_LINES} of {len(series)} lines." if len(series) > _LINES else ""),
                f"{metric} against {x}",
                Table([" · ".join(others) or "metric", x, metric], cells),
            )
        )
    page.add(f"By {x}", *blocks)


def _differences(page: Page, groups: Sequence[Group], shown: Sequence[str], setting: str, baseline: str | None) -> None:
    names = varying_settings(groups)
    texts = [name for name in names if all(isinstance(one.settings.get(name), str) for one in groups)]
    if not setting and not texts:
        return
    setting = setting or texts[0]
    # The first value that has anything to be compared with: a full cache, say, has no budget in common with others.
    candidates = [baseline] if baseline else list(dict.fromkeys(one.settings.get(setting) for one in groups))
    every = (compare_groups(groups, setting, value) for value in candidates if setting in names)
    paired = ([row for row in rows if row["metric"] in shown and row["seeds"] > 1] for rows in every)
    rows = next((found for found in paired if found), [])
    if not rows:
        return
    others = [name for name in names if name != setting]
    minus = rows[0]["baseline"]

    def said(row: Mapping[str, Any]) -> str:
        return " · ".join([str(row[setting]), *(f"{name} {row[name]}" for name in others)])

    kept = list(dict.fromkeys(said(row) for row in rows))[:24]
    panels = {
        metric: [
            Difference(said(row), row["mean"], row["low"], row["high"])
            for row in rows
            if row["metric"] == metric and said(row) in kept and math.isfinite(row["mean"])
        ]
        for metric in list(dict.fromkeys(row["metric"] for row in rows))[:_PANELS]
    }
    cells = [
        [said(row), row["metric"], str(Interval(row["mean"], row["low"], row["high"])), row["seeds"]]
        for row in rows[:_ROWS]
    ]
    page.add(
        f"Differences from {minus}",
        Figure(
            forest(panels, x_label="difference"),
            "Paired by seed, all else equal; mean and 95 % t interval. Filled where the interval excludes 0.",
            f"Forest plot of paired differences from {minus}",
            Table([setting, "metric", "difference", "seeds"], cells, "Mean and 95 % t interval, paired by seed."),
        ),
    )


def _how(page: Page, about: Mapping[str, Any], groups: Sequence[Group], records: Sequence[Record]) -> None:
    names = varying_settings(groups)
    fixed = [[key, str(value)] for key, value in (groups[0].settings if groups else {}).items() if key not in names]
    blocks: list[Table | Text | Code] = [Table(["setting", "value"], fixed, "The same in all runs.")] if fixed else []
    if about.get("command"):
        blocks += [Text("The runs were made by:"), Code(str(about["command"]))]
    sources = Counter(record.made.get("source", "") for record in records if record.state == "done")
    seconds = sum(record.seconds or 0.0 for record in records)
    blocks.append(
        Text(
            f"{seconds:.0f} seconds of runs in all. Source of the package: "
            + ", ".join(f"{source} ({count} runs)" for source, count in sources.items())
            + "."
        )
    )
    page.add("How it was made", *blocks)
    failed = [record for record in records if record.state == "failed"]
    if failed:
        listed = [Code(f"seed {one.seed}, {dict(one.settings)}\n{one.error[-2000:]}") for one in failed[:5]]
        page.add(f"{len(failed)} failed runs", *listed)


def _versions(records: Sequence[Record]) -> str:
    found: dict[str, None] = {}
    for record in records:
        said = ", ".join(f"{name} {value}" for name, value in record.made.items() if name != "source")
        found.setdefault(said)
    found.pop("", None)
    return "; ".join(found)


def _said(one: Group, names: Sequence[str]) -> str:
    return " · ".join(str(one.settings.get(name)) for name in names)


def _seeds(one: Group) -> int:
    return max((len(values) for values in one.values.values()), default=0)


def _point(x: float, y: Interval) -> Point:
    return Point(x, y.mean) if not y.has_bounds else Point(x, y.mean, y.low, y.high)
