"""A policy: weights × directions × estimator say what a token is worth, a selection which tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from retain.information import select_by_leverage, select_greedy
from retain.kv.allocation import Allocation, Equal, Protection
from retain.kv.directions import Directions, Value
from retain.kv.estimators import Estimator, Leverage, linear_weights, log_weights
from retain.kv.signals import Signals
from retain.kv.weights import Weights

_LOWEST = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class Budget:
    """What one layer may keep: tokens and protected positions of each row of the batch."""

    tokens: tuple[int, ...]
    protected: Tensor  # bool [batch, tokens]

    @property
    def width(self) -> int:
        """Most tokens that any row keeps."""
        return max(self.tokens)


class Selection(ABC):
    """Base of all selections; a new one defines `choose`."""

    @abstractmethod
    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the kept tokens, ascending: long [batch, kv_heads, budget.width].

        A row that keeps fewer than the widest has −1 in its first places.
        """


@dataclass(frozen=True)
class Top(Selection):
    """Keep the tokens of the highest scores."""

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the best of each row."""
        return highest(policy.score(signals), signals, budget)

    def __str__(self) -> str:
        return "top"


@dataclass(frozen=True)
class TwoStage(Selection):
    """Fill a share of the budget by weight alone, the rest by score (CriticalKV, 2502.03805)."""

    first: float = 0.5

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the best of each row in two stages."""
        stage = tuple(int(tokens * self.first) for tokens in budget.tokens)
        weights = log_weights(policy.weights, signals)
        scores = policy.score(signals)
        if max(stage) > 0:
            nothing = torch.zeros_like(budget.protected)
            kept = highest(weights, signals, Budget(stage, nothing))
            first = torch.zeros_like(scores).scatter_(-1, kept.clamp_min(0), (kept >= 0).float())
            scores = scores.masked_fill(first.bool(), torch.finfo(scores.dtype).max / 2)
        return highest(scores, signals, budget)

    def __str__(self) -> str:
        return "two stages"


class _ByCapacity(Selection):
    """Selections that work on the objective itself, row by row because rows differ in length."""

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        if not isinstance(policy.estimator, Leverage):
            raise ValueError(f"selection {self} needs the estimator Leverage, got {policy.estimator}")
        vectors = policy.directions.vectors(signals)
        weights = linear_weights(policy.weights, signals)
        chosen = torch.full((signals.batch, signals.kv_heads, budget.width), -1, device=signals.device)
        for row, tokens in enumerate(budget.tokens):
            own = slice(signals.tokens - int(signals.counts[row]), None)
            kept = self.select(
                vectors[row, :, own],
                weights[row, :, own],
                tokens,
                budget.protected[row, own].expand(signals.kv_heads, -1),
                policy.estimator,
            )
            chosen[row, :, budget.width - tokens :] = kept + own.start
        return chosen

    @abstractmethod
    def select(
        self, vectors: Tensor, weights: Tensor, tokens: int, protected: Tensor, estimator: Leverage
    ) -> Tensor: ...


