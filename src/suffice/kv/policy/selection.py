"""Selections: how the kept entries are chosen from scores under a budget."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information import select_by_leverage, select_greedy
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.estimators import Estimator, Leverage, Objective, score_entries

NAN_SCORES = "scores of the policy must be numbers, got NaN. Keys, values or queries may contain NaN or infinite values"
LOWEST_SCORE = torch.finfo(torch.float32).min / 2
"""Replaces scores of −inf of valid entries, so that they rank before padding."""


@dataclass(frozen=True)
class LayerBudget:
    """How many entries each row and head of one layer keeps, and which entries are always kept.

    Args:
        num_kept: long [batch, num_key_value_heads], on the CPU; at most the number of valid entries.
        protected: bool [batch, 1 or num_key_value_heads, entries].

    """

    num_kept: Tensor
    protected: Tensor

    def num_kept_on(self, device: torch.device) -> Tensor:
        """Copy `num_kept` to a device without a synchronization."""
        return self.num_kept.to(device, non_blocking=True)

    @functools.cached_property
    def width(self) -> int:
        """Largest number of entries that any row and head keeps."""
        return int(self.num_kept.max())

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether all rows and heads keep the same number of entries."""
        return int(self.num_kept.min()) == self.width


class Selection(ABC):
    """Base class of all selections. A subclass defines `select`, as a frozen dataclass."""

    @property
    def keeps_exact_counts(self) -> bool:
        """Whether each head keeps exactly `budget.num_kept` entries, so that they need not be counted on the device."""
        return False

    @abstractmethod
    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the indices of the kept entries.

        A selection may keep more or fewer entries than the budget, for example to follow a rule of its own. The cache
        stores the entries that it returns. Heads of unequal length require an allocation that is `per_head`.

        Args:
            estimator: scores the entries.
            objective: objective of the attention call.
            budget: budget of the layer.

        Returns:
            Long [batch, num_key_value_heads, width], ascending. A row and head that keeps fewer entries than the
            longest one starts with −1.

        """


class _ExactSelection(Selection):
    """Base class of selections that keep exactly the budget."""

    @property
    def keeps_exact_counts(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class TopK(_ExactSelection):
    """Keep the entries with the highest scores."""

    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the highest-scoring entries of each row and head."""
        return select_highest(score_entries(estimator, objective), objective.stats, budget)

    def __str__(self) -> str:
        return "top"


@dataclass(frozen=True)
class TwoStage(_ExactSelection):
    """Fill a fraction of the budget by weight and the rest by score (CriticalKV, 2502.03805).

    Args:
        first: fraction of the budget that is filled by weight.

    """

    first: float = 0.5

    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the entries that are kept by the first or by the second stage."""
        stats = objective.stats
        num_first = (budget.num_kept * self.first).long()
        log_weights = objective.log_weights()
        scores = score_entries(estimator, objective)
        if int(num_first.max()) > 0:
            unprotected = torch.zeros_like(budget.protected)
            kept = select_highest(log_weights, stats, LayerBudget(num_first, unprotected))
            in_first = torch.zeros_like(scores).scatter_(-1, kept.clamp_min(0), (kept >= 0).float())
            scores = scores.masked_fill(in_first.bool(), torch.finfo(scores.dtype).max / 2)
        return select_highest(scores, stats, budget)

    def __str__(self) -> str:
        return "two stages"


@dataclass(frozen=True)
class ItemSets:
    """Sets of items to select from, one for each row and head.

    Args:
        vectors: [sets, items, dim].
        weights: [sets, items].
        valid: bool [sets, items].
        protected: bool [sets, items], which items are always kept.

    """

    vectors: Tensor
    weights: Tensor
    valid: Tensor
    protected: Tensor


class CapacitySelection(_ExactSelection):
    """Base class of selections that optimize the capacity itself. They require the estimator `Leverage`."""

    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Select a set for each row and head; rows and heads with equal budgets are processed together."""
        if not isinstance(estimator, Leverage):
            raise ValueError(f"estimator must be Leverage for the selection {self}, got {estimator}")
        stats = objective.stats
        vectors = objective.directions.vectors(stats)
        weights = objective.linear_weights()
        valid = stats.mask_invalid(torch.zeros_like(weights)) == 0
        protected = (budget.protected & valid).expand(-1, stats.num_key_value_heads, -1)
        shape = (stats.batch_size, stats.num_key_value_heads, budget.width)
        selected = torch.full(shape, -1, device=stats.device)
        for num_kept in budget.num_kept.unique().tolist():
            heads = budget.num_kept_on(stats.device) == num_kept
            sets = ItemSets(vectors[heads], weights[heads], valid[heads], protected[heads])
            selected[..., budget.width - num_kept :][heads] = self.select_sets(sets, num_kept, estimator)
        return selected

    @abstractmethod
    def select_sets(self, sets: ItemSets, num_kept: int, estimator: Leverage) -> Tensor:
        """Return the indices of the kept items of each set, ascending: long [sets, num_kept]."""


