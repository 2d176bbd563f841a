"""`suffice kv …`: generate from a compressed cache, measure what is lost, and choose policy and budget."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from suffice.cli.console import command_line, out, print_json, print_text, step_progress
from suffice.cli.kv_options import CacheGridOptions, CacheOptions, ModelOptions, parse_budget
from suffice.cli.kv_tables import comparison_table, policy_table, profile_table, trial_table
from suffice.cli.options import ExecutionOptions, FigureOptions, JsonOption, expand_options, split_commas
from suffice.cli.study_progress import study_progress
from suffice.files import check_suffix, read_text
from suffice.kv.budget.protection import Protection
from suffice.kv.eval.tune import DEFAULT_BUDGETS
from suffice.kv.policy.registry import DEFAULT_POLICY, allocations, get_allocation, get_policy, policies
from suffice.report import save_figure

app = typer.Typer(
    help="Compress the KV cache of a language model, and measure what is lost.",
    no_args_is_help=True,
    add_completion=False,
)

_COMPARED_CACHES = CacheGridOptions(f"{DEFAULT_POLICY},h2o,snapkv,keydiff", "own", "50%,25%")
_TUNED_CACHES = CacheGridOptions(f"{DEFAULT_POLICY},h2o,keydiff", "own,profile", ",".join(map(str, DEFAULT_BUDGETS)))

AwareOption = Annotated[
    bool,
    typer.Option("--aware/--agnostic", help="Evict after the question is seen (aware), or before it (agnostic)."),
]


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and a question about it."""

    panel: ClassVar[str] = "Prompt"

    prompt: Annotated[str | None, typer.Option(help="The prompt. Default: standard input.")] = None
    prompt_file: Annotated[Path | None, typer.Option(help="File that contains the prompt.")] = None
    question: Annotated[str | None, typer.Option(help="Question about the document in the prompt.")] = None
    aware: AwareOption = True

    def read(self) -> str:
        """Return the prompt.

        Raises:
            ValueError: no prompt or more than one is given, or the prompt or the question is empty.

        """
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("only one of --prompt and --prompt-file may be given, got both")
        if self.prompt is not None:
            text = self.prompt
        elif self.prompt_file is not None:
            text = read_text(self.prompt_file, "--prompt-file")
        elif sys.stdin.isatty():
            raise ValueError("a prompt must be given: --prompt TEXT, --prompt-file FILE, or text on standard input")
        else:
            text = sys.stdin.read().removeprefix("\ufeff")
        if not text.strip():
            raise ValueError(f"the prompt must contain text, got {text!r}")
        if self.question is not None and not self.question.strip():
            raise ValueError(f"--question must contain text, got {self.question!r}")
        return text


@app.command()
@expand_options
def generate(
    prompt: PromptOptions,
    cache: CacheOptions,
    model: ModelOptions,
    output: FigureOptions,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of generated tokens.")] = 128,
    layers: Annotated[bool, typer.Option("--layers", help="Also show how much each layer kept.")] = False,
) -> None:
    """Answer a prompt from a compressed KV cache, by greedy decoding.

    The report and the figure show how many entries each layer and head kept.
    """
    # Imported here, because transformers takes seconds to import and other commands do not need it.
    from suffice.kv.eval.answer import answer
    from suffice.kv.eval.generation import check_chunk_size

    # Check the options first, because the model takes seconds to load.
    policy = get_policy(cache.policy)
    allocation = None if cache.allocation is None else get_allocation(cache.allocation)
    budget = parse_budget(cache.budget)
    Protection().check(budget)
    check_chunk_size(cache.chunk_size)
    text = prompt.read()
    with step_progress() as show_step:
        network, tokenizer = model.source().load(show_step)
        show_step(f"generating with {policy.name}, budget {cache.budget}")
        result, report = answer(
            network,
            tokenizer,
            text,
            prompt.question,
            policy=policy,
            budget=budget,
            allocation=allocation,
            aware=prompt.aware,
            max_new_tokens=max_new_tokens,
            chunk_size=cache.chunk_size,
            interval=cache.interval,
            rerotate=cache.rerotate,
        )
    # Printed first, so that the answer is not lost if a file cannot be written.
    if output.as_json:
        print_json({"model": model.model, **result.to_dict()})
    else:
        print_text(result.answer)
        out.print(f"[dim]{report}, {result.seconds:.1f} s ({result.policy}, budget {cache.budget})[/]", highlight=False)
        if layers:
            out.print(report.table())
    if output.figure is not None:
        save_figure(report.figure(), output.figure)
    if output.report is not None:
        from suffice.kv.eval.report_sections import answer_page

        answer_page(result, report, command_line()).save(output.report)


