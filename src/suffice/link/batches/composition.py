"""How many positives each mini-batch of edges holds (arXiv 2604.25978).

A layer that normalises over the edge batch shows a model the share of positives in it. `Fixed` is what
nearly every trainer does, `Separate` scores positives and negatives in passes of their own, and `Random`,
the correction, draws the share afresh at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Counts = tuple[int, int]


class Composition(ABC):
    """Base of all compositions; a new one defines `plan`."""

    passes: int = 1  # batches that make up one optimiser step

    @abstractmethod
    def plan(self, positives: int, batch_size: int, generator: torch.Generator) -> list[Counts]:
        """Split an epoch into batches.

        Args:
            positives: positive edges of the epoch, each to be used exactly once.
            batch_size: edges in a batch; the last ones may hold fewer.
            generator: source of every random choice.

        Returns:
            (positives, negatives) of each batch.

        Raises:
            ValueError: an argument is out of range.

        """


@dataclass(frozen=True)
class Fixed(Composition):
    """The same fraction of positives in every batch."""

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}; accepted: above 0 and below 1")

    def plan(self, positives: int, batch_size: int, generator: torch.Generator) -> list[Counts]:
        """Return equal batches; the last keeps the fraction with what is left."""
        _check(positives, batch_size)
        own = min(max(round(self.fraction * batch_size), 1), batch_size - 1)
        full, rest = divmod(positives, own)
        batches = [(own, batch_size - own)] * full
        if rest:
            batches.append((rest, max(1, round(rest * (batch_size - own) / own))))
        return batches

    def __str__(self) -> str:
        return f"fixed:{self.fraction:g}"


@dataclass(frozen=True)
class Separate(Composition):
    """Pure batches: a pass of positives, then a pass of negatives, together one optimiser step."""

    passes: int = 2

    def plan(self, positives: int, batch_size: int, generator: torch.Generator) -> list[Counts]:
        """Return pairs of pure batches of the same size."""
        _check(positives, batch_size)
        batches: list[Counts] = []
        full, rest = divmod(positives, batch_size)
        sizes = [batch_size] * full + [rest] * (rest > 0)
        if rest == 1 and full and batch_size > 2:
            # Never a single edge: batch normalisation can't train on one.
            sizes[-2:] = [batch_size - 1, 2]
        for size in sizes:
            batches += [(size, 0), (0, size)]
        return batches

    def __str__(self) -> str:
        return "separate"


@dataclass(frozen=True)
class Random(Composition):
    """A fraction drawn from U(low, high) for every batch (arXiv 2604.25978, the correction).

    Ranks of a distributed run must share the draw, or synchronised statistics average it away: give every
    rank the same seed.
    """

    low: float = 0.05
    high: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or self.high == 0:
            raise ValueError(f"low, high are {self.low}, {self.high}; accepted: 0 ≤ low ≤ high ≤ 1, high > 0")

    def plan(self, positives: int, batch_size: int, generator: torch.Generator) -> list[Counts]:
        """Return batches until the positives are used up; the last keeps its fraction with what is left."""
        _check(positives, batch_size)
        if round(self.high * batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: large enough for high={self.high} of it")
        batches: list[Counts] = []
        left = positives
        while left:
            draw = float(torch.rand((), generator=generator, dtype=torch.float64))
            own = round((self.low + (self.high - self.low) * draw) * batch_size)
            if own <= left:
                batches.append((own, batch_size - own))
            else:
                # Never a single edge: batch normalisation can't train on one.
                batches.append((left, max(round(left * (batch_size - own) / own), int(left == 1))))
            left -= batches[-1][0]
        return batches

    def __str__(self) -> str:
        return f"random:{self.low:g},{self.high:g}"


def parse(text: str) -> Composition:
    """Return the composition that a text names: `fixed:0.5`, `separate`, `random:0.05,0.95`.

    Raises:
        ValueError: the text names none.

    Example:
        >>> parse("random:0.3,0.7")
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
        raise ValueError(f"composition is {text!r}: {error}") from None
    if kind == "separate" and not numbers:
        return Separate()
    raise ValueError(f"composition is {text!r}; accepted: fixed:FRACTION, separate, random:LOW,HIGH")


def balanced_weights(labels: Tensor) -> Tensor:
    """Weights under which each class present counts the same in a batch; their mean is 1.

    Args:
        labels: 1 for positives, 0 for negatives, [edges].

    Returns:
        float32 [edges].

    Raises:
        ValueError: a label is neither 0 nor 1, or there are none.

    Example:
        >>> balanced_weights(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([2.0000, 0.6667, 0.6667, 0.6667])

    """
    positive = labels == 1
    if labels.numel() == 0 or not bool((positive | (labels == 0)).all()):
        raise ValueError(f"labels are {labels.unique().tolist()}; accepted: at least one, each 0 or 1")
    ones = int(positive.sum())
    first, second = class_weights(ones, labels.numel() - ones)
    return torch.where(positive, first, second).to(torch.float32)


def class_weights(positives: int, negatives: int) -> tuple[float, float]:
    """Return the weight of a positive and of a negative under which both classes count the same."""
    if not positives or not negatives:
        return 1.0, 1.0
    half = (positives + negatives) / 2
    return half / positives, half / negatives


def _check(positives: int, batch_size: int) -> None:
    if positives < 1:
        raise ValueError(f"positives is {positives}; accepted: at least 1")
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; accepted: at least 2")
