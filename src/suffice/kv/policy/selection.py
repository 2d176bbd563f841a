"""Selections: how the kept entries are chosen from scores under a budget."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suffice.information import select_by_leverage, select_greedy
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.estimators import Leverage, linear_weights, log_weights

if TYPE_CHECKING:
    from suffice.kv.policy.policy import Policy

NOT_A_NUMBER = "the policy's scores contain NaN, as they do when keys, values or queries hold NaN or Inf"
_LOWEST = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class Budget:
    """What one layer may keep: how many entries each row and head, and which whatever their score.

    Args:
        tokens: long [batch, kv_heads], on the CPU; no more than there are entries.
        protected: bool [batch, 1 or kv_heads, tokens].

    """

    tokens: Tensor
    protected: Tensor

    def on(self, device: torch.device) -> Tensor:
        """Return `tokens` on another device, which is not waited for."""
        return self.tokens.to(device, non_blocking=True)

    @functools.cached_property
    def width(self) -> int:
        """Most entries that any row and head keeps."""
        return int(self.tokens.max())

    @functools.cached_property
    def even(self) -> bool:
        """Whether all rows and heads keep as many."""
        return int(self.tokens.min()) == self.width


class Selection(ABC):
    """Base of all selections; a new one defines `choose`."""

    @property
    def as_budgeted(self) -> bool:
        """Whether each head keeps the budget's number for certain, so that nobody has to count."""
        return False

    @abstractmethod
    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the kept tokens, ascending: long [batch, kv_heads, budget.width].

        A row and head that keeps fewer than the widest has −1 in its first places. What is returned is kept, also
        where it is another number than the budget's: a selection that brings its own numbers, as another library's
        rule may, counts for itself. Heads of unequal length need an allocation that is ragged.
        """


class _AsBudgeted(Selection):
    """A selection of the budget's numbers."""

    @property
    def as_budgeted(self) -> bool:
        """They are."""
        return True


@dataclass(frozen=True)
class Top(_AsBudgeted):
    """Keep the tokens of the highest scores."""

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the best of each row."""
        return highest(policy.score(signals), signals, budget)

    def __str__(self) -> str:
        return "top"


@dataclass(frozen=True)
class TwoStage(_AsBudgeted):
    """Fill a share of the budget by weight alone, the rest by score (CriticalKV, 2502.03805)."""

    first: float = 0.5

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the best of each row in two stages."""
        stage = (budget.tokens * self.first).long()
        weights = log_weights(policy.weights, signals)
        scores = policy.score(signals)
        if int(stage.max()) > 0:
            nothing = torch.zeros_like(budget.protected)
            kept = highest(weights, signals, Budget(stage, nothing))
            first = torch.zeros_like(scores).scatter_(-1, kept.clamp_min(0), (kept >= 0).float())
            scores = scores.masked_fill(first.bool(), torch.finfo(scores.dtype).max / 2)
        return highest(scores, signals, budget)

    def __str__(self) -> str:
        return "two stages"


class ByCapacity(_AsBudgeted):
    """Base of the selections that work on the objective itself and so need the estimator Leverage."""

    def choose(self, policy: Policy, signals: Signals, budget: Budget) -> Tensor:
        """Return the best set of each row and head; those of equal budgets are worked on together."""
        estimator = policy.estimator
        if not isinstance(estimator, Leverage):
            raise ValueError(f"selection {self} needs the estimator Leverage, got {estimator}")
        vectors = policy.directions.vectors(signals)
        weights = linear_weights(policy.weights, signals)
        valid = signals.masked(torch.zeros_like(weights)) == 0
        protected = (budget.protected & valid).expand(-1, signals.kv_heads, -1)
        chosen = torch.full((signals.batch, signals.kv_heads, budget.width), -1, device=signals.device)
        for tokens in budget.tokens.unique().tolist():
            own = budget.on(signals.device) == tokens
            kept = self.select(vectors[own], weights[own], tokens, valid[own], protected[own], estimator)
            chosen[..., budget.width - tokens :][own] = kept
        return chosen

    @abstractmethod
    def select(
        self,
        vectors: Tensor,
        weights: Tensor,
        tokens: int,
        valid: Tensor,
        protected: Tensor,
        estimator: Leverage,
    ) -> Tensor:
        """Return the kept items [sets, tokens], ascending, of sets of items [sets, n]."""


@dataclass(frozen=True)
class Rounds(ByCapacity):
    """Evict in several rounds, recomputing the leverage scores of what is left after each."""

    rounds: int = 4

    def select(
        self,
        vectors: Tensor,
        weights: Tensor,
        tokens: int,
        valid: Tensor,
        protected: Tensor,
        estimator: Leverage,
    ) -> Tensor:
        """Return what is left after the last round."""
        return select_by_leverage(
            vectors,
            weights,
            tokens,
            rounds=self.rounds,
            valid=valid,
            protected=protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return f"{self.rounds} rounds"


@dataclass(frozen=True)
class Greedy(ByCapacity):
    """Add the token of the largest marginal gain until the budget is full; within 1 − 1/e of the optimum."""

    def select(
        self,
        vectors: Tensor,
        weights: Tensor,
        tokens: int,
        valid: Tensor,
        protected: Tensor,
        estimator: Leverage,
    ) -> Tensor:
        """Return the greedy choice."""
        return select_greedy(
            vectors,
            weights,
            tokens,
            valid=valid,
            protected=protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return "greedy"


def highest(scores: Tensor, signals: Signals, budget: Budget) -> Tensor:
    """Return the entries of the highest scores, protected ones first: long [batch, kv_heads, width]."""
    # A valid entry of weight 0 still goes before padding.
    ranked = scores if signals.valid is None else signals.masked(scores.clamp_min(_LOWEST))
    ranked = ranked.masked_fill(budget.protected, float("inf"))
    # NaN sorts above everything: if there is one, it is among the chosen.
    values, best = ranked.topk(budget.width, dim=-1, sorted=not budget.even)
    signals.require(~values.isnan().any(), ValueError(NOT_A_NUMBER))
    if budget.even:
        return _ascending(best, ranked.shape[-1])
    extra = torch.arange(budget.width, device=scores.device) >= budget.on(scores.device)[..., None]
    return best.masked_fill(extra, -1).sort(dim=-1).values


def _ascending(places: Tensor, tokens: int) -> Tensor:
    """Sort different places below `tokens`, [batch, kv_heads, width], by marking them: cheaper than sorting."""
    chosen = torch.zeros(*places.shape[:2], tokens, dtype=torch.bool, device=places.device).scatter_(-1, places, True)
    if not places.is_cuda:
        return chosen.nonzero()[:, -1].view(places.shape)
    # How many a mask holds a GPU would have to tell; here it is known.
    width = places.shape[-1]
    order = torch.where(chosen, chosen.cumsum(-1, dtype=torch.int32) - 1, width).long()
    found = places.new_empty(*places.shape[:2], width + 1)
    return found.scatter_(-1, order, torch.arange(tokens, device=places.device).expand_as(order))[..., :width]