@dataclass(frozen=True)
class CalibrationOptions:
    """The data on which a head profile is measured."""

    panel: ClassVar[str] = "Calibration"

    text_file: Annotated[
        Path | None, typer.Option(help="File with the text to measure on. Default: Python's help texts.")
    ] = None
    random: Annotated[bool, typer.Option("--random", help="Measure on random tokens instead of a text.")] = False
    from_weights: Annotated[
        bool,
        typer.Option("--from-weights", help="Estimate the profile from the weights, without running the model."),
    ] = False
    tokens: Annotated[
        int | None,
        typer.Option(help="Number of tokens to measure on. Default: 700, or fewer in a short context window."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0

    def read(self) -> str | None:
        """Return the text, or None for the default one.

        Raises:
            ValueError: more than one of the options is given, or the file cannot be read or is empty.

        """
        ways = {
            "--text-file": self.text_file is not None,
            "--random": self.random,
            "--from-weights": self.from_weights,
        }
        if len(given := [option for option, is_given in ways.items() if is_given]) > 1:
            raise ValueError(f"only one of {', '.join(ways)} may be given, got {' and '.join(given)}")
        if self.text_file is None:
            return None
        text = read_text(self.text_file, "--text-file")
        if not text.strip():
            raise ValueError(f"--text-file must contain text, got {str(self.text_file)!r}, which is empty")
        return text


@app.command("calibrate")
@expand_options
def calibrate_model(
    calibration: CalibrationOptions,
    model: ModelOptions,
    to: Annotated[
        Path | None, typer.Option(help="File to write. Default: the file where caches look for the model's profile.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of its cache each attention head of a model reads, for `--allocation profile`."""
    from suffice.kv.budget.calibration import calibrate
    from suffice.kv.budget.profile import write_profile
    from suffice.kv.budget.profile_from_weights import profile_from_weights

    text = calibration.read()
    start = time.perf_counter()
    with step_progress() as show_step:
        network, tokenizer = model.source().load(show_step)
        show_step("measuring the head profile")
        if calibration.from_weights:
            profile = profile_from_weights(network)
        else:
            encoder = None if calibration.random else tokenizer
            profile = calibrate(network, encoder, text, tokens=calibration.tokens, seed=calibration.seed)
    file = write_profile(profile, to)
    seconds = time.perf_counter() - start
    if as_json:
        fields = {"model": profile.model, "source": profile.source, "attention": profile.attention}
        print_json({**fields, "file": str(file), "seconds": seconds})
        return
    out.print(profile_table(profile))
    print_text(f"Profile: {file} ({seconds:.1f} s)")


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

    def parsed_tasks(self) -> list[tuple[str, str]]:
        """Return pairs of a task and a mode.

        Raises:
            ValueError: a task is unknown.

        """
        from suffice.kv.eval.tasks import TASKS, task_modes

        pairs: list[tuple[str, str]] = []
        for item in split_commas(self.tasks):
            task, _, mode = item.partition(":")
            if task not in TASKS:
                raise ValueError(f"--tasks must be among {', '.join(TASKS)}, got {task!r}")
            pairs += [(task, mode)] if mode else [(task, each) for each in task_modes(task)]
        return pairs


@app.command("compare")
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
    from suffice.kv.eval.compare import compare
    from suffice.kv.eval.run_options import RunOptions

    if parquet is not None:
        check_suffix(parquet, (".parquet",), "--parquet")
        if missing := [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]:
            raise ValueError(f"--parquet needs the packages pandas and pyarrow: pip install {' '.join(missing)}")
    with study_progress(execution.quiet) as on_progress:
        comparison = compare(
            policies=split_commas(caches.policies),
            allocations=split_commas(caches.allocations),
            budgets=caches.parsed_budgets(),
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
        out.print(comparison_table(comparison))
        print_text(comparison.summary())
    if parquet is not None:
        import pandas

        parquet.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(comparison.rows()).to_parquet(parquet)
    if output.figure is not None:
        from suffice.kv.eval.report_sections import plot_trade_off

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
    confidence: Annotated[float, typer.Option(help="Confidence level of the result.")] = 0.95


@app.command("tune")
@expand_options
def tune_budget(
    *,
    prompts: UserPromptOptions,
    target: TargetOptions,
    caches: CacheGridOptions = _TUNED_CACHES,
    model: ModelOptions,
    execution: ExecutionOptions,
    as_json: JsonOption = False,
) -> None:
    """Find the smallest cache that stays close enough to the full cache on your own prompts.

    The exit status is 1 if no cache is close enough.
    """
    from suffice.kv.eval.run_options import RunOptions
    from suffice.kv.eval.tune import tune
    from suffice.kv.eval.user_prompts import read_user_prompts

    with study_progress(execution.quiet) as on_progress:
        result = tune(
            read_user_prompts(prompts.prompts),
            target_kl=target.target_kl,
            target_agreement=target.target_agreement,
            policies=split_commas(caches.policies),
            allocations=split_commas(caches.allocations),
            budgets=caches.parsed_budgets(),
            mode="aware" if prompts.aware else "agnostic",
            confidence=target.confidence,
            max_new_tokens=prompts.max_new_tokens,
            model=model.source(),
            run=RunOptions(execution.folder, execution.workers, on_progress, command_line()),
        )
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(trial_table(result))
        print_text(result.summary())
        if result.best is not None:
            print_text("\n" + result.code())
    if result.best is None:
        raise typer.Exit(1)


@app.command("policies")
def list_policies(as_json: JsonOption = False) -> None:
    """List the policies and the allocations."""
    descriptions = [policy.describe() for policy in policies().values()]
    splits = {name: str(allocation) for name, allocation in allocations().items()}
    if as_json:
        print_json({"default": DEFAULT_POLICY, "policies": descriptions, "allocations": splits})
        return
    out.print(policy_table(descriptions))
    out.print(f"The default is {DEFAULT_POLICY}. Papers are given by their arXiv numbers.", highlight=False)
    names = ", ".join(name if name == text else f"{name} ({text})" for name, text in splits.items())
    out.print(f"Allocations that any policy can use: {names}.", highlight=False)
