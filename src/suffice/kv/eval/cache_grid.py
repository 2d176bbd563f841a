"""Grids of policies, allocations and budgets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from suffice.kv.budget.protection import Protection
from suffice.kv.policy.registry import get_allocation, get_policy
from suffice.plain_numbers import plain_number

OWN_ALLOCATION = "own"
"""Name that stands for the policy's own allocation."""


@dataclass(frozen=True)
class CacheGrid:
    """All combinations of policies, allocations and budgets.

    Args:
        policies: names of policies.
        allocations: names of allocations; `"own"` stands for each policy's own allocation.
        budgets: numbers of tokens, or fractions of the tokens seen.

    Example:
        >>> CacheGrid(["capkv-profile"], ["own", "profile"], [0.5]).combinations()
        [('capkv-profile', 'own', 0.5)]

    """

    policies: Sequence[str]
    allocations: Sequence[str]
    budgets: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", [plain_number(budget) for budget in self.budgets])

    def check(self) -> None:
        """Check all names and budgets.

        Raises:
            TypeError, ValueError: an axis is empty or has duplicates, a name is unknown, or a budget is out of range.

        """
        axes = {"policies": self.policies, "allocations": self.allocations, "budgets": self.budgets}
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
