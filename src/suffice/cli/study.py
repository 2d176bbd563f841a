"""`suffice study …`: run a grid, see how far it is and what it found, take it elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from suffice.cli.command_line import command_line
from suffice.cli.console import finite, out, print_json
from suffice.cli.watching import watching
from suffice.environment import source_digest
from suffice.study.export import SUFFIXES, export_records, flat_rows
from suffice.study.progress import format_duration
from suffice.study.results import group_records, metric_names, summarize, varying_settings
from suffice.study.spec import Spec, parse_assignment
from suffice.study.store import Store

app = typer.Typer(help="Run grids of experiments that survive anything.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The study's folder, or its YAML file.")]
Name = Annotated[str | None, typer.Option("--study", help="Which study, where a folder holds several.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="Only this metric; may be repeated.")]


def home(path: Path) -> Path:
    """Return the folder of a study: the path itself, or for a YAML file the folder of its name beside it."""
    return path.with_suffix("") if path.suffix in (".yaml", ".yml") else path


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    folder: Annotated[Path | None, typer.Option(help="Where results go; named as the file without it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a setting of all runs, NAME=VALUE; may be repeated.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, or Ray tasks; 0 for this process.", min=0)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each; the cores shared out.", min=1)] = None,
    ray: Annotated[str | None, typer.Option(help="Run on the Ray cluster at this address (auto, HOST:PORT).")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed runs again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Do every run that is missing; each is kept when it ends. Exit status 1 if runs have failed."""
    from suffice.cli.kinds import kinds
    from suffice.study.run_kind import find_run_kind
    from suffice.study.runner import run_study

    study = Spec.read(spec).with_settings(dict(map(parse_assignment, settings or ())))
    if ray is None and workers is None:
        workers = min(os.cpu_count() or 1, 8)
    place = folder or home(spec)
    with watching(quiet) as watch:
        found = run_study(
            place,
            find_run_kind(study.kind, kinds()),
            study,
            about={"command": command_line()},
            workers=workers or 0,
            threads=threads,
            ray=ray,
            retry_failed=retry,
            on_progress=watch,
        )
    if as_json:
        print_json({"study": found.study, "folder": str(place), **_outcome(found)})
    elif not quiet:
        out.print(
            f"{found.study}: {found.done} done ({found.new} now, {format_duration(found.seconds)}), "
            f"{found.failed} failed. See: suffice study show {place}",
            markup=False,
            highlight=False,
        )
    if found.failed:
        raise typer.Exit(1)


@app.command()
def status(folder: Folder, study: Name = None, as_json: Json = False) -> None:
    """Say how many runs are done, failed, running and missing, and why some failed."""
    with Store(home(folder), read_only=True) as store:
        studies = store.studies()
        names = [store.study_name(study)] if study else list(studies)
        found: list[dict[str, Any]] = []
        for name in names:
            failed = [
                {"settings": dict(one.flat_settings), "seed": one.seed, "error": one.error}
                for one in store.records(name, "failed", numbers_only=True)
            ]
            counts, seconds, sources = store.overview(name)
            found.append(
                {
                    "study": name,
                    "kind": studies[name]["kind"],
                    **counts,
                    "seconds": seconds,
                    "other_source": sum(sources.values()) - sources.get(source_digest(), 0),
                    "failures": failed,
                }
            )
    if as_json:
        print_json({"folder": str(home(folder)), "studies": found})
        return
    for one in found:
        states = ", ".join(f"{one[state]} {state}" for state in ("done", "failed", "running", "missing"))
        out.print(f"{one['study']} ({one['kind']}): {states}", markup=False, highlight=False)
        if one["done"]:
            each = format_duration(one["seconds"] / one["done"])
            left = one["missing"] + one["running"]
            more = f"; {format_duration(left * one['seconds'] / one['done'])} of work left" if left else ""
            out.print(
                f"  {format_duration(one['seconds'])} of work done, {each} a run{more}", markup=False, highlight=False
            )
        if one["other_source"]:
            said = f"  {one['other_source']} runs were made with other source of the same version"
            out.print(said, markup=False, highlight=False)
        for failure in one["failures"][:5]:
            last = failure["error"].strip().splitlines()[-1] if failure["error"] else ""
            out.print(f"  failed, seed {failure['seed']}: {last}", markup=False, highlight=False)
        if one["failed"]:
            out.print("  try them again with: suffice study run … --retry; tracebacks: --json", highlight=False)


@app.command()
def show(
    folder: Folder,
    study: Name = None,
    metric: Metrics = None,
    where: Annotated[list[str] | None, typer.Option(help="Only NAME=VALUE; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(help="Most rows; 0 for all.", min=0)] = 40,
    as_json: Json = False,
) -> None:
    """Show means over seeds with 95 % intervals, a row for each combination of settings."""
    with Store(home(folder), read_only=True) as store:
        name = store.study_name(study)
        groups = group_records(store.records(name, "done", numbers_only=True))
        counts = store.counts(name)
    names = varying_settings(groups)
    for condition in where or ():
        key, _, value = condition.partition("=")
        if key not in names:
            raise ValueError(f"where is {condition!r}; accepted: NAME=VALUE, NAME one of {', '.join(names)}")
        groups = [one for one in groups if str(one.settings.get(key)) == value]
    shown = _chosen(metric_names(groups), metric)
    if as_json:
        rows = [row for row in summarize(groups, names) if row["metric"] in shown]
        print_json(finite({"study": name, **counts, "rows": rows}))
        return
    table = Table(title=f"{name}: {counts['done']} of {sum(counts.values())} runs", title_justify="left")
    for column in names:
        table.add_column(escape(column))
    for column in shown:
        table.add_column(escape(column), justify="right")
    cut = groups if limit == 0 else groups[:limit]
    for one in cut:
        cells = [str(one.interval(column)) if column in one.values else "" for column in shown]
        table.add_row(*(escape(str(one.settings.get(column))) for column in names), *map(escape, cells))
    out.print(table)
    if len(cut) < len(groups):
        out.print(f"{len(groups) - len(cut)} more rows: --limit 0, or --where {names[0]}=…", highlight=False)


@app.command()
def export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help=f"File to write: {', '.join(SUFFIXES)}.")],
    study: Name = None,
) -> None:
    """Write every finished run: settings, seed and metrics; JSON holds all else too."""
    with Store(home(folder), read_only=True) as store:
        name = store.study_name(study)
        about = store.studies()[name]
        records = list(store.records(name))
    export_records(to, name, about, records)
    out.print(f"{to}: {len(flat_rows(records))} rows", markup=False, highlight=False)


@app.command("kinds")
def list_kinds(as_json: Json = False) -> None:
    """List kinds of runs and the settings they accept."""
    from suffice.cli.kinds import kinds

    found = kinds()
    if as_json:
        print_json(
            {
                name: {"description": kind.description, "settings": kind.flatten(kind.settings)}
                for name, kind in found.items()
            }
        )
        return
    for kind in found.values():
        table = Table("setting", "default", title=f"{kind.name}: {kind.description}", title_justify="left")
        for setting, default in kind.flatten(kind.settings).items():
            table.add_row(escape(setting), escape(str(default)))
        out.print(table)


def _chosen(known: list[str], asked: list[str] | None) -> list[str]:
    from suffice.study.run_kind import check_names

    check_names(asked or (), known, "metrics")
    return asked or known


def _outcome(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("done", "failed", "new", "recovered", "seconds")}
