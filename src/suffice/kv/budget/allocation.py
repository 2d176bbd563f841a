"""Allocations: how a policy's budget is split over the layers and heads of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffice.arguments import check_number
from suffice.gpu import async_tensor
from suffice.kv.hf.tensor_parallel import topk_masks
from suffice.kv.policy.layer_context import LayerContext


@dataclass(frozen=True)
class BudgetRequest:
    """Input of an allocation, which decides how many entries each head of one layer keeps.

    Args:
        budget: for each row, the number of entries that a head may keep, averaged over heads and layers.
        num_seen: number of tokens that each row has seen.
        min_entries: number of protected entries of each row. No head keeps fewer, unless the budget is smaller.
        num_valid: number of valid entries of each head of this process, long [batch, num_key_value_heads].
        contributions: returns what each entry contributes, comparable between heads,
            [batch, num_key_value_heads, entries]; −inf where there is no entry.
        context: position of the layer among the compressed layers, and the limits of its heads.

    """

    budget: tuple[int, ...]
    num_seen: tuple[int, ...]
    min_entries: tuple[int, ...]
    num_valid: Tensor
    contributions: Callable[[], Tensor] = field(repr=False)
    context: LayerContext = field(default_factory=LayerContext)

    @property
    def num_key_value_heads(self) -> int:
        """Number of KV heads of the layer, including those of other processes."""
        sharding = self.context.sharding
        return self.num_valid.shape[1] if sharding is None else sharding.num_key_value_heads

    def max_entries(self, num_seen: int) -> int:
        """Return how many entries a head may keep at most, in a row that has seen `num_seen` tokens."""
        limit = self.context.max_entries
        return num_seen if limit is None else min(num_seen, limit)


class Allocation(ABC):
    """Base class of all allocations; a subclass defines `entries_per_head`."""

    @property
    def per_head(self) -> bool:
        """Whether the heads of one layer may keep different numbers of entries."""
        return False

    @property
    def is_global(self) -> bool:
        """Whether all layers share one budget, so that the result is known only after the last layer."""
        return False

    @property
    def replay_kind(self) -> str | None:
        """The kind of scores from a replay that decides the budgets; None for the contributions to the capacity."""
        return None

    @abstractmethod
    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return how many entries each head of the layer may keep.

        Over all heads and layers, a row gets num_layers × num_key_value_heads × budget entries, if it has that many.

        Args:
            request: budget request of the layer.

        Returns:
            Long [batch, num_key_value_heads], on the CPU, for the heads of this process.

        """


@dataclass(frozen=True)
class Equal(Allocation):
    """All heads of all layers keep the same number of entries."""

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return the budget, [batch, num_key_value_heads]."""
        return torch.tensor(request.budget)[:, None].expand_as(request.num_valid)

    def __str__(self) -> str:
        return "equal"


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Earlier layers keep more entries, decreasing linearly; heads of one layer keep the same (PyramidKV, 2406.02069).

    Args:
        beta: the last layer keeps 1/beta of the mean budget. It keeps more if it has more protected entries, or if the
            text is too short for the number of entries that the first layer would keep.

    Raises:
        ValueError: `beta` is below 1.

    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, minimum=1)

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return the number of entries of the layer, [batch, num_key_value_heads]."""
        layer, num_layers = request.context.layer, request.context.num_layers
        rows = [
            self.entries_of_layer(layer, num_layers, budget, request.max_entries(num_seen), min_entries)
            for budget, num_seen, min_entries in zip(request.budget, request.num_seen, request.min_entries, strict=True)
        ]
        return torch.tensor(rows)[:, None].expand_as(request.num_valid)

    def entries_of_layer(self, layer: int, num_layers: int, budget: int, max_entries: int, min_entries: int) -> int:
        """Return how many entries each head of one layer keeps.

        Args:
            layer: index of the layer.
            num_layers: number of layers.
            budget: mean number of entries over all layers. It is met exactly.
            max_entries: largest number of entries of a layer, at least the budget.
            min_entries: smallest number of entries of a layer, unless the budget is smaller.

        """
        if num_layers == 1:
            return budget
        last = min(float(budget), max(budget / self.beta, float(min_entries)))
        first = min(2 * budget - last, float(max_entries))
        last = 2 * budget - first
        step = (first - last) / (num_layers - 1)

        def entries_before(count: int) -> int:
            """Return the rounded total of the first `count` layers. Differences of totals sum to the exact budget."""
            return math.floor(count * first - step * count * (count - 1) / 2 + 0.5)

        return entries_before(layer + 1) - entries_before(layer)

    def __str__(self) -> str:
        return "pyramid"


