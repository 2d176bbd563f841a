"""Groups of options that the commands of `suffice kv` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from suffice.arguments import check_choice, did_you_mean
from suffice.cli.options import split_commas
from suffice.kv.budget.memory_limit import parse_memory
from suffice.kv.budget.protection import Protection
from suffice.kv.hf.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS
from suffice.kv.policy.names import (
    ALLOCATION_NAMES,
    DEFAULT_POLICY,
    DEFAULT_REPLAY_POLICY,
    OWN_ALLOCATION,
    POLICY_NAMES,
    check_name,
)
from suffice.kv.storage.quantization import Bits, shortest_bits

if TYPE_CHECKING:
    from suffice.kv.hf.loading import ModelSource
    from suffice.kv.policy.policy import Policy

AwareOption = Annotated[
    bool,
    typer.Option("--aware/--agnostic", help="Evict after the question is seen (aware), or before it (agnostic)."),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which language model to load, and how."""

    panel: ClassVar[str] = "Model"

    model: Annotated[str, typer.Option(help="Hugging Face model id, local folder, or gemma3-270m.")] = DEFAULT_MODEL
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:0.")] = "cpu"
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16 or float16.")] = "auto"
    attn: Annotated[str, typer.Option(help="Attention implementation, such as sdpa, eager or flash_attention_2.")] = (
        "sdpa"
    )

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        is_path = self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if is_path and not Path(self.model).is_dir():
            raise ValueError(
                f"--model must be a folder with a model or a known model id, got {self.model!r}, which is no folder"
            )
        is_known = self.model in PACKAGED_MODELS or "/" in self.model or Path(self.model).exists()
        if not is_known and (hint := did_you_mean(self.model, PACKAGED_MODELS, str.lower)):
            raise ValueError(f"--model must be a folder with a model or a known model id, got {self.model!r}{hint}")
        check_choice("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))

    def source(self) -> ModelSource:
        """Return the source of the model."""
        from suffice.kv.hf.loading import ModelSource

        return ModelSource(None if self.model == DEFAULT_MODEL else self.model, self.device, self.dtype, self.attn)


@dataclass(frozen=True)
class CacheOptions:
    """One compressed cache."""

    panel: ClassVar[str] = "Cache"

    policy: Annotated[str, typer.Option(help="Eviction policy. `suffice kv policies` lists them.")] = DEFAULT_POLICY
    budget: Annotated[
        str | None,
        typer.Option(
            help="Entries to keep: a number of tokens (500), or a fraction of the tokens seen (0.25, 25%). "
            "Default: 25%, unless --memory is given."
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="Limit on the bytes, instead of --budget: a fraction of the full cache (0.1, 10%), or bytes (2GiB). "
            "The number of entries and their bits follow from it."
        ),
    ] = None
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Split of the budget over layers and heads: equal, pyramid, adakv, marginal or profile. "
            "Default: the policy's own."
        ),
    ] = None
    bits: Annotated[
        str,
        typer.Option(
            help="Bits of the stored numbers: 8, 5, 4, 3 or 2, or two for keys and values (5,4). none: the model's "
            "dtype, or bits that follow from --memory."
        ),
    ] = "none"
    chunk_size: Annotated[
        int | None, typer.Option(help="Read the prompt in chunks of this many tokens, and evict after each chunk.")
    ] = None
    interval: Annotated[int | None, typer.Option(help="Number of generated tokens between further evictions.")] = None
    rerotate: Annotated[
        bool,
        typer.Option(
            "--rerotate",
            help="Rotate kept keys to consecutive positions, which allows prompts longer than the context window.",
        ),
    ] = False

    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="Score the entries in a second pass, in which the model repeats the prompt (policy capkv-replay). "
            "This takes several times as long, and keeps more of what matters if the budget is small.",
        ),
    ] = False

    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Give the kept entries weights and values with which they reproduce the attention over all entries.",
        ),
    ] = False

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        check_name("policy", self.policy, POLICY_NAMES)
        if self.allocation is not None:
            check_name("allocation", self.allocation, ALLOCATION_NAMES)

    def parsed_policy(self) -> Policy:
        """Return the policy.

        Raises:
            ValueError: the policy is not known, or `--replay` is given with a policy that does not replay the prompt.

        """
        from suffice.kv.policy.registry import get_policy, policies

        policy = get_policy(self.policy)
        if not self.replay or policy.needs_replay:
            return policy
        if self.policy != DEFAULT_POLICY:
            raise ValueError(
                f"--replay must be given without --policy, or with one of {', '.join(policies(replay=True))}, got "
                f"--policy {self.policy}"
            )
        return get_policy(DEFAULT_REPLAY_POLICY)

    def parsed_size(self) -> tuple[float | None, float | None]:
        """Return the budget and the limit on the bytes, of which one is None.

        Raises:
            ValueError: one of them is not accepted, both are given, or `--memory` is given with `--rerotate`.

        """
        if self.memory is None:
            budget = parse_budget(self.budget or "25%")
            Protection().check(budget)
            return budget, None
        memory = parse_memory_option(self.memory)
        if self.budget is not None:
            raise ValueError(f"only one of --budget and --memory may be given, got {self.budget!r} and {self.memory!r}")
        if self.rerotate:
            raise ValueError(f"--memory must not be given with --rerotate, got {self.memory!r}")
        return None, memory

    def parsed_bits(self) -> Bits | None:
        """Return the number of bits, or None if entries are not quantized.

        Raises:
            ValueError: the option is not a number of bits, or is given with `--rerotate`.

        """
        bits = parse_bits_option(self.bits)
        if bits is not None and self.rerotate:
            raise ValueError(f"--bits must be none with --rerotate, got {self.bits!r}")
        return bits


