"""`suffice kv compare` and `suffice kv tune`: which policy, how small, at what price."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from suffice.cli.command_line import command_line
from suffice.cli.console import finite, out, print_json
from suffice.cli.kv_options import AttnOption, DeviceOption, DtypeOption, ModelOption, parse_budget
from suffice.cli.watching import watching
from suffice.kv.hf.default_model import DEFAULT_MODEL
from suffice.kv.policy.registry import DEFAULT_POLICY

if TYPE_CHECKING:
    from suffice.kv.eval.compare import Comparison
    from suffice.kv.eval.tune import TuningResult

Folder = Annotated[Path | None, typer.Option(help="Keep finished samples here, and go on from them.")]
Workers = Annotated[int, typer.Option(help="Processes; 0 for this one.", min=0)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML page.")]


def compare_caches(
    policies: Annotated[str, typer.Option(help="Comma-separated; `suffice kv policies` lists them.")] = (
        f"{DEFAULT_POLICY},h2o,snapkv,keydiff"
    ),
    allocations: Annotated[str, typer.Option(help="Comma-separated; own is the policy's own.")] = "own",
    budgets: Annotated[str, typer.Option(help="Comma-separated tokens or fractions.")] = "50%,25%",
    tasks: Annotated[
        str, typer.Option(help="Comma-separated task:mode; the mode is agnostic or aware, without it both.")
    ] = "text,multikey",
    tokens: Annotated[int, typer.Option(help="Most tokens of a prompt.")] = 900,
    samples: Annotated[int, typer.Option(help="Examples of each task.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the first one.")] = 0,
    haystack: Annotated[Path | None, typer.Option(help="Make prompts from this text; else Python's manual.")] = None,
    answer: Annotated[bool, typer.Option("--answer/--no-answer", help="Let every cache answer, and score it.")] = True,
    greedy_tokens: Annotated[int, typer.Option(help="Compare greedy continuations of so many tokens.")] = 0,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    attn: AttnOption = "sdpa",
    folder: Folder = None,
    workers: Workers = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    parquet: Annotated[Path | None, typer.Option(help="Write the rows as Parquet.")] = None,
    report: Report = None,
    figure: Annotated[Path | None, typer.Option(help="Draw KL against bytes (svg, png).")] = None,
) -> None:
    """Measure how close policies, allocations and budgets stay to the full cache, on tasks made locally."""
    from suffice.kv.eval.compare import compare
    from suffice.kv.eval.run_options import RunOptions
    from suffice.kv.hf.loading import ModelSource

    chosen = [pair for name in _split(tasks) for pair in _task(name)]
    with watching(quiet) as watch:
        found = compare(
            policies=_split(policies),
            allocations=_split(allocations),
            budgets=[parse_budget(text) for text in _split(budgets)],
            tasks=chosen,
            tokens=tokens,
            samples=samples,
            seed=seed,
            haystack=None if haystack is None else str(haystack),
            answer=answer,
            greedy_tokens=greedy_tokens,
            model=ModelSource(None if model == DEFAULT_MODEL else model, device, dtype, attn),
            run=RunOptions(folder, workers, watch, command_line()),
        )
    if parquet is not None:
        import pandas

        parquet.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(found.rows()).to_parquet(parquet)
    if figure is not None:
        from suffice.kv.eval.report_sections import trade_off
        from suffice.report import save_figure

        save_figure(trade_off(found), str(figure))
    if report is not None:
        from suffice.kv.eval.report_sections import comparison_page

        comparison_page(found, command_line()).save(report)
    if as_json:
        print_json(finite(found.to_dict()))
        return
    out.print(_table(found))
    for line in _words(found):
        out.print(line, highlight=False, markup=False)


def tune_budget(
    prompts: Annotated[Path, typer.Option(help="Your prompts: JSON lines, or texts between lines of dashes.")],
    target_kl: Annotated[float | None, typer.Option(help="Most mean KL from the full cache, nats a token.")] = None,
    target_agreement: Annotated[float | None, typer.Option(help="Least share of the same greedy tokens.")] = None,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = f"{DEFAULT_POLICY},h2o,keydiff",
    allocations: Annotated[str, typer.Option(help="Comma-separated; own is the policy's own.")] = "own,profile",
    budgets: Annotated[str | None, typer.Option(help="Comma-separated tokens or fractions to try.")] = None,
    aware: Annotated[
        bool, typer.Option("--aware/--agnostic", help="Are questions seen before eviction, or only after it?")
    ] = True,
    confidence: Annotated[float, typer.Option(help="Of what is said.")] = 0.95,
    new_tokens: Annotated[int, typer.Option(help="How far the full cache goes on from each prompt.")] = 32,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    attn: AttnOption = "sdpa",
    folder: Folder = None,
    workers: Workers = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the smallest budget that stays close to the full cache on your own prompts. Exit status 1 if none does."""
    from suffice.kv.eval.run_options import RunOptions
    from suffice.kv.eval.tune import DEFAULT_BUDGETS, tune
    from suffice.kv.eval.user_prompts import read_user_prompts
    from suffice.kv.hf.loading import ModelSource

    given = read_user_prompts(prompts)
    with watching(quiet) as watch:
        found = tune(
            given,
            target_kl=target_kl,
            target_agreement=target_agreement,
            policies=_split(policies),
            allocations=_split(allocations),
            budgets=DEFAULT_BUDGETS if budgets is None else [parse_budget(text) for text in _split(budgets)],
            mode="aware" if aware else "agnostic",
            confidence=confidence,
            max_new_tokens=new_tokens,
            model=ModelSource(None if model == DEFAULT_MODEL else model, device, dtype, attn),
            run=RunOptions(folder, workers, watch, command_line()),
        )
    if as_json:
        print_json(finite(found.to_dict()))
    else:
        out.print(_trials(found))
        out.print(found.summary(), highlight=False, markup=False)
        if found.best is not None:
            out.print("\n" + found.code(), highlight=False, markup=False, soft_wrap=True)
    if found.best is None:
        raise typer.Exit(1)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _task(text: str) -> list[tuple[str, str]]:
    from suffice.kv.eval.tasks import TASKS, task_modes

    task, _, mode = text.partition(":")
    if task not in TASKS:
        raise ValueError(f"tasks has {task!r}; accepted: {', '.join(TASKS)}, each with :agnostic or :aware, or without")
    return [(task, own) for own in task_modes(task)] if not mode else [(task, mode)]


