"""Batch composition: how many positives each mini-batch of edges contains (arXiv 2604.25978).

A layer that normalizes over the edge batch gives the model information about the fraction of positives in it. `Fixed`
is what nearly every training loop does. `Separate` scores positives and negatives in separate passes. `Random` is the
correction: it draws a new fraction for every batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suffice.arguments import check_int, check_number, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BatchCounts = tuple[int, int]  # (positives, negatives) of one batch

_KINDS = ("fixed", "separate", "random")
_ACCEPTED = "fixed:FRACTION, separate or random:LOW,HIGH"  # texts of compositions


class Composition(ABC):
    """Base class of all compositions. A subclass implements `plan`."""

    batches_per_step: int = 1
    """Number of batches whose gradients are averaged for one optimizer step."""

    @abstractmethod
    def plan(self, num_positives: int, batch_size: int, generator: torch.Generator) -> list[BatchCounts]:
        """Split the positives of an epoch into batches.

        Args:
            num_positives: positive edges of the epoch; each is used exactly once.
            batch_size: edges in a batch. The last batches may be smaller.
            generator: source of all random choices.

        Returns:
            number of positives and of negatives in each batch.

        Raises:
            ValueError: an argument is out of range.

        """


@dataclass(frozen=True)
class Fixed(Composition):
    """The same fraction of positives in every batch.

    Args:
        fraction: fraction of positives, above 0 and below 1.

    Raises:
        ValueError: `fraction` is out of range.

    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, above=0, below=1)

    def plan(self, num_positives: int, batch_size: int, generator: torch.Generator) -> list[BatchCounts]:
        """Return equal batches; the last one has the same fraction and may be smaller."""
        _check_plan_arguments(num_positives, batch_size)
        positives = min(max(round(self.fraction * batch_size), 1), batch_size - 1)
        negatives = batch_size - positives
        full_batches, rest = divmod(num_positives, positives)
        batches = [(positives, negatives)] * full_batches
        if rest:
            batches.append((rest, max(1, round(rest * negatives / positives))))
        return batches

    def __str__(self) -> str:
        return f"fixed:{self.fraction:g}"


@dataclass(frozen=True)
class Separate(Composition):
    """Pure batches: one of positives and one of negatives, which together make up one optimizer step."""

    batches_per_step: int = 2

    def plan(self, num_positives: int, batch_size: int, generator: torch.Generator) -> list[BatchCounts]:
        """Return pairs of pure batches of equal size."""
        _check_plan_arguments(num_positives, batch_size)
        full_batches, rest = divmod(num_positives, batch_size)
        sizes = [batch_size] * full_batches + [rest] * (rest > 0)
        if rest == 1 and full_batches and batch_size > 2:
            # Avoid a batch of one edge: BatchNorm cannot train on it.
            sizes[-2:] = [batch_size - 1, 2]
        return [counts for size in sizes for counts in ((size, 0), (0, size))]

    def __str__(self) -> str:
        return "separate"


@dataclass(frozen=True)
class Random(Composition):
    """A new fraction of positives for every batch, drawn from U(low, high): the correction of arXiv 2604.25978.

    In distributed training, all ranks must use the same seed, so that they draw the same fractions. SyncBatchNorm would
    average different fractions out.

    Args:
        low: smallest fraction of positives.
        high: largest fraction of positives.

    Raises:
        ValueError: the bounds are out of range.

    """

    low: float = 0.05
    high: float = 0.95

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high)
        if not 0 <= self.low <= self.high <= 1 or self.high == 0:
            raise ValueError(
                f"low and high must satisfy 0 <= low <= high <= 1 and high > 0, got {self.low} and {self.high}"
            )

    def plan(self, num_positives: int, batch_size: int, generator: torch.Generator) -> list[BatchCounts]:
        """Return batches until all positives are used; the last one has the drawn fraction and may be smaller."""
        _check_plan_arguments(num_positives, batch_size)
        if round(self.high * batch_size) < 1:
            raise ValueError(
                f"batch_size must be large enough for at least one positive with high={self.high}, got {batch_size}"
            )
        import torch  # takes seconds; the command line checks compositions without it

        batches: list[BatchCounts] = []
        remaining = num_positives
        while remaining:
            uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
            positives = round((self.low + (self.high - self.low) * uniform) * batch_size)
            negatives = batch_size - positives
            if positives > remaining:
                # Avoid a batch of one edge: BatchNorm cannot train on it.
                negatives = max(round(remaining * negatives / positives), int(remaining == 1))
                positives = remaining
            batches.append((positives, negatives))
            remaining -= positives
        return batches

    def __str__(self) -> str:
        return f"random:{self.low:g},{self.high:g}"


def parse_composition(text: str, argument: str = "composition") -> Composition:
    """Return the composition that a text describes: `fixed:0.5`, `separate` or `random:0.05,0.95`.

    Args:
        text: the composition.
        argument: argument or option that gave it, for the error.

    Raises:
        ValueError: the text describes no composition.

    Example:
        >>> parse_composition("random:0.3,0.7")
        Random(low=0.3, high=0.7)

    """
    kind, _, numbers = text.partition(":")
    try:
        values = [float(value) for value in numbers.split(",")] if numbers else []
        if kind == "fixed" and len(values) <= 1:
            return Fixed(*values)
        if kind == "random" and len(values) in (0, 2):
            return Random(*values)
    except ValueError as error:
        raise ValueError(f"{argument} must be {_ACCEPTED}, got {text!r} ({error})") from None
    if kind == "separate" and not numbers:
        return Separate()
    hint = did_you_mean(kind, _KINDS) if kind not in _KINDS else ""
    raise ValueError(f"{argument} must be {_ACCEPTED}, got {text!r}{hint}")


def balanced_weights(labels: Tensor) -> Tensor:
    """Return loss weights that give both classes the same total weight in a batch; their mean is 1.

    Args:
        labels: 1 for positives, 0 for negatives, [edges].

    Returns:
        weights, float32 [edges]; all 1 if only one class is present.

    Raises:
        ValueError: `labels` is empty or contains another value.

    Example:
        >>> import torch
        >>> balanced_weights(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([2.0000, 0.6667, 0.6667, 0.6667])

    """
    import torch

    is_positive = labels == 1
    if labels.numel() == 0 or not bool((is_positive | (labels == 0)).all()):
        raise ValueError(f"labels must be a non-empty tensor of 0 and 1, got the values {labels.unique().tolist()}")
    num_positives = int(is_positive.sum())
    positive_weight, negative_weight = class_weights(num_positives, labels.numel() - num_positives)
    return torch.where(is_positive, positive_weight, negative_weight).to(torch.float32)


def class_weights(num_positives: int, num_negatives: int) -> tuple[float, float]:
    """Return the weight of each positive and of each negative under which both classes weigh the same."""
    if not num_positives or not num_negatives:
        return 1.0, 1.0
    half = (num_positives + num_negatives) / 2
    return half / num_positives, half / num_negatives


def _check_plan_arguments(num_positives: int, batch_size: int) -> None:
    check_int("num_positives", num_positives, 1)
    check_int("batch_size", batch_size, 2)
