"""The report of a study: results, figures, paired differences, and how to run the study again."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suffice.environment import format_environment
from suffice.report.blocks import Code, Figure, Table, Text
from suffice.report.page import Page
from suffice.report.plots import ForestRow, LinePoint, forest_plot, line_plot
from suffice.study.results import Group, Interval, compare_groups, group_records, metric_names, varying_settings
from suffice.study.run_kind import RunKind, check_names, import_object
from suffice.study.store import Record, Store

_MAX_TABLE_ROWS = 400
_MAX_LINES = 8
_MAX_FOREST_ROWS = 24
_MAX_PANELS = 3


def study_report(
    folder: str | Path,
    *,
    study: str | None = None,
    kinds: Mapping[str, RunKind] | None = None,
    metrics: Sequence[str] = (),
    compared_setting: str | None = None,
    baseline: str | None = None,
    command: str = "",
) -> Page:
    """Return the report of a study.

    Args:
        folder: folder of the store, which is only read.
        study: name of the study, if the folder holds several.
        kinds: known kinds of runs by name; the study's kind adds its own sections.
        metrics: metrics to show; by default all.
        compared_setting: name of the setting whose values are compared in pairs; by default the first that varies and
            is text.
        baseline: value of that setting with which the others are compared; by default, the first with differences.
        command: the command that makes the page.

    Raises:
        StoreError: the folder holds no such study.
        ValueError: a metric or setting is unknown.

    """
    with Store(folder, read_only=True) as store:
        name = store.study_name(study)
        about, counts = store.studies()[name], store.counts(name)
        records = list(store.records(name))
    groups = group_records(records)
    known = metric_names(groups)
    check_names(metrics, known, "metrics")
    shown = [metric for metric in known if not metrics or metric in metrics]
    num_seeds = len({record.seed for record in records})
    page = Page(
        title=name,
        summary=f"{counts['done']} of {sum(counts.values())} runs of {about['kind']} are done, "
        f"with {num_seeds} seed{'s' * (num_seeds != 1)}."
        + (f" {counts['failed']} failed." if counts["failed"] else ""),
        command=command or shlex.join(["suffice", "report", str(folder)]),
        made_with=_environments(records),
    )
    kind = (kinds or {}).get(about["kind"])
    done = [record for record in records if record.state == "done"]
    if kind is not None and kind.report_sections and done:
        import_object(kind.report_sections)(page, done, Path(folder))
    if groups:
        _add_results(page, groups, shown)
        _add_curves(page, groups, shown)
        _add_differences(page, groups, shown, compared_setting or (kind.compared_setting if kind else ""), baseline)
    _add_provenance(page, about, groups, records)
    return page


def _add_results(page: Page, groups: Sequence[Group], metrics: Sequence[str]) -> None:
    names = varying_settings(groups)
    rows = [
        [
            _label(group, names),
            *(str(group.interval(metric)) if metric in group.values else "" for metric in metrics),
            max((len(values) for values in group.values.values()), default=0),
        ]
        for group in groups[:_MAX_TABLE_ROWS]
    ]
    caption = "Mean over seeds and its 95 % t interval."
    if len(groups) > _MAX_TABLE_ROWS:
        caption += f" The first {_MAX_TABLE_ROWS} of {len(groups)} rows; `suffice study export` writes all."
    page.add("Results", Table([" · ".join(names) or "settings", *metrics, "seeds"], rows, caption))


def _add_curves(page: Page, groups: Sequence[Group], metrics: Sequence[str]) -> None:
    """Add figures of each metric against the first numeric setting with more than two values."""
    names = varying_settings(groups)
    x_name = next((name for name in names if _is_numeric(groups, name)), None)
    if x_name is None:
        return
    others = [name for name in names if name != x_name]
    blocks: list[Figure] = []
    for metric in metrics[:_MAX_PANELS]:
        series: dict[str, list[tuple[float, Interval]]] = {}
        for group in groups:
            if metric in group.values:
                point = (float(group.settings[x_name]), group.interval(metric))
                series.setdefault(_label(group, others) or metric, []).append(point)
        drawn = {name: sorted(points, key=lambda p: p[0]) for name, points in list(series.items())[:_MAX_LINES]}
        cells = [[name, f"{x:g}", str(y)] for name, points in drawn.items() for x, y in points]
        blocks.append(
            Figure(
                line_plot(
                    {name: [LinePoint(x, y.mean, y.low, y.high) for x, y in points] for name, points in drawn.items()},
                    x_label=x_name,
                    y_label=metric,
                ),
                f"{metric} by {x_name}: mean over seeds, 95 % t interval."
                + (f" The first {_MAX_LINES} of {len(series)} lines." if len(series) > _MAX_LINES else ""),
                f"{metric} against {x_name}",
                Table([" · ".join(others) or "metric", x_name, metric], cells),
            )
        )
    page.add(f"By {x_name}", *blocks)


def _add_differences(
    page: Page, groups: Sequence[Group], metrics: Sequence[str], setting: str, baseline: str | None
) -> None:
    names = varying_settings(groups)
    texts = [name for name in names if all(isinstance(group.settings.get(name), str) for group in groups)]
    if not setting and not texts:
        return
    setting = setting or texts[0]
    # The default baseline is the first value that shares the other settings with another value. Not every value does:
    # in a comparison of caches, for example, no other cache has the budget of the full cache.
    baselines = [baseline] if baseline else list(dict.fromkeys(group.settings.get(setting) for group in groups))
    comparisons = (compare_groups(groups, setting, value) for value in baselines if setting in names)
    paired = ([row for row in rows if row["metric"] in metrics and row["seeds"] > 1] for rows in comparisons)
    rows = next((rows for rows in paired if rows), [])
    if not rows:
        return
    others = [name for name in names if name != setting]
    baseline = rows[0]["baseline"]

    def label(row: Mapping[str, Any]) -> str:
        return " · ".join([str(row[setting]), *(f"{name} {row[name]}" for name in others)])

    drawn = list(dict.fromkeys(label(row) for row in rows))[:_MAX_FOREST_ROWS]
    panels = {
        metric: [
            ForestRow(label(row), row["mean"], row["low"], row["high"])
            for row in rows
            if row["metric"] == metric and label(row) in drawn and math.isfinite(row["mean"])
        ]
        for metric in list(dict.fromkeys(row["metric"] for row in rows))[:_MAX_PANELS]
    }
    cells = [
        [label(row), row["metric"], str(Interval(row["mean"], row["low"], row["high"])), row["seeds"]]
        for row in rows[:_MAX_TABLE_ROWS]
    ]
    page.add(
        f"Differences from {baseline}",
        Figure(
            forest_plot(panels, x_label="difference"),
            "Differences paired by seed, all other settings being equal: mean and 95 % t interval. Filled where the "
            "interval excludes 0.",
            f"Forest plot of paired differences from {baseline}",
            Table([setting, "metric", "difference", "seeds"], cells, "Mean and 95 % t interval, paired by seed."),
        ),
    )


def _add_provenance(page: Page, about: Mapping[str, Any], groups: Sequence[Group], records: Sequence[Record]) -> None:
    names = varying_settings(groups)
    shared = [[key, str(value)] for key, value in (groups[0].settings if groups else {}).items() if key not in names]
    blocks: list[Table | Text | Code] = [Table(["setting", "value"], shared, "The same in all runs.")] if shared else []
    if about.get("command"):
        blocks += [Text("The runs were made by:"), Code(str(about["command"]))]
    sources = Counter(record.environment.get("source", "") for record in records if record.state == "done")
    seconds = sum(record.seconds or 0.0 for record in records)
    blocks.append(
        Text(
            f"The runs took {seconds:.0f} seconds in total. Source of the package: "
            + ", ".join(f"{source} ({count} runs)" for source, count in sources.items())
            + "."
        )
    )
    page.add("How it was made", *blocks)
    failed = [record for record in records if record.state == "failed"]
    if failed:
        errors = [Code(f"seed {run.seed}, {dict(run.flat_settings)}\n{run.error[-2000:]}") for run in failed[:5]]
        page.add(f"{len(failed)} failed runs", *errors)


def _environments(records: Sequence[Record]) -> str:
    """Return the distinct environments of the runs as text."""
    texts = (format_environment(record.environment) for record in records)
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _is_numeric(groups: Sequence[Group], name: str) -> bool:
    values = [group.settings.get(name) for group in groups]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values) and len(set(values)) > 2


def _label(group: Group, names: Sequence[str]) -> str:
    return " · ".join(str(group.settings.get(name)) for name in names)
