"""The allocation that follows a head profile: heads that read more of their cache keep more entries."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from suffice.arguments import check_number
from suffice.kv.budget.allocation import Allocation, BudgetRequest
from suffice.kv.budget.profile import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadProfile(Allocation):
    """Head h keeps B_h = clip(c · a_h^power, floor · B, n) entries, where c makes the mean over heads exactly B.

    a_h is the number of the head in the profile, B the budget and n the number of tokens.

    Args:
        profile: profile of the model. None lets the cache find it, or measure it if there is none.
        power: how strongly the numbers of entries follow the profile; 0 gives all heads the same budget.
        floor: fraction of the mean budget that every head is guaranteed.

    Raises:
        ValueError: `power` is negative or infinite, or `floor` is not between 0 and 1.

    """

    profile: Profile | None = None
    power: float = 0.7
    floor: float = 0.2

    def __post_init__(self) -> None:
        check_number("floor", self.floor, minimum=0, maximum=1, unit="(a fraction of the mean budget)")
        check_number("power", self.power, minimum=0)

    @property
    def per_head(self) -> bool:
        """True."""
        return True

    def bind(self, model: PreTrainedModel) -> HeadProfile:
        """Return the allocation for a model. If `profile` is None, it is set to the result of `get_profile`.

        Raises:
            ValueError: the profile belongs to another model.

        """
        from suffice.kv.budget.calibration import get_profile
        from suffice.kv.hf.fingerprint import fingerprint

        if self.profile is None:
            return replace(self, profile=get_profile(model))
        if self.profile.model != (expected := fingerprint(model)):
            raise ValueError(
                f"profile must be of this model ({expected}), got one of the model {self.profile.model}. Use None, or "
                "`suffice.kv.calibrate(model)`"
            )
        return self

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return the number of entries of each head of the layer, [batch, num_key_value_heads].

        Raises:
            ValueError: `profile` is None, or its numbers of layers and heads are not those of the model.

        """
        attention, context = self._attention(), request.context
        num_heads = request.num_key_value_heads
        if len(attention) != context.num_layers or len(attention[context.layer]) != num_heads:
            raise ValueError(
                f"profile must have {context.num_layers} layers and, in layer {context.layer}, {num_heads} heads, got "
                f"{len(attention)} layers with {', '.join(str(len(layer)) for layer in attention)} heads"
            )
        rows = [
            self.entries(budget, num_seen, min_entries, context.max_entries)[context.layer]
            for budget, num_seen, min_entries in zip(request.budget, request.num_seen, request.min_entries, strict=True)
        ]
        entries = torch.tensor(rows)
        return entries if context.sharding is None else context.sharding.local_part(entries, 1)

    def entries(
        self, budget: int, num_seen: int, min_entries: int = 0, max_entries: int | None = None
    ) -> list[list[int]]:
        """Return the number of entries of every layer and head; they sum to the budget × the number of heads.

        Args:
            budget: mean number of entries over all heads.
            num_seen: number of tokens, the upper limit of every head.
            min_entries: smallest number of entries of a head, unless the budget is smaller.
            max_entries: largest number of entries of a head, unless the budget is larger; None for no limit.

        Raises:
            ValueError: `profile` is None.

        """
        upper = num_seen if max_entries is None else min(num_seen, max(max_entries, budget))
        lower = max(min_entries, int(self.floor * budget))
        return _entries(self._attention(), self.power, budget, lower, upper)

    def _attention(self) -> tuple[tuple[float, ...], ...]:
        if self.profile is None:
            raise ValueError("profile must be a Profile, got None. Call `bind(model)` first, as a CompressedCache does")
        return self.profile.attention

    def __str__(self) -> str:
        return "head profile"


@functools.lru_cache(maxsize=64)
def _entries(
    attention: tuple[tuple[float, ...], ...], power: float, budget: int, lower: int, upper: int
) -> list[list[int]]:
    """Compute `HeadProfile.entries`. The result is cached, because all layers use the same table."""
    demand = np.concatenate([np.array(layer) for layer in attention]) ** power
    lower, total = min(lower, budget), budget * demand.size
    if budget >= upper:
        return [[upper] * len(layer) for layer in attention]
    # Bisection: the total increases with c, from lower · heads to upper · heads.
    low, high = 0.0, upper / demand.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * demand, lower, upper).sum() < total else (low, middle)
    exact = np.clip(high * demand, lower, upper)
    entries = np.floor(exact).astype(int)
    # Rounding down leaves entries over. The heads with the largest remainders get them.
    num_left = total - int(entries.sum())
    while num_left > 0:
        has_room = entries < upper
        remainder = np.where(has_room, exact - entries, -np.inf)
        receivers = np.argsort(-remainder, kind="stable")[: min(num_left, int(has_room.sum()))]
        entries[receivers] += 1
        num_left -= len(receivers)
    ends = np.cumsum([len(layer) for layer in attention])
    return [part.tolist() for part in np.split(entries, ends[:-1])]
