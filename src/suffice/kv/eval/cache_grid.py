"""Grids of policies, allocations, budgets and numbers of bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from suffice.kv.budget.protection import Protection
from suffice.kv.policy.registry import get_allocation, get_policy
from suffice.kv.storage.quantization import Bits, shortest_bits
from suffice.plain_numbers import plain_number

OWN_ALLOCATION = "own"
"""Name that stands for the policy's own allocation."""


class GridCache(NamedTuple):
    """A cache of a grid.

    Args:
        policy: name of the policy.
        allocation: name of the allocation, or `"own"`.
        budget: number of tokens, or fraction of the tokens seen.
        bits: number of bits of quantized entries; None if they are not quantized.

    """

    policy: str
    allocation: str
    budget: float
    bits: Bits | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the cache in the results of a run; `bits` only if it is quantized."""
        settings = self._asdict()
        if self.bits is None:
            del settings["bits"]
        return settings


@dataclass(frozen=True)
class CacheGrid:
    """All combinations of policies, allocations, budgets and numbers of bits.

    Args:
        policies: names of policies.
        allocations: names of allocations; `"own"` stands for each policy's own allocation.
        budgets: numbers of tokens, or fractions of the tokens seen.
        bits: numbers of bits of quantized entries, or pairs (bits of keys, bits of values); None stands for the
            model's dtype.

    Example:
        >>> CacheGrid(["capkv-profile"], ["own", "profile"], [0.5]).combinations()
        [('capkv-profile', 'own', 0.5)]

    """

    policies: Sequence[str]
    allocations: Sequence[str]
    budgets: Sequence[float]
    bits: Sequence[Bits | None] = (None,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", [plain_number(budget) for budget in self.budgets])
        if isinstance(self.bits, str) or not isinstance(self.bits, Sequence):
            raise TypeError(f"bits of a grid must be a list, such as [None, 4, (4, 2)], got {self.bits!r}")
        object.__setattr__(self, "bits", [shortest_bits(bits) for bits in self.bits])

    def check(self) -> None:
        """Check all names and budgets.

        Raises:
            TypeError, ValueError: an axis is empty or has duplicates, a name is unknown, or a budget is out of range.

        """
        axes = {name: getattr(self, name) for name in ("policies", "allocations", "budgets", "bits")}
        for name, values in axes.items():
            if not values or len({str(value) for value in values}) < len(values):
                raise ValueError(f"{name} must hold at least one value and no duplicates, got {list(values)!r}")
        for policy in self.policies:
            get_policy(policy)
        for allocation in self.allocations:
            if allocation != OWN_ALLOCATION:
                get_allocation(allocation)
        for budget in self.budgets:
            Protection().check(budget)

    def settings(self) -> dict[str, Any]:
        """Return the fields as settings of a run. `bits` is left out if no cache is quantized.

        Runs that were stored before grids had bits keep their keys this way.
        """
        settings = asdict(self)
        if settings["bits"] == [None]:
            del settings["bits"]
        return settings

    def caches(self) -> list[GridCache]:
        """Return every cache of the grid: each of `combinations()` with every number of bits, which varies fastest."""
        return [GridCache(*combination, bits) for combination in self.combinations() for bits in self.bits]

    def combinations(self) -> list[tuple[str, str, float]]:
        """Return every (policy, allocation, budget); the budget varies fastest.

        An allocation that equals the policy's own is left out if the grid also contains `"own"`.
        """
        return [
            (policy, allocation, budget)
            for policy, allocation, budget in itertools.product(self.policies, self.allocations, self.budgets)
            if allocation == OWN_ALLOCATION
            or OWN_ALLOCATION not in self.allocations
            or get_policy(policy).allocation != get_allocation(allocation)
        ]
