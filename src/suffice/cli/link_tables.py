"""Tables that the commands of `suffice link` print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from suffice.link.auditing.audit import AuditReport
    from suffice.link.study.results import StudyResults

_STUDY_COLUMNS = {
    "hits@100": "Hits\n@100",
    "auc": "AUC",
    "a_pure:heldout": "A_pure",
    "tau:heldout": "τ",
    "kappa:heldout": "κ",
    "edge_nmi": "edge\nNMI",
}


def study_table(results: StudyResults) -> Table:
    """Return a table of each arm's most important metrics, averaged over seeds, and its verdicts."""
    num_seeds = len(results.settings["seeds"])
    title = f"{results.graph}, {num_seeds} seed{'s' * (num_seeds > 1)}, held-out edges"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, caption=results.describe_learning_rates() or None)
    table.add_column("arm", no_wrap=True)
    for column in _STUDY_COLUMNS.values():
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for key, arm in results.arms.items():
        cells = [
            f"{round(results.mean(key, metric).mean, 3) + 0.0:.3f}" if metric in arm.group.values else ""  # no -0.000
            for metric in _STUDY_COLUMNS
        ]
        table.add_row(key, *cells, ", ".join(sorted(set(arm.verdicts.values()))))
    return table


def audit_tables(report: AuditReport) -> Iterator[Table]:
    """Yield a table of the statistics of each set of edges, and one of the metrics in batches of each composition."""
    from suffice.link.auditing.kappa_tau import LABELS, MEANINGS
    from suffice.link.auditing.metric_comparison import WAYS

    for name, part in report.parts.items():
        table = Table(title=f"{name} edges", show_lines=True)
        table.add_column("statistic", no_wrap=True)
        table.add_column("mean [95 % interval]", no_wrap=True)
        table.add_column("meaning", max_width=60)
        for key, interval in part.statistics.items():
            table.add_row(LABELS.get(key, key), escape(str(interval)), MEANINGS[key])
        yield table
        if compared := report.metrics.get(name):
            table = Table(
                "scored in", *next(iter(compared.values())), title=f"Metrics of {name} edges, mean [95 % interval]"
            )
            for way, values in compared.items():
                table.add_row(WAYS[way], *(escape(str(value)) for value in values.values()))
            yield table


def verdict_text(report: AuditReport) -> Text:
    """Return the verdict: its level in bold, a sentence, what was measured, and what to do."""
    verdict = report.verdict
    text = Text.assemble((verdict.level, "bold"), f": {verdict.headline}")
    for label, sentences in report.points():
        text.append(f"\n  • {label}: {sentences}")
    return text


def row_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return a table with one column for each item of the rows; columns without any value are left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_format_cell(row[name]) for name in columns))
    return table


def _format_cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
