"""Grids of policies, allocations, budgets or limits on the bytes, numbers of bits, and repair."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from suffice.arguments import check_list, check_names
from suffice.kv.budget.memory_limit import format_memory, parse_memory
from suffice.kv.budget.protection import Protection
from suffice.kv.eval.fidelity import CacheConfig
from suffice.kv.policy.names import OWN_ALLOCATION, canonical_name
from suffice.kv.policy.registry import get_allocation, get_policy
from suffice.kv.storage.quantization import Bits, bits_suffix, shortest_bits
from suffice.plain_numbers import plain_number
from suffice.study.results import Group

_DEFAULTS: dict[str, Any] = {"bits": None, "memory": None, "repair": False}
_DEFAULT_BUDGETS = (0.25,)
_EXAMPLES = {
    "policies": ("names of policies", "['capkv', 'h2o']"),
    "allocations": ("names of allocations", "['own', 'equal']"),
    "budgets": ("budgets", "[0.5, 0.25]"),
    "bits": ("numbers of bits", "[None, 4, (4, 2)]"),
    "memory": ("limits on the bytes", "[0.1, '2GiB']"),
    "repair": ("booleans", "[False, True]"),
}
_OPTIONAL = ("budgets", "memory")


class GridCache(NamedTuple):
    """A cache of a grid.

    Args:
        policy: name of the policy.
        allocation: name of the allocation, or `"own"`.
        budget: number of tokens, or fraction of the tokens seen; None with `memory`.
        bits: number of bits of quantized entries; None if they are not quantized, or follow from `memory`.
        memory: limit on the bytes, as a fraction or a number; None with `budget`.
        repair: whether kept entries are repaired.

    """

    policy: str
    allocation: str
    budget: float | None
    bits: Bits | None = None
    memory: float | None = None
    repair: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the cache in the results of a run.

        `bits`, `memory` and `repair` are left out if they have their defaults.
        """
        return {
            name: value for name, value in self._asdict().items() if name not in _DEFAULTS or value != _DEFAULTS[name]
        }

    def config(self) -> CacheConfig:
        """Return the configuration of the cache."""
        allocation = None if self.allocation == OWN_ALLOCATION else self.allocation
        return CacheConfig(self.policy, self.budget, allocation, self.bits, self.memory, self.repair)


