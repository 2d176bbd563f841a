"""`suffice kv compare` and `suffice kv tune`: measure what is lost, and choose policy and budget."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from rich.text import Text

from suffice.cli.console import command_line, out, print_json, print_table, print_text
from suffice.cli.kv_options import AwareOption, CacheGridOptions, ModelOptions
from suffice.cli.kv_tables import comparison_table, tuning_table
from suffice.cli.options import ExecutionOptions, FigureOptions, OutputOptions, expand_options, split_commas
from suffice.cli.study_progress import study_progress
from suffice.files import check_suffix, read_text
from suffice.kv.eval.task_names import parse_task
from suffice.kv.policy.names import DEFAULT_POLICY, OWN_ALLOCATION
from suffice.kv.storage.quantization import format_bits

_COMPARED_CACHES = CacheGridOptions(f"{DEFAULT_POLICY},h2o,snapkv,keydiff", OWN_ALLOCATION)
_TUNED_CACHES = CacheGridOptions(None, OWN_ALLOCATION)


@dataclass(frozen=True)
class TaskOptions:
    """The tasks on which caches are compared."""

    panel: ClassVar[str] = "Tasks"

    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas: text, single, multikey, multivalue, multiquery, variables, common-words, "
            "frequent-words, qa. All tasks except text have two modes, as in multikey:aware and multikey:agnostic; "
            "without a mode, both are measured."
        ),
    ] = "text,multikey"
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a prompt.")] = 900
    samples: Annotated[int, typer.Option(help="Number of examples of each task.")] = 8
    seed: Annotated[int, typer.Option(help="Seed of the first example.")] = 0
    haystack: Annotated[
        Path | None, typer.Option(help="Text file to make the prompts from. Default: Python's help texts.")
    ] = None
    answer: Annotated[
        bool, typer.Option("--answer/--no-answer", help="Also generate an answer from each cache, and score it.")
    ] = True
    greedy_tokens: Annotated[
        int, typer.Option(help="Number of greedy tokens to compare with those of the full cache; 0 for none.")
    ] = 0

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        self.parsed_tasks()
        if self.haystack is not None:
            read_text(self.haystack, "--haystack")

    def parsed_tasks(self) -> list[tuple[str, str]]:
        """Return pairs of a task and a mode.

        Raises:
            ValueError: a task or a mode is unknown.

        """
        return [pair for item in split_commas(self.tasks) for pair in parse_task(item, "--tasks")]


@expand_options
def compare_caches(
    *,
    caches: CacheGridOptions = _COMPARED_CACHES,
    tasks: TaskOptions,
    model: ModelOptions,
    execution: ExecutionOptions,
    output: FigureOptions,
    parquet: Annotated[Path | None, typer.Option(help="Write the results to this Parquet file.")] = None,
) -> None:
    """Compare how close compressed caches stay to the full cache on generated tasks.

    The figure shows the KL divergence from the full cache against the bytes kept.
    """
    if parquet is not None:
        check_suffix(parquet, (".parquet",), "--parquet")
        if missing := [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]:
            raise ValueError(f"--parquet needs the packages pandas and pyarrow: pip install {' '.join(missing)}")

    from suffice.kv.eval.compare import compare
    from suffice.kv.eval.run_options import RunOptions

    with study_progress(execution.quiet) as on_progress:
        comparison = compare(
            policies=caches.parsed_policies() or (),
            allocations=split_commas(caches.allocations),
            budgets=caches.parsed_budgets(),
            bits=caches.parsed_bits(),
            memory=caches.parsed_memory(),
            repair=caches.parsed_repair() or (False,),
            tasks=tasks.parsed_tasks(),
            tokens=tasks.tokens,
            samples=tasks.samples,
            seed=tasks.seed,
            haystack=None if tasks.haystack is None else str(tasks.haystack),
            answer=tasks.answer,
            greedy_tokens=tasks.greedy_tokens,
            model=model.source(),
            run=RunOptions(execution.folder, execution.workers, on_progress, command_line()),
        )
    if output.as_json:
        print_json(comparison.to_dict())
    else:
        from suffice.kv.eval.cache_scores import main_result, samples_warning

        out.print(Text(main_result(comparison), style="bold"), soft_wrap=True)
        if warning := samples_warning(comparison):
            out.print(Text(f"Warning: {warning}", style="yellow"), soft_wrap=True)
        print_table(comparison_table(comparison))
        print_text(comparison.summary())
    if parquet is not None:
        import pandas

        parquet.parent.mkdir(parents=True, exist_ok=True)
        rows = pandas.DataFrame(comparison.rows())
        if "bits" in rows:
            rows["bits"] = [format_bits(bits) for bits in rows["bits"]]  # numbers and pairs in one column
        rows.to_parquet(parquet)
    if output.figure is not None:
        from suffice.kv.eval.report_sections import plot_trade_off
        from suffice.report import save_figure

        save_figure(plot_trade_off(comparison), output.figure)
    if output.report is not None:
        from suffice.kv.eval.report_sections import comparison_page

        comparison_page(comparison, command_line()).save(output.report)


@dataclass(frozen=True)
class UserPromptOptions:
    """Prompts of the user."""

    panel: ClassVar[str] = "Prompts"

    prompts: Annotated[
        Path,
        typer.Option(
            help="File with your prompts: a JSON array or JSON lines (.json, .jsonl, .ndjson), or texts separated by "
            "lines of dashes (---)."
        ),
    ]
    aware: AwareOption = True
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of the full cache's answers, in tokens.")] = 32


@dataclass(frozen=True)
class TargetOptions:
    """How close a cache must stay to the full cache."""

    panel: ClassVar[str] = "Target"

    target_kl: Annotated[
        float | None,
        typer.Option(
            help="Maximum mean KL divergence from the full cache, in nats per token. Give this or --target-agreement."
        ),
    ] = None
    target_agreement: Annotated[
        float | None, typer.Option(help="Minimum mean share of greedy tokens that equal those of the full cache.")
    ] = None
    confidence: Annotated[
        float, typer.Option(help="Confidence that the cache meets the target, above 0.5 and below 1.")
    ] = 0.95

    def check(self) -> None:
        """Check that one target is given.

        Raises:
            ValueError: no target is given, or both are.

        """
        if (self.target_kl is None) == (self.target_agreement is None):
            got = "neither" if self.target_kl is None else f"{self.target_kl} and {self.target_agreement}"
            raise ValueError(f"exactly one of --target-kl and --target-agreement must be given, got {got}")


@expand_options
def tune_budget(
    *,
    prompts: UserPromptOptions,
    target: TargetOptions,
    caches: CacheGridOptions = _TUNED_CACHES,
    model: ModelOptions,
    execution: ExecutionOptions,
    output: OutputOptions,
    trials: Annotated[bool, typer.Option("--trials", help="Also show every cache that was tried.")] = False,
) -> None:
    """Find the smallest cache that stays close enough to the full cache on your own prompts.

    The exit status is 1 if no cache is close enough.
    """
    target.check()
    read_text(prompts.prompts, "--prompts")  # raises an error if the file cannot be read, before torch is imported

    from suffice.kv.eval.run_options import RunOptions
    from suffice.kv.eval.tune import tune
    from suffice.kv.eval.user_prompts import read_user_prompts

    with study_progress(execution.quiet) as on_progress:
        result = tune(
            read_user_prompts(prompts.prompts),
            target_kl=target.target_kl,
            target_agreement=target.target_agreement,
            policies=caches.parsed_policies(),
            allocations=split_commas(caches.allocations),
            budgets=caches.parsed_budgets(),
            bits=caches.parsed_bits(),
            memory=caches.parsed_memory(),
            repair=caches.parsed_repair(),
            mode="aware" if prompts.aware else "agnostic",
            confidence=target.confidence,
            max_new_tokens=prompts.max_new_tokens,
            model=model.source(),
            run=RunOptions(execution.folder, execution.workers, on_progress, command_line()),
        )
    if output.as_json:
        print_json(result.to_dict())
    else:
        out.print(Text(result.verdict(), style="bold"), soft_wrap=True)
        if warning := result.warning():
            out.print(Text(f"Warning: {warning}", style="yellow"), soft_wrap=True)
        if result.best is not None:
            print_text("\n" + result.code())
        title = f"{result.num_prompts} prompts, target {result.describe_target()}"
        print_table(tuning_table(*result.policy_rows(), title=f"The smallest safe cache of each policy: {title}"))
        if trials:
            print_table(tuning_table(*result.trial_rows(), title=f"All caches that were tried: {title}"))
        out.print(Text(result.explain_columns(), style="dim"))
    if output.report is not None:
        from suffice.kv.eval.report_sections import tuning_page

        tuning_page(result, command_line()).save(output.report)
    if result.best is None:
        raise typer.Exit(1)
