"""Base class of all weights, and their sums and products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_number
from suffice.gpu import async_tensor
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.weight_state import WeightState


class Weights(ABC):
    """Base class of all weights.

    A subclass defines `log_weights`. It should be a frozen dataclass, so that it can be printed, compared and hashed.

    Example:
        >>> from dataclasses import dataclass
        >>> from suffice.kv.policy.weights import Weights
        >>> @dataclass(frozen=True)
        ... class ValueNorm(Weights):
        ...     def log_weights(self, stats):
        ...         return stats.values32.norm(dim=-1).log()

    """

    @abstractmethod
    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return log w, float32 [batch, num_key_value_heads, entries]; values at padding are ignored."""

    @property
    def num_queries_needed(self) -> int | None:
        """Number of newest queries that the weight depends on; None for all queries since the last eviction."""
        return 0

    @property
    def is_stateful(self) -> bool:
        """Whether the weight also depends on queries from before the last eviction."""
        return False

    @property
    def half_lives(self) -> frozenset[float]:
        """Half-lives of the queries' moments that the state contains."""
        return frozenset()

    @property
    def needs_rotary(self) -> bool:
        """Whether the weight needs the rotary embedding of the model, to rotate queries or keys back."""
        return False

    @property
    def replay_kinds(self) -> frozenset[str]:
        """The kinds of scores from a replay that the weight depends on; see `suffice.kv.policy.weights.replay`."""
        return frozenset()

    def next_state(self, stats: AttentionStats) -> WeightState:
        """Return the state after these queries. At the layer's next eviction, it is `stats.state`."""
        del stats
        return WeightState()

    def __add__(self, other: Weights) -> Sum:
        return Sum((*_terms(self), *_terms(other)))

    def __rmul__(self, factor: float) -> Sum:
        return Sum(tuple((factor * own, term) for own, term in _terms(self)))

    def __mul__(self, other: Weights) -> Product:
        return Product((self, other))


def _terms(weights: Weights) -> tuple[tuple[float, Weights], ...]:
    return weights.terms if isinstance(weights, Sum) else ((1.0, weights),)


class CombinedWeights(Weights):
    """Base class of weights that are computed from other weights."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Weights, ...]:
        """The combined weights."""

    @property
    def num_queries_needed(self) -> int | None:
        """Largest number of newest queries that a part depends on; None if a part depends on all."""
        counts = [part.num_queries_needed for part in self.parts]
        known = [count for count in counts if count is not None]
        return None if len(known) < len(counts) else max(known)

    @property
    def is_stateful(self) -> bool:
        """Whether a part depends on queries from before the last eviction."""
        return any(part.is_stateful for part in self.parts)

    @property
    def half_lives(self) -> frozenset[float]:
        """Half-lives of all parts."""
        return frozenset().union(*(part.half_lives for part in self.parts))

    @property
    def needs_rotary(self) -> bool:
        """Whether a part needs the rotary embedding of the model."""
        return any(part.needs_rotary for part in self.parts)

    @property
    def replay_kinds(self) -> frozenset[str]:
        """The kinds of scores that the parts depend on."""
        return frozenset().union(*(part.replay_kinds for part in self.parts))

    def next_state(self, stats: AttentionStats) -> WeightState:
        """Return the union of the parts' states."""
        state = WeightState()
        for part in self.parts:
            state = state.merge(part.next_state(stats))
        return state


@dataclass(frozen=True)
class Sum(CombinedWeights):
    """w = Σ_j c_j w_j / mean(w_j). The mean over the entries of a head brings all terms to the same scale.

    Args:
        terms: pairs (c_j, w_j).

    Raises:
        ValueError: a factor c_j is not a positive finite number.

    """

    terms: tuple[tuple[float, Weights], ...]

    def __post_init__(self) -> None:
        for factor, _ in self.terms:
            check_number("factor of a weight", factor, above=0)

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return log w, [batch, num_key_value_heads, entries]."""
        terms = torch.stack([stats.mask_invalid(term.log_weights(stats)) for _, term in self.terms])
        total = terms.logsumexp(-1, keepdim=True)
        # A term may be 0 for all entries, for example window attention if the text is shorter than the window.
        terms -= total.masked_fill_(total == -torch.inf, 0)
        terms += async_tensor([math.log(factor) for factor, _ in self.terms], stats.device)[:, None, None, None]
        return terms.logsumexp(0)

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The terms without their factors."""
        return tuple(term for _, term in self.terms)

    def __str__(self) -> str:
        return " + ".join(f"{'' if factor == 1 else f'{factor:g} '}{term}" for factor, term in self.terms)


@dataclass(frozen=True)
class Product(CombinedWeights):
    """w = Π_j w_j.

    Args:
        factors: the weights w_j.

    """

    factors: tuple[Weights, ...]

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return log w, [batch, num_key_value_heads, entries]."""
        total = self.factors[0].log_weights(stats)
        for factor in self.factors[1:]:
            total = total + factor.log_weights(stats)
        return total

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The factors."""
        return self.factors

    def __str__(self) -> str:
        return " × ".join(str(factor) for factor in self.factors)
