"""Allocations: how a policy's budget is split over the layers and heads of a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.hf.tensor_parallel import Sharding, topk_masks


@dataclass(frozen=True)
class Request:
    """One layer's question for its tokens.

    Args:
        budget: entries allowed in a head, in the mean over all heads and layers, for each row of the batch.
        seen: tokens that each row has seen.
        least: entries of each row that are protected; no head gets fewer unless the budget itself is smaller.
        room: entries that there are, long [batch, kv_heads], of the heads that are here.
        layer: index of the layer among `layers`.
        layers: number of layers.
        shares: gives what each entry contributes, comparable between heads, [batch, kv_heads, tokens]; −inf
            where there is none.
        sharding: where the other heads are; None if all are here.
        most: entries that a head may hold while others can take them; None if there is no limit.

    """

    budget: tuple[int, ...]
    seen: tuple[int, ...]
    least: tuple[int, ...]
    room: Tensor
    layer: int
    layers: int
    shares: Callable[[], Tensor] = field(repr=False)
    sharding: Sharding | None = None
    most: int | None = None

    @property
    def heads(self) -> int:
        """KV heads of the layer, those of other processes included."""
        return self.room.shape[1] if self.sharding is None else self.sharding.num_kv_heads


class Allocation(ABC):
    """Base of all allocations; a new one defines `tokens`."""

    @property
    def ragged(self) -> bool:
        """Whether heads of one layer may keep different numbers of entries."""
        return False

    @property
    def model_wide(self) -> bool:
        """Whether all layers compete for one budget, so that a layer's tokens are known after the last layer only."""
        return False

    @abstractmethod
    def tokens(self, request: Request) -> Tensor:
        """Return the entries that each row and head of the layer may keep, long [batch, kv_heads].

        Over all heads and layers they sum to layers × kv_heads × budget for each row, as long as there are so
        many entries. Where heads are split over processes, each process gets the numbers of its own.
        """


@dataclass(frozen=True)
class Equal(Allocation):
    """Every head of every layer keeps as many."""

    def tokens(self, request: Request) -> Tensor:
        """Return the budget itself."""
        return torch.tensor(request.budget)[:, None].expand_as(request.room)

    def __str__(self) -> str:
        return "equal"


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Early layers keep more, linearly fewer with depth; heads of a layer as many (PyramidKV, 2406.02069).

    Args:
        beta: the last layer is aimed at 1/beta of the mean budget.

    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta is {self.beta}; accepted: at least 1")

    def tokens(self, request: Request) -> Tensor:
        """Return the layer's share; rounding never changes the total."""
        rows = [
            self.of_layer(budget, seen, least, request.layer, request.layers)
            for budget, seen, least in zip(request.budget, request.seen, request.least, strict=True)
        ]
        return torch.tensor(rows)[:, None].expand_as(request.room)

    def of_layer(self, budget: int, seen: int, least: int, layer: int, layers: int) -> int:
        """Return the entries of one row in one layer."""
        if layers == 1:
            return budget
        last = min(float(budget), max(budget / self.beta, float(least)))
        first = min(2 * budget - last, float(seen))
        last = 2 * budget - first

        def kept_up_to(count: int) -> int:  # cumulative, so that the rounded layers sum exactly
            step = (first - last) / (layers - 1)
            return math.floor(count * first - step * count * (count - 1) / 2 + 0.5)

        return kept_up_to(layer + 1) - kept_up_to(layer)

    def __str__(self) -> str:
        return "pyramid"


@dataclass(frozen=True)
class PooledScores(Allocation):
    """The heads of a layer compete: its budget goes to the largest shares of all of them (AdaKV, 2407.11550).

    Args:
        safeguard: part of the mean budget that every head gets whatever its shares.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_part("safeguard", self.safeguard)

    @property
    def ragged(self) -> bool:
        """Heads of one layer differ."""
        return True

    def tokens(self, request: Request) -> Tensor:
        """Return for each head how many of the layer's largest shares are its own."""
        ranked = claims(request, self.safeguard)
        counts = [budget * request.heads for budget in request.budget]
        chosen = topk_masks(list(ranked.flatten(1)), counts, request.sharding)
        return torch.stack(chosen).view_as(ranked).sum(-1).cpu()

    def __str__(self) -> str:
        return "per head, by pooled scores"


@dataclass(frozen=True)
class MarginalCapacity(Allocation):
    """One threshold on the cost of deletion across all heads and layers: the whole budget is one.

    A head gets as many entries as it has deletion costs −½ log(1 − s) above the threshold, which is where the
    model's whole budget is used up; the entries themselves are those that the policy ranks highest.

    Args:
        safeguard: part of the mean budget that every head gets whatever its costs.

    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        check_part("safeguard", self.safeguard)

    @property
    def ragged(self) -> bool:
        """Heads of one layer differ."""
        return True

    @property
    def model_wide(self) -> bool:
        """All layers compete."""
        return True

    def tokens(self, request: Request) -> Tensor:
        """Return all that there is: layers give up what later ones claim with better right."""
        return request.room

    def __str__(self) -> str:
        return "one threshold on the deletion cost"


def claims(request: Request, safeguard: float) -> Tensor:
    """Return each head's shares in descending order, its first ones +inf: [batch, kv_heads, tokens].

    The cost of deletion rises with the share, so that both rank alike. The first `safeguard` of the budget, and
    what is protected, is a head's own.
    """
    ranked = request.shares().sort(-1, descending=True).values
    order = torch.arange(ranked.shape[-1], device=ranked.device)
    own = [max(least, int(safeguard * budget)) for least, budget in zip(request.least, request.budget, strict=True)]
    first = order < async_tensor(own, ranked.device)[:, None, None]
    return ranked.masked_fill(first & (ranked > -math.inf), math.inf)


def check_part(name: str, value: float) -> None:
    """Raise unless a value is a part of the mean budget, 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; accepted: 0 to 1, a part of the mean budget of a head")
