"""`suffice report`: a study as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suffice.cli.command_line import command_line
from suffice.cli.console import out
from suffice.cli.study import Folder, Metrics, Name, home


def report(
    folder: Folder,
    to: Annotated[Path | None, typer.Option(help="Where to: .html, or .md with its figures beside it.")] = None,
    study: Name = None,
    metric: Metrics = None,
    compare: Annotated[str | None, typer.Option(help="Setting whose values are compared, pair by pair.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Its value that the others are compared with.")] = None,
) -> None:
    """Write a study as one page: results with intervals, curves, differences, configuration."""
    from suffice.cli.kinds import kinds
    from suffice.study.report_page import study_report

    place = home(folder)
    target = to or place.with_name(f"{place.name or 'study'}.html")
    if target.suffix not in (".html", ".md"):
        raise ValueError(f"to is {str(target)!r}; accepted: a file ending in .html or .md")
    page = study_report(
        place,
        study=study,
        kinds=kinds(),
        metrics=metric or (),
        compared_setting=compare,
        baseline=baseline,
        command=command_line(),
    )
    page.save(target)
    out.print(f"Page: {target}", markup=False, highlight=False)
