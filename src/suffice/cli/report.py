"""`suffice report`: the report of a study as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suffice.cli.console import command_line, print_text
from suffice.cli.study import FolderArgument, MetricOption, StudyOption
from suffice.files import PAGE_SUFFIXES, check_suffix
from suffice.study.spec import default_folder
from suffice.study.store import Store


def report(
    folder: FolderArgument,
    to: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .html, or .md, which stores the figures in files beside it. Default: the path of the "
            "folder with the suffix .html."
        ),
    ] = None,
    study: StudyOption = None,
    metric: MetricOption = None,
    compare: Annotated[str | None, typer.Option(help="Setting whose values are compared in pairs.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Value of the --compare setting that the other values are compared with.")
    ] = None,
) -> None:
    """Write the report of a study: results with intervals, curves, differences and configuration."""
    folder = default_folder(folder)
    to = to or folder.with_name(f"{folder.name or 'study'}.html")
    check_suffix(to, PAGE_SUFFIXES, "--to")
    with Store(folder, read_only=True) as store:
        store.study_name(study)  # raises an error if there is no such study, before torch is imported

    from suffice.cli.run_kinds import installed_run_kinds
    from suffice.study.report_page import study_report

    page = study_report(
        folder,
        study=study,
        kinds=installed_run_kinds(),
        metrics=metric or (),
        compared_setting=compare,
        baseline=baseline,
        command=command_line(),
    )
    page.save(to)
    print_text(f"Page: {to}")
