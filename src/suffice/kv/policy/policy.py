"""Policies: weights, directions and an estimator score the entries; a selection chooses which entries are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffice.arguments import check_flag, check_optional_int, check_text, shown
from suffice.gpu import async_tensor
from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend
from suffice.kv.budget.allocation import Allocation, BudgetRequest, Equal
from suffice.kv.budget.protection import Protection
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Directions, Value
from suffice.kv.policy.estimators import Estimator, Leverage, Objective, score_entries
from suffice.kv.policy.selection import CapacitySelection, LayerBudget, Selection, TopK
from suffice.kv.policy.weights import Weights


@dataclass(frozen=True)
class Policy:
    """Decides which entries of a KV cache to keep: `Policy(weights=…, directions=…, estimator=…)`.

    Args:
        weights: how likely an entry is to be read.
        directions: how an entry changes the output of the attention.
        estimator: how the contribution of an entry to the capacity is approximated.
        selection: how the kept entries are chosen from the scores.
        allocation: how the budget is split over layers and heads.
        window: number of last tokens that the published policy always keeps; None uses the default of the cache.
        keep_all: never evict.
        name: name of the policy in reports.
        paper: arXiv number of the source, or `openreview:` and its number at OpenReview.

    Raises:
        TypeError: a part is not an instance of its base class, or another argument has the wrong type.
        ValueError: the selection does not work with the estimator, `window` is negative, or `name` is empty.

    Example:
        >>> from suffice.kv import Policy
        >>> from suffice.kv.policy.weights import KeySalience, WindowAttention
        >>> Policy(weights=WindowAttention(window_size=16) + 2 * KeySalience()).describe()["weights"]
        'attention of last 16 queries + 2 exp(−4 cos(k, k̄))'

    """

    weights: Weights
    directions: Directions = field(default_factory=Value)
    estimator: Estimator = field(default_factory=Leverage)
    selection: Selection = field(default_factory=TopK)
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
        for part, (value, base) in parts.items():
            if not isinstance(value, base):
                raise TypeError(f"{part} must be an instance of {base.__module__}.{base.__name__}, got {value!r}")
        check_optional_int("window", self.window, 0)
        check_flag("keep_all", self.keep_all)
        check_text("name", self.name)
        if not isinstance(self.paper, str):
            raise TypeError(f"paper must be a string, got {shown(self.paper)}")
        if isinstance(self.selection, CapacitySelection) and not isinstance(self.estimator, Leverage):
            raise ValueError(f"estimator must be Leverage for the selection {self.selection}, got {self.estimator}")

    @property
    def needs_rotary(self) -> bool:
        """Whether the policy needs the rotary embedding of the model, to rotate queries or keys back."""
        return self.weights.needs_rotary or self.directions.needs_rotary

    @property
    def replay_kinds(self) -> frozenset[str]:
        """The kinds of scores from a replay that the policy needs; none if it scores entries in one pass."""
        kind = self.allocation.replay_kind
        return self.weights.replay_kinds | (frozenset() if kind is None else {kind})

    @property
    def needs_replay(self) -> bool:
        """Whether the policy scores entries in a second pass over the prompt."""
        return bool(self.replay_kinds)

    def objective(self, stats: AttentionStats, backend: TorchBackend = TORCH_BACKEND) -> Objective:
        """Return the objective that the policy approximates for an attention call."""
        return Objective(self.weights, self.directions, stats, backend)

    def score(self, stats: AttentionStats, backend: TorchBackend = TORCH_BACKEND) -> Tensor:
        """Score the entries; only the order within a head matters.

        Args:
            stats: statistics of the attention call.
            backend: computes the scores.

        Returns:
            [batch, num_key_value_heads, entries].

        """
        return score_entries(self.estimator, self.objective(stats, backend))

    def layer_budget(self, objective: Objective, allowed: Sequence[int], protection: Protection) -> LayerBudget:
        """Return the budget of one layer.

        Args:
            objective: objective of the attention call.
            allowed: for each row, the number of entries that a head may keep, averaged over heads and layers.
            protection: which entries are always kept.

        """
        stats = objective.stats
        request = self.budget_request(objective, allowed, protection)
        num_kept = torch.minimum(self.allocation.entries_per_head(request), request.num_valid)
        # A layer that keeps fewer entries than the average also protects fewer. Heads of one layer protect the same.
        per_row = list(allowed) if self.allocation.per_head else num_kept.amax(-1).tolist()
        sizes = [self.protected_sizes(n, seen, protection) for n, seen in zip(per_row, request.num_seen, strict=True)]
        sinks, window = (_per_row(size, stats.device) for size in zip(*sizes, strict=True))
        in_window = torch.arange(stats.num_entries, device=stats.device) >= stats.num_entries - window
        return LayerBudget(num_kept, (in_window | (stats.positions < sinks)) & (stats.positions >= 0))

    def budget_request(self, objective: Objective, allowed: Sequence[int], protection: Protection) -> BudgetRequest:
        """Return the input of the allocation for one layer; see `layer_budget` for the arguments."""
        stats = objective.stats
        num_seen = stats.num_seen_per_row
        return BudgetRequest(
            budget=tuple(allowed),
            num_seen=tuple(num_seen),
            min_entries=tuple(
                sum(self.protected_sizes(n, seen, protection)) for n, seen in zip(allowed, num_seen, strict=True)
            ),
            num_valid=stats.num_valid,
            contributions=lambda: stats.mask_invalid(self.estimator.contributions(objective)),
            context=stats.context,
        )

    def protected_sizes(self, num_kept: int, num_seen: int, protection: Protection) -> tuple[int, int]:
        """Return the number of protected first tokens (sinks) and last tokens of a row; (0, 0) if it keeps all tokens.

        Raises:
            ValueError: the protected tokens do not fit into the budget.

        """
        return (0, 0) if num_kept >= num_seen else protection.sizes(num_kept, self.window)

    def select(self, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the indices of the kept entries, long [batch, num_key_value_heads, width]; see `Selection.select`."""
        return self.selection.select(self.estimator, objective, budget)

    def describe(self) -> dict[str, str]:
        """Return a description of each part of the policy."""
        return {
            "name": self.name,
            "weights": str(self.weights),
            "directions": str(self.directions),
            "estimator": "keep all" if self.keep_all else str(self.estimator),
            "selection": str(self.selection),
            "allocation": str(self.allocation),
            "paper": self.paper,
        }


def _per_row(numbers: tuple[int, ...], device: torch.device) -> Tensor | int:
    """Return the numbers of all rows as a tensor [batch, 1, 1], or as one int if they are equal."""
    return numbers[0] if len(set(numbers)) == 1 else async_tensor(numbers, device)[:, None, None]