@dataclass(frozen=True)
class AdaKV(Allocation):
    """The heads of a layer share its budget, for the entries that contribute the most (AdaKV, 2407.11550).

    Args:
        safeguard: fraction of the mean budget that every head is guaranteed.

    Raises:
        ValueError: `safeguard` is not between 0 and 1.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_number("safeguard", self.safeguard, minimum=0, maximum=1, unit="(a fraction of the mean budget)")

    @property
    def per_head(self) -> bool:
        """True."""
        return True

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return how many of the layer's highest priorities belong to each head, [batch, num_key_value_heads]."""
        ranked = priorities(request, self.safeguard)
        totals = [budget * request.num_key_value_heads for budget in request.budget]
        kept = topk_masks(list(ranked.flatten(1)), totals, request.context.sharding)
        return torch.stack(kept).view_as(ranked).sum(-1).cpu()

    def __str__(self) -> str:
        return "per head, by pooled scores"


@dataclass(frozen=True)
class SharedBudget(Allocation):
    """Base class of allocations in which the heads of all layers share the budget of the whole model.

    Args:
        safeguard: fraction of the mean budget that every head is guaranteed.

    Raises:
        ValueError: `safeguard` is not between 0 and 1.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_number("safeguard", self.safeguard, minimum=0, maximum=1, unit="(a fraction of the mean budget)")

    @property
    def per_head(self) -> bool:
        """True."""
        return True

    @property
    def is_global(self) -> bool:
        """True."""
        return True

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return the number of valid entries. The global budget drops entries when it processes later layers."""
        return request.num_valid


@dataclass(frozen=True)
class MarginalCapacity(SharedBudget):
    """The heads of all layers share the budget, for the entries whose deletion costs the most capacity.

    The whole model has one threshold on the deletion cost −½ log(1 − s), where s is the leverage score of an entry. A
    head keeps as many entries as it has deletion costs above the threshold. The threshold is chosen to use up the
    budget. The scores of the policy decide which entries of a head are kept.

    Args:
        safeguard: fraction of the mean budget that every head is guaranteed.

    """

    def __str__(self) -> str:
        return "one threshold on the deletion cost"


@dataclass(frozen=True)
class HighestReplayScores(SharedBudget):
    """The heads of all layers share the budget, for the entries with the highest scores in a replay.

    This is the allocation of KVzip (2505.23416).

    The scores of the policy decide which entries of a head are kept.

    Args:
        safeguard: fraction of the mean budget that every head is guaranteed.
        kind: kind of the scores, see `suffice.kv.policy.weights.replay`.

    """

    safeguard: float = 0.0
    kind: str = "largest"

    @property
    def replay_kind(self) -> str | None:
        """The kind of the scores."""
        return self.kind

    def __str__(self) -> str:
        return "one threshold on the scores in a replay"


def priorities(request: BudgetRequest, safeguard: float) -> Tensor:
    """Return the priorities with which the entries of each head compete for the budget, in descending order.

    The priorities are the contributions. Leverage scores have the same order as deletion costs. The first
    max(safeguard · budget, min_entries) priorities of each head are +inf, because it is guaranteed that many entries.

    Args:
        request: budget request of the layer.
        safeguard: fraction of the mean budget that every head is guaranteed.

    Returns:
        [batch, num_key_value_heads, entries]; −inf where there is no entry, and where a head has more entries than it
        may keep.

    """
    ranked = request.contributions().sort(-1, descending=True).values
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    num_guaranteed = [
        max(min_entries, int(safeguard * budget))
        for min_entries, budget in zip(request.min_entries, request.budget, strict=True)
    ]
    if request.context.max_entries is not None:
        ranked = ranked.masked_fill(rank >= request.context.max_entries, -math.inf)
    guaranteed = rank < async_tensor(num_guaranteed, ranked.device)[:, None, None]
    return ranked.masked_fill(guaranteed & (ranked > -math.inf), math.inf)
