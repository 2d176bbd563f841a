"""What the commands of `suffice link` print and write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from suffice.cli.command_line import command_line
from suffice.cli.console import finite, out, print_json

if TYPE_CHECKING:
    from suffice.link.study.results import StudyResults


def study_table(study: StudyResults) -> Table:
    """Return the terminal's table of a study: means over seeds."""
    shown = {
        "hits@100": "Hits\n@100",
        "auc": "AUC",
        "a_pure:heldout": "A_pure",
        "tau:heldout": "τ",
        "kappa:heldout": "κ",
        "edge_nmi": "edge\nNMI",
    }
    seeds = len(study.settings["seeds"])
    title = f"{study.graph}, {seeds} seed{'s' * (seeds > 1)}, held-out edges"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for name in shown.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for key, arm in study.arms.items():
        cells = [f"{study.mean(key, name).mean:.3f}" if name in arm.group.values else "" for name in shown]
        table.add_row(key, *cells, ", ".join(sorted(set(arm.verdicts.values()))))
    return table


def show_rows(
    result: dict[str, Any], rows: list[dict[str, Any]], as_json: bool, report: Path | None, title: str
) -> None:
    """Print rows as a table or as JSON, and write their page if asked to."""
    from suffice.report import Page
    from suffice.report import Table as PageTable

    cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    if report is not None:
        page = Page(title=title, summary=f"On {result['graph']}.", command=command_line())
        page.add("Results", PageTable(list(rows[0]), cells))
        page.save(report)
    if as_json:
        print_json(finite(result))
        return
    table = Table(*rows[0], title=title)
    for row in cells:
        table.add_row(*row)
    out.print(table)
