"""`suffice study …`: run a grid of experiments, and look at its status and results."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from rich.markup import escape
from rich.table import Table

from suffice.cli.console import command_line, print_json, print_table, print_text
from suffice.cli.options import JsonOption, QuietOption, expand_options
from suffice.cli.study_progress import study_progress
from suffice.study.export import SUFFIXES, export_study
from suffice.study.progress import format_duration
from suffice.study.run_kind import check_names
from suffice.study.spec import Spec, default_folder, parse_assignment
from suffice.study.status import StudyStatus, read_status
from suffice.study.store import Store

app = typer.Typer(
    help="Run grids of experiments that can be interrupted and resumed.", no_args_is_help=True, add_completion=False
)

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the study, or its YAML file.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="Name of the study, if the folder holds several.")]
MetricOption = Annotated[list[str] | None, typer.Option("--metric", help="Show only this metric. Can be repeated.")]

_MAX_FAILURES = 5


@dataclass(frozen=True)
class RunnerOptions:
    """Where the runs of a study are executed."""

    panel: ClassVar[str] = "Runner"

    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of processes; 0 uses this process. Default: one per core, at most 8. With --ray, maximum "
            "number of tasks at a time; by default or if 0, all cores of the cluster are used.",
            min=0,
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(help="Threads per worker. Default: cores / workers; with --ray, 1.", min=1)
    ] = None
    ray: Annotated[
        str | None, typer.Option(help="Run on a Ray cluster with this address: auto, local or HOST:PORT.")
    ] = None
    retry: Annotated[bool, typer.Option("--retry", help="Execute failed runs again.")] = False
    quiet: QuietOption = False

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        if self.workers is None and self.ray is None:
            return min(os.cpu_count() or 1, 8)
        return self.workers or 0


@app.command()
@expand_options
def run(
    spec: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    runner: RunnerOptions,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: the path of the YAML file without its suffix.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of all runs, NAME=VALUE. Can be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Execute the missing runs of a study.

    Every finished run is stored, so an interrupted study can be resumed. The exit status is 1 if runs failed.
    """
    from suffice.cli.run_kinds import installed_run_kinds
    from suffice.study.run_kind import find_run_kind
    from suffice.study.runner import run_study

    study = Spec.read(spec).with_settings(dict(map(parse_assignment, settings or ())))
    folder = folder or default_folder(spec)
    with study_progress(runner.quiet) as on_progress:
        outcome = run_study(
            folder,
            find_run_kind(study.kind, installed_run_kinds()),
            study,
            about={"command": command_line()},
            workers=runner.num_workers,
            threads=runner.threads,
            ray=runner.ray,
            retry_failed=runner.retry,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"folder": str(folder), **asdict(outcome)})
    elif not runner.quiet:
        print_text(
            f"{outcome.study}: {outcome.done} done ({outcome.new} by this run, in {format_duration(outcome.seconds)}), "
            f"{outcome.failed} failed. Show the results: suffice study show {folder}"
        )
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def status(folder: FolderArgument, study: StudyOption = None, as_json: JsonOption = False) -> None:
    """Show how many runs are done, failed, running and missing, and why runs failed."""
    statuses = read_status(default_folder(folder), study)
    if as_json:
        print_json({"folder": str(default_folder(folder)), "studies": [one.to_dict() for one in statuses]})
        return
    for one in statuses:
        print_text("\n  ".join(_status_lines(one)))


def _status_lines(status: StudyStatus) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in status.counts.items())
    lines = [f"{status.study} ({status.kind}): {states}"]
    if status.seconds_per_run is not None:
        unfinished = status.counts["missing"] + status.counts["running"]
        left = f"; {format_duration(unfinished * status.seconds_per_run)} of work left" if unfinished else ""
        lines.append(
            f"{format_duration(status.seconds)} of work done, {format_duration(status.seconds_per_run)} per run{left}"
        )
    if status.other_source:
        lines.append(f"{status.other_source} runs were executed with source files that differ from the present ones")
    lines += [f"failed, seed {failure.seed}: {failure.reason}" for failure in status.failures[:_MAX_FAILURES]]
    if status.failures:
        lines.append("to execute failed runs again: suffice study run … --retry; for tracebacks, add --json")
    return lines


@app.command()
def show(
    folder: FolderArgument,
    study: StudyOption = None,
    metric: MetricOption = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Show only runs with this setting, NAME=VALUE. Can be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of rows; 0 shows all.", min=0)] = 40,
    as_json: JsonOption = False,
) -> None:
    """Show the results: means over seeds with 95 % intervals, one row for each combination of settings."""
    from suffice.study.results import group_records, metric_names, select_groups, summarize, varying_settings

    with Store(default_folder(folder), read_only=True) as store:
        name = store.study_name(study)
        counts = store.counts(name)
        groups = group_records(store.records(name, "done", numbers_only=True))
    settings = varying_settings(groups)
    groups = select_groups(groups, dict(map(_parse_condition, where or ())))
    metrics = metric_names(groups)
    check_names(metric or (), metrics, "--metric")
    metrics = metric or metrics
    if as_json:
        rows = [row for row in summarize(groups, settings) if row["metric"] in metrics]
        print_json({"study": name, **counts, "rows": rows})
        return
    table = Table(title=f"{name}: {counts['done']} of {sum(counts.values())} runs", title_justify="left")
    for column in settings:
        table.add_column(escape(column))
    for column in metrics:
        table.add_column(escape(column), justify="right")
    shown = groups if limit == 0 else groups[:limit]
    for group in shown:
        cells = [str(group.settings.get(column)) for column in settings]
        cells += [str(group.interval(column)) if column in group.values else "" for column in metrics]
        table.add_row(*map(escape, cells))
    print_table(table)
    if len(shown) < len(groups):
        print_text(f"{len(groups) - len(shown)} more rows. Show all: --limit 0. Select rows: --where {settings[0]}=…")


def _parse_condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where must be NAME=VALUE, got {text!r}")
    return name, value


@app.command()
def export(
    folder: FolderArgument,
    to: Annotated[Path, typer.Option(help=f"File to write, ending in {', '.join(SUFFIXES)}.")],
    study: StudyOption = None,
) -> None:
    """Write the settings, seed and metrics of all finished runs to a file.

    A JSON file also contains the complete result and the environment of each run.
    """
    num_rows = export_study(to, default_folder(folder), study)
    print_text(f"{to}: {num_rows} rows")


@app.command("kinds")
def list_kinds(as_json: JsonOption = False) -> None:
    """List the kinds of runs, their settings and the defaults."""
    from suffice.cli.run_kinds import installed_run_kinds

    kinds = installed_run_kinds()
    if as_json:
        print_json(
            {
                name: {"description": kind.description, "settings": kind.flatten(kind.settings)}
                for name, kind in kinds.items()
            }
        )
        return
    for kind in kinds.values():
        table = Table("setting", "default", title=f"{kind.name}: {kind.description}", title_justify="left")
        for setting, default in kind.flatten(kind.settings).items():
            table.add_row(escape(setting), escape(str(default)))
        print_table(table)
