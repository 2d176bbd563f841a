"""Weights, their sums and products: how likely each cached token is to be read by a future query."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.policy.attention_stats import Signals


class Weights(ABC):
    """Base of all weights; a new one defines `log`, as a frozen dataclass so that it prints and compares."""

    @property
    def observed(self) -> int | None:
        """How many of the newest queries the weight looks at; None for all since the last eviction."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether what queries before the last eviction showed counts too."""
        return False

    @abstractmethod
    def log(self, signals: Signals) -> Tensor:
        """Return log weights [batch, kv_heads, tokens], float32; what stands on padding is ignored."""

    def __add__(self, other: Weights) -> Sum:
        return Sum((*_terms(self), *_terms(other)))

    def __rmul__(self, factor: float) -> Sum:
        return Sum(tuple((factor * old, term) for old, term in _terms(self)))

    def __mul__(self, other: Weights) -> Product:
        return Product((self, other))


def _terms(weights: Weights) -> tuple[tuple[float, Weights], ...]:
    return weights.terms if isinstance(weights, Sum) else ((1.0, weights),)


class Joined(Weights):
    """Base of weights that are made of others."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Weights, ...]:
        """What it is made of."""

    @property
    def observed(self) -> int | None:
        """The most that any part looks at; None, which stands for all queries, is more than any."""
        counts = [part.observed for part in self.parts]
        known = [count for count in counts if count is not None]
        return None if len(known) < len(counts) else max(known)

    @property
    def remembers(self) -> bool:
        """Whether any part does."""
        return any(part.remembers for part in self.parts)


@dataclass(frozen=True)
class Sum(Joined):
    """Σ c_j w_j / mean(w_j): terms of different scales, each divided by its mean over the head's tokens."""

    terms: tuple[tuple[float, Weights], ...]

    def __post_init__(self) -> None:
        for factor, _ in self.terms:
            if not factor > 0 or math.isinf(factor):
                raise ValueError(f"factor of a weight is {factor}; accepted: a positive number")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the sum."""
        parts: list[Tensor] = []
        for factor, term in self.terms:
            own = signals.masked(term.log(signals))
            total = own.logsumexp(-1, keepdim=True)
            # A term may be 0 everywhere, as a window's attention to a text that is shorter than the window.
            parts.append(own - total.masked_fill(total == float("-inf"), 0) + math.log(factor))
        return torch.stack(parts).logsumexp(0)

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The terms without their factors."""
        return tuple(term for _, term in self.terms)

    def __str__(self) -> str:
        return " + ".join(f"{'' if f == 1 else f'{f:g} '}{t}" for f, t in self.terms)


@dataclass(frozen=True)
class Product(Joined):
    """The product of weights."""

    factors: tuple[Weights, ...]

    def log(self, signals: Signals) -> Tensor:
        """Return the sum of the factors' logs."""
        total = self.factors[0].log(signals)
        for factor in self.factors[1:]:
            total = total + factor.log(signals)
        return total

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The factors."""
        return self.factors

    def __str__(self) -> str:
        return " × ".join(str(factor) for factor in self.factors)