@dataclass(frozen=True)
class CacheGridOptions:
    """All combinations of policies, allocations, budgets (or limits on the bytes), numbers of bits, and repair."""

    panel: ClassVar[str] = "Caches"

    policies: Annotated[
        str | None,
        typer.Option(
            help="Policies, separated by commas. `suffice kv policies` lists them. Default of tune: "
            f"{DEFAULT_POLICY} and, where the model allows it, {DEFAULT_REPLAY_POLICY}."
        ),
    ]
    allocations: Annotated[
        str, typer.Option(help="Allocations, separated by commas; own is the policy's own allocation.")
    ]
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Budgets, separated by commas: numbers of tokens, or fractions. Default, unless --memory is given: "
            "50%,25% (compare), none (tune)."
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="Limits on the bytes, instead of --budgets, separated by commas or spaces: fractions of the full "
            "cache (0.1, 10%), or bytes (2GiB). The number of entries and their bits follow from them. Default of "
            "tune, unless --budgets is given: 9 limits from 70% to 4%."
        ),
    ] = None
    bits: Annotated[
        str,
        typer.Option(
            help="Bits of the stored numbers, separated by spaces: none (the model's dtype), 8, 5, 4, 3 or 2, or two "
            "numbers for keys and values (4,2)."
        ),
    ] = "none"
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Also try every cache with repaired entries. Default: no; with tune and without --policies, yes, if "
            "the model allows it.",
        ),
    ] = None

    def __post_init__(self) -> None:  # checks what it can without importing torch, which takes seconds
        self.parsed_policies()
        for name in split_commas(self.allocations):
            check_name("allocation", name, (OWN_ALLOCATION, *ALLOCATION_NAMES))
        self.parsed_budgets()
        self.parsed_memory()
        self.parsed_bits()

    def parsed_policies(self) -> list[str] | None:
        """Return the names of the policies; None if they are not given.

        Raises:
            ValueError: a policy is not known.

        """
        if self.policies is None:
            return None
        names = split_commas(self.policies)
        for name in names:
            check_name("policy", name, POLICY_NAMES)
        return names

    def parsed_budgets(self) -> list[float] | None:
        """Return the budgets as numbers; None if they are not given.

        Raises:
            ValueError: a text is not a budget, or `--memory` is also given.

        """
        if self.budgets is None:
            return None
        if self.memory is not None:
            raise ValueError(
                f"only one of --budgets and --memory may be given, got {self.budgets!r} and {self.memory!r}"
            )
        return [parse_budget(text, "--budgets") for text in split_commas(self.budgets)]

    def parsed_memory(self) -> list[float] | None:
        """Return the limits on the bytes: fractions (float), or bytes (int); None if they are not given."""
        if self.memory is None:
            return None
        return [parse_memory_option(text) for text in self.memory.replace(",", " ").split()]

    def parsed_bits(self) -> list[Bits | None]:
        """Return the numbers of bits; None stands for the model's dtype."""
        return [parse_bits_option(text) for text in self.bits.split()]

    def parsed_repair(self) -> list[bool] | None:
        """Return whether kept entries are repaired, as a list with one value or both; None if it is not given."""
        if self.repair is None:
            return None
        return [False, True] if self.repair else [False]


def parse_budget(text: str, option: str = "--budget") -> float:
    """Return a budget as a number: `500` is a number of tokens, `0.25` and `25%` are fractions.

    Args:
        text: the budget.
        option: name of the option, for the error message.

    Raises:
        ValueError: the text is not a budget.

    """
    try:
        if text.endswith("%"):
            budget = float(text[:-1]) / 100
        else:
            budget = float(text) if any(mark in text for mark in ".e") else int(text)
    except ValueError:
        budget = 0
    is_too_large = isinstance(budget, float) and budget > 1
    if is_too_large or not budget > 0:
        largest = ". The largest fraction is 1.0 or 100%" if is_too_large else ""
        raise ValueError(
            f"{option} must be a number of tokens (500), a fraction (0.25) or a percentage (25%), got {text!r}{largest}"
        )
    return budget


def parse_memory_option(text: str) -> int | float:
    """Return a limit on the bytes: `0.1` and `10%` are fractions of the full cache, `2GiB` and `500` are bytes.

    Raises:
        ValueError: the text is not a limit.

    """
    try:
        if text.endswith("%"):
            return parse_memory(float(text[:-1]) / 100)
        is_fraction = "." in text and not text[-1].isalpha()
        return parse_memory(float(text) if is_fraction else text)
    except ValueError:
        raise ValueError(
            "--memory must be a fraction of the full cache (0.1, 10%), or a number of bytes such as 2GiB or 500MB, got "
            f"{text!r}"
        ) from None


def parse_bits_option(text: str) -> Bits | None:
    """Return the number of bits that an option gives: `4`, or `4,2` for keys and values; None for `none`.

    Raises:
        ValueError: the text is not a number of bits.

    """
    if text == "none":
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
        return shortest_bits(numbers[0] if len(numbers) == 1 else numbers)
    except (TypeError, ValueError):
        raise ValueError(
            "--bits must be none, 2, 3, 4, 5 or 8, or two of these numbers for keys and values, such as 5,4, got "
            f"{text!r}"
        ) from None