@dataclass(frozen=True)
class Rounds(_ByCapacity):
    """Evict in several rounds, recomputing the leverage scores of what is left after each."""

    rounds: int = 4

    def select(self, vectors: Tensor, weights: Tensor, tokens: int, protected: Tensor, estimator: Leverage) -> Tensor:
        """Return what is left after the last round."""
        return select_by_leverage(
            vectors,
            weights,
            tokens,
            rounds=self.rounds,
            protected=protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return f"{self.rounds} rounds"


@dataclass(frozen=True)
class Greedy(_ByCapacity):
    """Add the token of the largest marginal gain until the budget is full; within 1 − 1/e of the optimum."""

    def select(self, vectors: Tensor, weights: Tensor, tokens: int, protected: Tensor, estimator: Leverage) -> Tensor:
        """Return the greedy choice."""
        return select_greedy(
            vectors,
            weights,
            tokens,
            protected=protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return "greedy"


def highest(scores: Tensor, signals: Signals, budget: Budget) -> Tensor:
    """Return the tokens of the highest scores, protected ones first: long [batch, kv_heads, width]."""
    # A valid token of weight 0 still goes before padding.
    ranked = scores if signals.valid is None else signals.masked(scores.clamp_min(_LOWEST))
    ranked = ranked.masked_fill(budget.protected[:, None], float("inf"))
    even = len(set(budget.tokens)) == 1
    # NaN sorts above everything: if there is one, it is among the chosen.
    values, best = ranked.topk(budget.width, dim=-1, sorted=not even)
    if bool(values.isnan().any()):
        raise ValueError(
            "the policy's scores contain NaN, as they do when keys, values or queries hold NaN or Inf: "
            "nothing was evicted"
        )
    if even:
        # The places of a mask come out ascending: cheaper than sorting.
        chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.nonzero()[:, -1].view(best.shape)
    allowed = torch.tensor(budget.tokens, device=scores.device)[:, None, None]
    extra = torch.arange(budget.width, device=scores.device) >= allowed
    return best.masked_fill(extra, -1).sort(dim=-1).values


@dataclass(frozen=True)
class Policy:
    """What to keep of a KV cache: `Policy(weights=…, directions=…, estimator=…)`.

    Args:
        weights: how likely a token is to be read.
        directions: how it moves the output.
        estimator: how its share of the capacity is approximated.
        selection: how tokens are chosen from scores.
        allocation: how the budget is split over layers.
        window: recent tokens that the policy's authors always keep; None leaves it to the cache.
        keep_all: never evict.
        name: name in tables.
        paper: where it comes from.

    Example:
        >>> from retain.kv import Policy
        >>> from retain.kv.weights import KeySalience, WindowAttention
        >>> Policy(weights=WindowAttention(window=16) + 2 * KeySalience()).describe()["weights"]
        'attention of last 16 queries + 2 exp(−4 cos(k, k̄))'

    """

    weights: Weights
    directions: Directions = field(default_factory=Value)
    estimator: Estimator = field(default_factory=Leverage)
    selection: Selection = field(default_factory=Top)
    allocation: Allocation = field(default_factory=Equal)
    window: int | None = None
    keep_all: bool = False
    name: str = "custom"
    paper: str = ""

    def __post_init__(self) -> None:
        parts = {
            "weights": (self.weights, Weights),
            "directions": (self.directions, Directions),
            "estimator": (self.estimator, Estimator),
            "selection": (self.selection, Selection),
            "allocation": (self.allocation, Allocation),
        }
        for part, (value, kind) in parts.items():
            if not isinstance(value, kind):
                raise TypeError(f"{part} is {value!r}; accepted: an instance of {kind.__module__}.{kind.__name__}")
        if isinstance(self.selection, _ByCapacity) and not isinstance(self.estimator, Leverage):
            raise ValueError(f"selection {self.selection} needs the estimator Leverage, got {self.estimator}")

    def with_(self, **changes: Any) -> Policy:
        """Return a copy with some parts replaced, named `custom` unless `name` is given."""
        return replace(self, **{"name": "custom", **changes})

    def score(self, signals: Signals) -> Tensor:
        """Return what each token is worth, [batch, kv_heads, tokens]: only the order within a head counts."""
        return self.estimator.score(self.weights, self.directions, signals)

    def budget(self, signals: Signals, allowed: list[int], protection: Protection) -> Budget:
        """Return this layer's budget, given the tokens allowed for each row."""
        protected = torch.zeros(signals.batch, signals.tokens, dtype=torch.bool, device=signals.device)
        tokens: list[int] = []
        for row, (seen, allow) in enumerate(zip(signals.counts.tolist(), allowed, strict=True)):
            least = sum(protection.sizes(allow, self.window))
            own = self.allocation.tokens(allow, seen, signals.layer, signals.layers, least)
            sinks, window = protection.sizes(own, self.window)
            first = signals.tokens - seen
            protected[row, first : first + sinks] = True
            protected[row, signals.tokens - window :] = True
            tokens.append(own)
        return Budget(tuple(tokens), protected)

    def select(self, signals: Signals, budget: Budget) -> Tensor:
        """Return the kept tokens, ascending: long [batch, kv_heads, budget.width], −1 for none."""
        return self.selection.choose(self, signals, budget)

    def describe(self) -> dict[str, str]:
        """Return the policy's parts in words."""
        return {
            "name": self.name,
            "weights": str(self.weights),
            "directions": str(self.directions),
            "estimator": "keep all" if self.keep_all else str(self.estimator),
            "selection": str(self.selection),
            "allocation": str(self.allocation),
            "paper": self.paper,
        }