def _table(found: Comparison) -> Table:
    samples = found.settings["samples"]
    table = Table(title=f"KL to the full cache, nats a token: mean of {samples} samples ± half of a 95 % interval")
    table.add_column("policy", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    settings = list(dict.fromkeys((task, mode) for task, mode, _ in found.conditions))
    for task, mode in settings:
        table.add_column(task if mode == "continuation" else f"{task}\n{mode}", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    ranks = found.mean_ranks()
    for name, rank in ranks.items():
        for number, budget in enumerate(dict.fromkeys(condition.budget for condition in found.conditions)):
            means = [found.group(name, (task, mode, budget)).interval("kl") for task, mode in settings]
            cells = [f"{one.mean:.3f}" + (f" ± {one.high - one.mean:.3f}" if samples > 1 else "") for one in means]
            label = f"{budget:.0%}" if isinstance(budget, float) else str(budget)
            table.add_row("" if number else name, label, *cells, "" if number else f"{rank:.1f}")
    return table


def _words(found: Comparison) -> list[str]:
    best = next(iter(found.mean_ranks()))
    losses = found.losses(best)
    said = [f"Best mean rank: {best}."]
    said += [
        f"In {row['task']}, {row['mode']}, at {row['budget']:g}, {row['method']} is closer by {-row['mean']:.3f} "
        f"[{-row['high']:.3f}, {-row['low']:.3f}]."
        for row in losses
    ]
    if not losses:
        said.append("No other is closer in any cell, as far as these samples tell (95 % intervals, not corrected).")
    rhos: list[Any] = [f"{row['spearman']:+.2f}" for row in found.capacity_correlations()]
    if rhos:
        said.append(f"Capacity kept and KL, Spearman over caches in each cell: {', '.join(rhos)}.")
    return said


def _trials(found: TuningResult) -> Table:
    name = "KL" if found.metric == "kl" else "agreement"
    table = Table(title=f"{found.num_prompts} prompts, target {name} {found.target:g}")
    for column in ("policy", "allocation", "budget", f"mean {name}", "bound", "within", "MB", "safe"):
        table.add_column(column, justify="left" if column in ("policy", "allocation") else "right", no_wrap=True)
    for trial in found.trials:
        table.add_row(
            trial.policy,
            trial.allocation,
            f"{trial.budget:g}",
            f"{trial.mean:.4f}",
            f"{trial.bound:.4f}",
            f"{trial.within:.0%}",
            f"{trial.bytes_kept / 1e6:.1f}",
            "yes" if trial.safe else "no",
        )
    return table
