"""`suffice kv …`: generate from a compressed cache, measure what is lost, and choose policy and budget."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from suffice.arguments import check_optional_int
from suffice.cli.console import out, print_json, print_table, print_text, step_progress
from suffice.cli.kv_evaluate import compare_caches, tune_budget
from suffice.cli.kv_generate import generate
from suffice.cli.kv_options import ModelOptions
from suffice.cli.kv_tables import policy_parts_table, policy_table, profile_table
from suffice.cli.options import JsonOption, expand_options
from suffice.files import read_text
from suffice.kv.budget.profile import MIN_TOKENS
from suffice.kv.policy.names import ALLOCATION_NAMES, DEFAULT_POLICY

app = typer.Typer(
    help="Compress the KV cache of a language model, and measure what is lost.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("generate")(generate)


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
            ValueError: more than one of the ways to get a text is given, the file cannot be read or is empty, or there
                are too few tokens.

        """
        ways = {
            "--text-file": self.text_file is not None,
            "--random": self.random,
            "--from-weights": self.from_weights,
        }
        if len(given := [option for option, is_given in ways.items() if is_given]) > 1:
            raise ValueError(f"only one of {', '.join(ways)} may be given, got {' and '.join(given)}")
        check_optional_int("--tokens", self.tokens, MIN_TOKENS)
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
    print_table(profile_table(profile))
    print_text(f"Profile: {file} ({seconds:.1f} s)")


app.command("compare")(compare_caches)
app.command("tune")(tune_budget)


@app.command("policies")
def list_policies(
    long: Annotated[bool, typer.Option("--long", help="Show the parts that each policy is made of.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the policies: when to use each, and its paper; and the allocations."""
    names = ", ".join(ALLOCATION_NAMES)
    if long or as_json:
        from suffice.kv.policy.registry import allocations, policies  # imports torch, which takes seconds

        descriptions = [policy.describe() for policy in policies().values()]
        splits = {name: str(allocation) for name, allocation in allocations().items()}
        if as_json:
            print_json({"default": DEFAULT_POLICY, "policies": descriptions, "allocations": splits})
            return
        print_table(policy_parts_table(descriptions))
        names = ", ".join(name if name == text else f"{name} ({text})" for name, text in splits.items())
    else:
        print_table(policy_table())
    out.print(f"The default is {DEFAULT_POLICY}. Papers have their numbers at arXiv or OpenReview.", highlight=False)
    out.print(f"Allocations that any policy can use: {names}.", highlight=False)
    if not long:
        out.print(
            "Details: suffice kv policies --long. Your own prompts decide best: suffice kv tune.", highlight=False
        )
