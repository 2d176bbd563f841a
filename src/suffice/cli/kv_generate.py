"""`suffice kv generate`: answer a prompt from a compressed cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from suffice.arguments import check_int, check_optional_int
from suffice.cli.console import command_line, out, print_json, print_table, print_text, step_progress
from suffice.cli.kv_options import AwareOption, CacheOptions, ModelOptions
from suffice.cli.options import FigureOptions, expand_options
from suffice.files import read_text
from suffice.kv.budget.memory_limit import format_memory
from suffice.kv.storage.quantization import bits_suffix

if TYPE_CHECKING:
    from suffice.kv.eval.answer import Answer


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
            ValueError: no prompt or more than one is given, the prompt or the question is empty, or `--agnostic` is
                given without a question.

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
        if not self.aware and self.question is None:
            raise ValueError(
                "--agnostic must be given with --question, got no question. It evicts after the document and before "
                "the question"
            )
        return text


@expand_options
def generate(
    prompt: PromptOptions,
    cache: CacheOptions,
    model: ModelOptions,
    output: FigureOptions,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of generated tokens.")] = 128,
    compare_full: Annotated[
        bool | None,
        typer.Option(
            "--compare-full/--no-compare-full",
            help="Also answer from the full cache, and show how far the compressed one is from it. This takes a second "
            "pass over the prompt. Default: yes with --report, unless --rerotate is given.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also show how much each layer kept.")] = False,
) -> None:
    """Answer a prompt from a compressed KV cache, by greedy decoding.

    The report and the figure show how many entries each layer and head kept.
    """
    # Checked before torch and transformers are imported, which takes seconds, and before the model is loaded.
    budget, memory = cache.parsed_size()
    bits = cache.parsed_bits()
    check_int("--max-new-tokens", max_new_tokens, 1)
    check_optional_int("--chunk-size", cache.chunk_size, 1, unit="token")
    # With --rerotate, the prompt may be longer than the context window, which the full cache cannot read.
    compares = (output.report is not None and not cache.rerotate) if compare_full is None else compare_full
    text = prompt.read()
    policy = cache.parsed_policy()

    from suffice.kv.cache.layer_kinds import check_repair
    from suffice.kv.eval.answer import answer, check_interval
    from suffice.kv.eval.cache_grid import repair_suffix
    from suffice.kv.eval.fidelity import CacheConfig
    from suffice.kv.policy.registry import get_allocation

    allocation = None if cache.allocation is None else get_allocation(cache.allocation)
    check_interval(policy, cache.interval, "--interval")
    CacheConfig(policy, budget, allocation, bits, memory, cache.repair).check()
    source = model.source()
    if cache.repair:
        own = policy if allocation is None else replace(policy, allocation=allocation)
        check_repair(own, rerotate=cache.rerotate)
    size = f"budget {cache.budget or '25%'}" if memory is None else f"memory {format_memory(memory)}"
    size += bits_suffix(bits) + repair_suffix(cache.repair)
    with step_progress() as show_step:
        network, tokenizer = source.load(show_step)
        show_step(f"generating with {policy.name}, {size}")
        result, report = answer(
            network,
            tokenizer,
            text,
            prompt.question,
            policy=policy,
            budget=budget,
            memory=memory,
            allocation=allocation,
            aware=prompt.aware,
            max_new_tokens=max_new_tokens,
            chunk_size=cache.chunk_size,
            interval=cache.interval,
            rerotate=cache.rerotate,
            bits=bits,
            repair=cache.repair,
            compare_full=compares,
        )
    # Printed first, so that the answer is not lost if a file cannot be written.
    if output.as_json:
        print_json({"model": model.model, **result.to_dict()})
    else:
        _print_answer(result, max_new_tokens)
        out.print(f"[dim]{report}, {result.seconds:.1f} s ({result.policy}, {size})[/]", highlight=False)
        if layers:
            print_table(report.table())
    if output.figure is not None:
        from suffice.report import save_figure

        save_figure(report.figure(), output.figure)
    if output.report is not None:
        from suffice.kv.eval.report_sections import answer_page

        answer_page(result, report, command_line()).save(output.report)


def _print_answer(result: Answer, max_new_tokens: int) -> None:
    """Print the answer and, if it was compared, that of the full cache and how far the two caches are apart."""
    stopped = f"Stopped at --max-new-tokens {max_new_tokens}."
    print_text(result.answer)
    if not result.is_complete:
        out.print(f"[dim]{stopped}[/]", highlight=False)
    if result.differs is None:
        return
    if result.differs:
        out.print("\n[bold]Full cache:[/]")
        print_text(str(result.full_answer))
        if not result.full_is_complete:
            out.print(f"[dim]{stopped}[/]", highlight=False)
    style = "bold yellow" if result.differs else "dim"
    label = "Warning: " if result.differs else ""
    out.print(f"[{style}]{label}{result.comparison()}[/]", highlight=False)
