"""`suffice kv …`: generate from a compressed cache, list the policies."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from suffice.cli.command_line import command_line
from suffice.cli.console import out, print_json, progress
from suffice.cli.kv_measure import compare_caches, tune_budget
from suffice.cli.kv_options import AttnOption, DeviceOption, DtypeOption, ModelOption, parse_budget
from suffice.kv.budget.protection import Protection
from suffice.kv.hf.default_model import DEFAULT_MODEL
from suffice.kv.hf.loading import load_model
from suffice.kv.policy.registry import DEFAULT_POLICY, allocations, get_allocation, get_policy, policies
from suffice.report import save_figure

app = typer.Typer(help="Keep the KV cache entries that carry the most information.", no_args_is_help=True)

# Commands that are many lines themselves have files of their own.
app.command("compare")(compare_caches)
app.command("tune")(tune_budget)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The prompt; without it, --prompt-file or standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    question: Annotated[str | None, typer.Option(help="Asked of the prompt, which is then a document.")] = None,
    aware: Annotated[
        bool,
        typer.Option("--aware/--agnostic", help="Is the question seen before eviction, or only after it?"),
    ] = True,
    policy: Annotated[str, typer.Option(help="`suffice kv policies` lists them.")] = DEFAULT_POLICY,
    budget: Annotated[str, typer.Option(help="Tokens (500) or a fraction (0.25, 25%) of the prompt.")] = "0.25",
    allocation: Annotated[
        str | None, typer.Option(help="Split of the budget over heads: equal, pyramid, adakv, marginal or profile.")
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Read the prompt so many tokens at a time; never hold more than that + budget."),
    ] = None,
    interval: Annotated[int | None, typer.Option(help="Evict every so many tokens of the answer too.")] = None,
    rerotate: Annotated[
        bool,
        typer.Option("--rerotate", help="Rotate kept keys together, for prompts longer than the model's window."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    attn: AttnOption = "sdpa",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also show what each layer kept.")] = False,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Write a page: the answer, and which words and heads kept what."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the entries kept by layer and head (svg, png).")] = None,
) -> None:
    """Answer greedily from a part of the prompt's KV cache."""
    # Imported here: transformers takes seconds, which other commands need not wait for.
    from suffice.kv.eval.answer import answer
    from suffice.kv.eval.generation import check_chunk_size

    check_chunk_size(chunk)
    chosen = get_policy(policy)
    split = None if allocation is None else get_allocation(allocation)
    allowed = parse_budget(budget)
    Protection().check(allowed)
    text = _read_prompt(prompt, prompt_file)
    if not text.strip():
        raise ValueError("the prompt is empty; accepted: some text")
    with progress() as say:
        network, tokenizer = load_model(model, device=device, dtype=dtype, attn_implementation=attn, on_progress=say)
        say(f"generating with {chosen.name}, budget {budget}")
        result, report = answer(
            network,
            tokenizer,
            text,
            question,
            policy=chosen,
            budget=allowed,
            aware=aware,
            max_new_tokens=max_new_tokens,
            allocation=split,
            chunk_size=chunk,
            interval=interval,
            rerotate=rerotate,
        )
    if figure is not None:
        save_figure(report.figure(), str(figure))
    if report_file is not None:
        from suffice.kv.eval.report_sections import answer_page

        answer_page(result, report, command_line()).save(report_file)
    if as_json:
        print_json({"model": model, **result.to_dict()})
        return
    out.print(result.answer, markup=False, highlight=False)
    out.print(f"[dim]{report}, {result.seconds:.1f} s ({result.policy}, budget {budget})[/]", highlight=False)
    if layers:
        out.print(report.table())


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --prompt-file are both given; accepted: one of them")
    if prompt is not None:
        return prompt
    if file is not None:
        return _read_file("--prompt-file", file)
    if sys.stdin.isatty():
        raise ValueError("no prompt; accepted: --prompt TEXT, --prompt-file FILE, or text on standard input")
    return sys.stdin.read()


def _read_file(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} is {str(file)!r}, which can't be read as text: {error}") from None


@app.command("calibrate")
def calibrate_model(
    text_file: Annotated[Path | None, typer.Option(help="Measure on this text; without it, Python's manual.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Measure on random tokens in place of text.")] = False,
    from_weights: Annotated[
        bool, typer.Option("--from-weights", help="Run nothing: estimate it from slow rotary pairs of the weights.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text, which is read twice.")] = None,
    seed: Annotated[int, typer.Option(help="Of random tokens.")] = 0,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Where to write the profile; without it, where caches look for it.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    attn: AttnOption = "sdpa",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure once how much of its cache each head of a model reads: what `--allocation profile` follows."""
    from suffice.kv.budget.calibration import calibrate
    from suffice.kv.budget.profile import write_profile
    from suffice.kv.budget.profile_from_weights import profile_from_weights

    ways = {"--random": random, "--from-weights": from_weights, "--text-file": text_file is not None}
    if len(given := [name for name, asked in ways.items() if asked]) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; accepted: one of them")
    text = None if text_file is None else _read_file("--text-file", text_file)
    start = time.perf_counter()
    with progress() as say:
        network, tokenizer = load_model(model, device=device, dtype=dtype, attn_implementation=attn, on_progress=say)
        say("measuring the head profile")
        if from_weights:
            profile = profile_from_weights(network)
        else:
            profile = calibrate(network, None if random else tokenizer, text, tokens=tokens, seed=seed)
    place = write_profile(profile, out_file)
    seconds = time.perf_counter() - start
    if as_json:
        facts = {"model": profile.model, "source": profile.source, "attention": profile.attention}
        print_json({**facts, "file": str(place), "seconds": seconds})
        return
    table = Table(title=f"What each head reads of its cache: {profile.source}")
    for column in ("layer", "least", "mean", "most"):
        table.add_column(column, justify="right")
    for layer, heads in enumerate(profile.attention):
        table.add_row(str(layer), *(f"{x:.4f}" for x in (min(heads), sum(heads) / len(heads), max(heads))))
    out.print(table)
    out.print(f"written to {place}, {seconds:.1f} s", highlight=False, soft_wrap=True)


@app.command("policies")
def list_policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the policies: what each takes for weights, directions and estimator of the capacity."""
    described = [policy.describe() for policy in policies().values()]
    if as_json:
        splits = {name: str(split) for name, split in allocations().items()}
        print_json({"default": DEFAULT_POLICY, "policies": described, "allocations": splits})
        return
    table = Table(title="Policies: weights × directions × estimator")
    for column in ("name", "weights", "directions", "estimator", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "paper"))
    for parts in described:
        extra = [parts[part] for part in ("selection", "allocation") if parts[part] not in ("top", "equal")]
        estimator = ", ".join((parts["estimator"], *extra))
        table.add_row(parts["name"], parts["weights"], parts["directions"], estimator, parts["paper"])
    out.print(table)
    splits = ", ".join(f"{name} ({split})" for name, split in allocations().items())
    out.print(f"The default is {DEFAULT_POLICY}. Papers are arXiv numbers.", highlight=False)
    out.print(f"Allocations, with any policy: {splits}.", highlight=False)