@dataclass(frozen=True)
class Rounds(CapacitySelection):
    """Evict in several rounds; leverage scores of the remaining entries are recomputed after each round.

    Args:
        rounds: number of rounds.

    """

    rounds: int = 4

    def select_sets(self, sets: ItemSets, num_kept: int, estimator: Leverage) -> Tensor:
        """Return the items that remain after the last round."""
        return select_by_leverage(
            sets.vectors,
            sets.weights,
            num_kept,
            rounds=self.rounds,
            valid=sets.valid,
            protected=sets.protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return f"{self.rounds} rounds"


@dataclass(frozen=True)
class Greedy(CapacitySelection):
    """Add the entry with the largest marginal gain until the budget is full; within 1 − 1/e of the optimum."""

    def select_sets(self, sets: ItemSets, num_kept: int, estimator: Leverage) -> Tensor:
        """Return the greedy choice."""
        return select_greedy(
            sets.vectors,
            sets.weights,
            num_kept,
            valid=sets.valid,
            protected=sets.protected,
            ridge=estimator.ridge,
            relative=estimator.relative,
        )

    def __str__(self) -> str:
        return "greedy"


def select_highest(scores: Tensor, stats: AttentionStats, budget: LayerBudget) -> Tensor:
    """Select protected entries and those with the highest scores.

    Args:
        scores: [batch, num_key_value_heads, entries].
        stats: statistics of the attention call.
        budget: budget of the layer.

    Returns:
        Indices in ascending order, long [batch, num_key_value_heads, budget.width]. A head that keeps fewer entries
        starts with −1.

    """
    ranked = scores if stats.valid is None else stats.mask_invalid(scores.clamp_min(LOWEST_SCORE))
    ranked = ranked.masked_fill(budget.protected, torch.inf)
    # `topk` ranks NaN above all numbers, so a NaN score is always selected.
    values, selected = ranked.topk(budget.width, dim=-1, sorted=not budget.is_uniform)
    stats.require(~values.isnan().any(), ValueError(NAN_SCORES))
    if budget.is_uniform:
        return _sort_indices(selected, ranked.shape[-1])
    num_kept = budget.num_kept_on(scores.device)
    surplus = torch.arange(budget.width, device=scores.device) >= num_kept[..., None]
    return selected.masked_fill(surplus, -1).sort(dim=-1).values


def _sort_indices(indices: Tensor, size: int) -> Tensor:
    """Sort distinct indices [batch, num_key_value_heads, width] below `size` by a mask, which is faster than `sort`."""
    marked = torch.zeros(*indices.shape[:2], size, dtype=torch.bool, device=indices.device)
    marked.scatter_(-1, indices, True)
    if not indices.is_cuda:
        return marked.nonzero()[:, -1].view(indices.shape)
    # `nonzero` would synchronize with the GPU to count the indices, but their number is known.
    width = indices.shape[-1]
    slots = torch.where(marked, marked.cumsum(-1, dtype=torch.int32) - 1, width).long()
    found = indices.new_empty(*indices.shape[:2], width + 1)
    return found.scatter_(-1, slots, torch.arange(size, device=indices.device).expand_as(slots))[..., :width]
