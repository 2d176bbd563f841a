"""Head profiles: how many entries each head of a model needs, measured once, and budgets that follow."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from suffice.kv.budget.allocation import Allocation, Request, check_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Profile:
    """What each head of a model needs of its cache.

    Args:
        attention: for each compressed layer and KV head, the mean over cached tokens of the most attention that a
            token gets from any query of one reconstruction pass, between 0 and 1.
        model: identity of the model, `suffice.kv.hf.fingerprint.fingerprint`.
        source: what it was measured on.

    """

    attention: tuple[tuple[float, ...], ...]
    model: str
    source: str

    def __post_init__(self) -> None:
        sizes = {len(layer) for layer in self.attention}
        values = [value for layer in self.attention for value in layer]
        if len(sizes) != 1 or not values or not all(0 < value < float("inf") for value in values):
            raise ValueError("attention of a profile must hold a positive number for each layer and head")


@dataclass(frozen=True)
class HeadProfile(Allocation):
    """Budgets after a head profile: B_h = clip(κ·a_h^power, floor·B, seen), κ such that the total is exact.

    Args:
        profile: the model's; None for the one that the cache looks up, or measures when it is first needed.
        power: how strongly budgets follow the profile; 0 is equal budgets.
        floor: part of the mean budget that every head gets, never less than what is protected.

    """

    profile: Profile | None = None
    power: float = 0.7
    floor: float = 0.2

    def __post_init__(self) -> None:
        check_part("floor", self.floor)
        if not 0 <= self.power < float("inf"):
            raise ValueError(f"power is {self.power}; accepted: 0 or more")

    @property
    def ragged(self) -> bool:
        """Heads of one layer differ."""
        return True

    def bound(self, model: PreTrainedModel) -> HeadProfile:
        """Return the allocation with the profile of a model.

        Raises:
            ValueError: the profile that it has is another model's.

        """
        from suffice.kv.budget.calibration import profile_of
        from suffice.kv.hf.fingerprint import fingerprint

        if self.profile is None:
            return replace(self, profile=profile_of(model))
        if self.profile.model != (own := fingerprint(model)):
            raise ValueError(
                f"profile is that of model {self.profile.model}, not of this one, {own}; accepted: None, or what "
                "`suffice.kv.budget.calibration.calibrate` returns for this model"
            )
        return self

    def tokens(self, request: Request) -> Tensor:
        """Return the budgets of the layer's heads."""
        if self.profile is None:
            raise ValueError("profile is None; accepted: a profile, or let a CompressedCache look it up")
        shape = (len(self.profile.attention), len(self.profile.attention[0]))
        if shape != (request.layers, request.heads):
            raise ValueError(
                f"profile is of {shape[0]} layers and {shape[1]} heads; accepted: {request.layers} layers and "
                f"{request.heads} heads"
            )
        rows = [
            self.budgets(budget, seen, least, request.most)[request.layer]
            for budget, seen, least in zip(request.budget, request.seen, request.least, strict=True)
        ]
        tokens = torch.tensor(rows)
        return tokens if request.sharding is None else request.sharding.local_part(tokens, 1)

    def budgets(self, budget: int, seen: int, least: int = 0, most: int | None = None) -> list[list[int]]:
        """Return the entries of every layer and head: whole numbers that sum to budget × layers × heads.

        Args:
            budget: mean over all heads.
            seen: tokens that there are, the most that a head can keep.
            least: the fewest that a head keeps.
            most: the most that a head keeps, unless the mean itself is more; None if there is no limit.

        """
        most = seen if most is None else min(seen, max(most, budget))
        return _budgets(self, budget, most, max(least, int(self.floor * budget)))

    def __str__(self) -> str:
        return "head profile"


@functools.lru_cache(maxsize=64)
def _budgets(allocation: HeadProfile, budget: int, most: int, least: int) -> list[list[int]]:
    assert allocation.profile is not None
    attention = np.array(allocation.profile.attention)
    need = attention.ravel() ** allocation.power
    least, total = min(least, budget), budget * need.size
    if budget >= most:
        return [[most] * attention.shape[1]] * attention.shape[0]
    # The total rises with κ from least·heads to most·heads: halve the interval in which it is met.
    low, high = 0.0, most / need.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * need, least, most).sum() < total else (low, middle)
    exact = np.clip(high * need, least, most)
    whole = np.floor(exact).astype(int)
    # What rounding down left over goes to the largest remainders.
    left = total - int(whole.sum())
    while left > 0:
        remainder = np.where(whole < most, exact - whole, -np.inf)
        take = np.argsort(-remainder, kind="stable")[: min(left, int((whole < most).sum()))]
        whole[take] += 1
        left -= len(take)
    return whole.reshape(attention.shape).tolist()
