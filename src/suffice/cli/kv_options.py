"""Groups of options that the commands of `suffice kv` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from suffice.cli.options import split_commas
from suffice.kv.hf.loading import ModelSource
from suffice.kv.hf.packaged_models import DEFAULT_MODEL
from suffice.kv.policy.registry import DEFAULT_POLICY


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

    def source(self) -> ModelSource:
        """Return the source of the model."""
        return ModelSource(None if self.model == DEFAULT_MODEL else self.model, self.device, self.dtype, self.attn)


@dataclass(frozen=True)
class CacheOptions:
    """One compressed cache."""

    panel: ClassVar[str] = "Cache"

    policy: Annotated[str, typer.Option(help="Eviction policy. `suffice kv policies` lists them.")] = DEFAULT_POLICY
    budget: Annotated[
        str,
        typer.Option(help="Entries to keep: a number of tokens (500), or a fraction of the tokens seen (0.25, 25%)."),
    ] = "25%"
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Split of the budget over layers and heads: equal, pyramid, adakv, marginal or profile. "
            "Default: the policy's own."
        ),
    ] = None
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


@dataclass(frozen=True)
class CacheGridOptions:
    """All combinations of policies, allocations and budgets."""

    panel: ClassVar[str] = "Caches"

    policies: Annotated[str, typer.Option(help="Policies, separated by commas. `suffice kv policies` lists them.")]
    allocations: Annotated[
        str, typer.Option(help="Allocations, separated by commas; own is the policy's own allocation.")
    ]
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas: numbers of tokens, or fractions.")]

    def parsed_budgets(self) -> list[float]:
        """Return the budgets as numbers."""
        return [parse_budget(text, "--budgets") for text in split_commas(self.budgets)]


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
            return float(text[:-1]) / 100
        return float(text) if any(mark in text for mark in ".e") else int(text)
    except ValueError:
        raise ValueError(
            f"{option} must be a number of tokens (500), a fraction (0.25) or a percentage (25%), got {text!r}"
        ) from None