@dataclass(frozen=True)
class CacheGrid:
    """All combinations of policies, allocations, budgets (or limits on the bytes), numbers of bits, and repair.

    Args:
        policies: names of policies.
        allocations: names of allocations; `"own"` stands for each policy's own allocation.
        budgets: numbers of tokens, or fractions of the tokens seen; None means `[0.25]`, or none with `memory`.
        bits: numbers of bits of quantized entries, or pairs (bits of keys, bits of values); None stands for the
            model's dtype, or for the bits that follow from `memory`.
        memory: limits on the bytes instead of budgets: fractions, or numbers of bytes such as `"2GiB"`.
        repair: whether kept entries are repaired: `[False]`, `[True]`, or `[False, True]` for both.

    Raises:
        TypeError: an argument is not a list, `policies` or `allocations` holds something else than strings, `bits` is
            a tuple of two numbers, which may mean a pair, or `repair` holds something else than booleans.
        ValueError: a number of bits or a limit is not accepted, or both `budgets` and `memory` are given.

    Example:
        >>> CacheGrid(["capkv-profile"], ["own", "profile"], [0.5]).caches()
        [GridCache(policy='capkv-profile', allocation='own', budget=0.5, bits=None, memory=None, repair=False)]

    """

    policies: Sequence[str]
    allocations: Sequence[str]
    budgets: Sequence[float] | None = None
    bits: Sequence[Bits | None] = (None,)
    memory: Sequence[float | str] | None = None
    repair: Sequence[bool] = (False,)

    def __post_init__(self) -> None:
        if isinstance(self.bits, tuple) and len(self.bits) == 2 and all(isinstance(x, int) for x in self.bits):
            raise TypeError(
                f"bits must be a list, got the tuple {self.bits!r}. Write [{self.bits!r}] for one pair (bits of keys, "
                f"bits of values), or {list(self.bits)!r} for two numbers of bits"
            )
        for name, (items, example) in _EXAMPLES.items():
            values = getattr(self, name)
            if values is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, check_list(name, values, items, example))
        for name in ("policies", "allocations"):
            names = check_names(name, getattr(self, name), *_EXAMPLES[name])
            # One form of each name, so that its runs have one key and duplicates are found.
            object.__setattr__(self, name, [canonical_name(each) for each in names])
        object.__setattr__(self, "bits", [shortest_bits(bits) for bits in self.bits])
        object.__setattr__(self, "repair", [plain_number(flag) for flag in self.repair])
        if not all(isinstance(flag, bool) for flag in self.repair):
            raise TypeError(f"repair must hold True, False or both, got {self.repair!r}")
        if self.memory is not None:
            object.__setattr__(self, "memory", [parse_memory(limit) for limit in self.memory])
            if self.budgets is not None:
                raise ValueError(
                    f"budgets must be None with memory={self.memory!r}, from which they follow, got "
                    f"{list(self.budgets)!r}"
                )
        else:
            budgets = _DEFAULT_BUDGETS if self.budgets is None else self.budgets
            object.__setattr__(self, "budgets", [plain_number(budget) for budget in budgets])

    def check(self) -> None:
        """Check everything that does not depend on the model.

        Raises:
            TypeError, ValueError: an axis is empty or has duplicates, a name is unknown, a budget is out of range, or
                a policy or an allocation does not support repair.

        """
        for name, values in asdict(self).items():
            if values is not None and (not values or len({str(value) for value in values}) < len(values)):
                raise ValueError(f"{name} must hold at least one value and no duplicates, got {list(values)!r}")
        for budget in self.budgets or ():
            Protection().check(budget)
        for cache in self.caches():
            cache.config().check()

    def settings(self) -> dict[str, Any]:
        """Return the fields as settings of a run. `bits` and `repair` are left out if they have their defaults.

        `memory` or `budgets`, which is None, is also left out. Runs that were stored before grids had bits, limits on
        the bytes and repair keep their keys this way.
        """
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("bits", "repair"):
            if settings[name] == [_DEFAULTS[name]]:
                del settings[name]
        return settings

    def largest_first(self) -> CacheGrid:
        """Return the grid with its budgets, or its limits on the bytes, from the largest to the smallest."""
        if self.memory is not None:
            return replace(self, memory=sorted(map(parse_memory, self.memory), reverse=True))
        return replace(self, budgets=sorted(self.budgets or (), reverse=True))

    def caches(self) -> list[GridCache]:
        """Return every cache of the grid; repair varies fastest, then the number of bits, then the budget or limit.

        An allocation that equals the policy's own is left out if the grid also contains `"own"`.
        """
        sizes = [(budget, None) for budget in self.budgets or ()] + [
            (None, parse_memory(limit)) for limit in self.memory or ()
        ]
        return [
            GridCache(policy, allocation, budget, bits, limit, repair)
            for policy, allocation in self._methods()
            for budget, limit in sizes
            for bits in self.bits
            for repair in self.repair
        ]

    def _methods(self) -> list[tuple[str, str]]:
        """Return all pairs of a policy and an allocation, without those that are the same as another pair."""
        return [
            (policy, allocation)
            for policy, allocation in itertools.product(self.policies, self.allocations)
            if allocation == OWN_ALLOCATION
            or OWN_ALLOCATION not in self.allocations
            or get_policy(policy).allocation != get_allocation(allocation)
        ]


def mean_bytes(group: Group) -> float:
    """Return the bytes of everything that a cache holds, averaged over samples.

    Samples that were stored before all bytes were counted have those of the keys and values only. If there are such
    samples, only these bytes are compared.
    """
    is_complete = len(group.values.get("bytes", {})) == len(group.values["bytes_kept"])
    return group.interval("bytes" if is_complete else "bytes_kept").mean


def describe_size(budget: float | None, bits: Bits | None, memory: float | None, repair: bool = False) -> str:
    """Return text such as `budget 0.25, 4 bits, repair` or `memory 10%`."""
    size = f"budget {budget:g}" if memory is None else f"memory {format_memory(memory)}"
    return size + bits_suffix(bits) + repair_suffix(repair)


def repair_suffix(repair: bool) -> str:
    """Return text that follows the name or the size of a cache: `, repair` if its entries are repaired."""
    return ", repair" if repair else ""


def format_size(budget: float | None, bits: Bits | None, memory: float | None) -> str:
    """Return a budget, or a limit on the bytes, as text for tables: `25%, 4 bits`, `40` or `2 GiB of memory`."""
    if memory is not None:
        size = f"{format_memory(memory)} of memory"
    else:
        size = f"{budget:.0%}" if isinstance(budget, float) else str(budget)
    return size + bits_suffix(bits)
