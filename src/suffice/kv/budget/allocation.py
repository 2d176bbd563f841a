"""Allocations: how a policy's budget is split over the layers and heads of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.hf.tensor_parallel import topk_masks
from suffice.kv.policy.attention_stats import LayerContext


@dataclass(frozen=True)
class BudgetRequest:
    """What an allocation needs to know to decide how many entries the heads of one layer keep.

    Args:
        budget: number of entries that a head may keep, averaged over all heads and layers, for each row of the batch.
        num_seen: number of tokens that each row has seen.
        min_entries: number of protected entries of each row. No head gets fewer, unless the budget is smaller.
        num_valid: number of entries that there are, long [batch, num_key_value_heads], for the heads of this process.
        contributions: returns what each entry contributes, comparable between heads,
            [batch, num_key_value_heads, entries]; −inf where there is no entry.
        context: where the layer stands in the model, and the largest number of entries that a head may keep while
            other heads can take more.

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


class Allocation(ABC):
    """Base class of all allocations; a subclass defines `entries_per_head`."""

    @property
    def per_head(self) -> bool:
        """Whether the heads of one layer may keep different numbers of entries."""
        return False

    @property
    def is_global(self) -> bool:
        """Whether all layers compete for one budget, so that the result is only known after the last layer."""
        return False

    @abstractmethod
    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return how many entries each head of the layer may keep.

        Summed over all heads and layers, a row gets num_layers × num_key_value_heads × budget entries, provided that
        there are that many.

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
        beta: the last layer gets 1/beta of the mean budget, or more if it has more protected entries or if the first
            layer has too few tokens to take what the last one gives up.

    Raises:
        ValueError: `beta` is below 1.

    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, got {self.beta!r}")

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return the number of entries of the layer, [batch, num_key_value_heads]."""
        layer, num_layers = request.context.layer, request.context.num_layers
        rows = [
            self.entries_of_layer(layer, num_layers, budget, num_seen, min_entries)
            for budget, num_seen, min_entries in zip(request.budget, request.num_seen, request.min_entries, strict=True)
        ]
        return torch.tensor(rows)[:, None].expand_as(request.num_valid)

    def entries_of_layer(self, layer: int, num_layers: int, budget: int, num_seen: int, min_entries: int) -> int:
        """Return how many entries each head of one layer keeps.

        Args:
            layer: index of the layer.
            num_layers: number of layers.
            budget: mean number of entries over all layers. It is met exactly.
            num_seen: number of tokens, which limits every layer.
            min_entries: smallest number of entries of a layer, unless the budget is smaller.

        """
        if num_layers == 1:
            return budget
        last = min(float(budget), max(budget / self.beta, float(min_entries)))
        first = min(2 * budget - last, float(num_seen))
        last = 2 * budget - first
        step = (first - last) / (num_layers - 1)

        def entries_before(count: int) -> int:
            """Return the total of the first `count` layers: rounding totals keeps the sum over layers exact."""
            return math.floor(count * first - step * count * (count - 1) / 2 + 0.5)

        return entries_before(layer + 1) - entries_before(layer)

    def __str__(self) -> str:
        return "pyramid"


@dataclass(frozen=True)
class AdaKV(Allocation):
    """The heads of a layer compete: its budget goes to the entries that contribute the most (AdaKV, 2407.11550).

    Args:
        safeguard: fraction of the mean budget that every head gets, whatever its entries contribute.

    Raises:
        ValueError: `safeguard` is not between 0 and 1.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("safeguard", self.safeguard)

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
class MarginalCapacity(Allocation):
    """The heads of all layers compete for one budget of the whole model.

    One threshold on the deletion cost −½ log(1 − s), with s the leverage score of an entry, holds for the whole model.
    A head gets as many entries as it has deletion costs above the threshold, and the threshold is such that the budget
    is used up. Which entries of the head these are is decided by the policy's score.

    Args:
        safeguard: fraction of the mean budget that every head gets, whatever its deletion costs.

    Raises:
        ValueError: `safeguard` is not between 0 and 1.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("safeguard", self.safeguard)

    @property
    def per_head(self) -> bool:
        """True."""
        return True

    @property
    def is_global(self) -> bool:
        """True."""
        return True

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return all valid entries: the global budget drops entries of this layer once later layers compete."""
        return request.num_valid

    def __str__(self) -> str:
        return "one threshold on the deletion cost"


def priorities(request: BudgetRequest, safeguard: float) -> Tensor:
    """Return the priorities with which the entries of each head compete for the budget, in descending order.

    The priorities are the contributions. For leverage scores this is the order of the deletion costs, which increase
    with them. The first priorities of each head are +inf: as many as its safeguard or, if these are more, as there are
    protected entries.

    Args:
        request: budget request of the layer.
        safeguard: fraction of the mean budget that every head gets.

    Returns:
        [batch, num_key_value_heads, entries]; −inf where there is no entry.

    """
    ranked = request.contributions().sort(-1, descending=True).values
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    num_guaranteed = [
        max(min_entries, int(safeguard * budget))
        for min_entries, budget in zip(request.min_entries, request.budget, strict=True)
    ]
    guaranteed = rank < async_tensor(num_guaranteed, ranked.device)[:, None, None]
    return ranked.masked_fill(guaranteed & (ranked > -math.inf), math.inf)


def check_fraction(name: str, value: float) -> None:
    """Raise unless an argument is a fraction of the mean budget, from 0 to 1.

    Raises:
        ValueError: it is not.

    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction of the mean budget, from 0 to 1, got {value!r}")
