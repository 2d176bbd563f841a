"""The arguments of a `CompressedCache`: their checks, and the settings that follow from them for a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from suffice.arguments import check_flag, check_optional_int
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.memory_limit import parse_limit
from suffice.kv.budget.protection import Protection
from suffice.kv.cache.layer_kinds import check_latents, check_repair, check_sliding
from suffice.kv.cache.memory import MemoryBudget, check_equal_layers
from suffice.kv.cache.positions import find_rotary_embeddings, max_rerotated_entries
from suffice.kv.cache.settings import CacheSettings, StorageConfig
from suffice.kv.hf.layers import caches_latents, compressed_layers, sliding_window, stock_layers
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_allocation, get_policy
from suffice.kv.storage.quantization import Quantization, parse_bits

_DEFAULT_INTERVAL = 512
_DEFAULT_BUDGET = 0.25


@dataclass(frozen=True)
class CacheArguments:
    """The arguments of a `CompressedCache`, which describes them, as they were given."""

    policy: str | Policy
    budget: float | None
    memory: float | str | None
    sinks: int | None
    window: int | None
    allocation: str | Allocation | None
    evict: str | None
    interval: int | None
    rerotate: bool
    measure_capacity: bool
    bits: int | tuple[int, int] | None
    repair: bool

    def check(self) -> CheckedArguments:
        """Check everything that does not depend on the model.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has a value that is not accepted.

        """
        policy = get_policy(self.policy)
        if self.allocation is not None:
            policy = replace(policy, allocation=get_allocation(self.allocation))
        protection = Protection(self.sinks, self.window)
        limit = parse_limit(self.memory, self.budget)
        budget = None
        if limit is None:
            budget = protection.check(_DEFAULT_BUDGET if self.budget is None else self.budget)
        evict_always = self._check_evict(policy, has_limit=limit is not None)
        interval = check_optional_int("interval", self.interval, 1)
        for name in ("rerotate", "measure_capacity", "repair"):
            check_flag(name, getattr(self, name))
        if self.repair:
            check_repair(policy, rerotate=self.rerotate)
        return CheckedArguments(
            policy=policy,
            budget=budget,
            protection=protection,
            limit=limit,
            evict_always=evict_always,
            interval=interval,
            rerotate=self.rerotate,
            measure_capacity=self.measure_capacity,
            quantization=self._check_quantization(),
            repair=self.repair,
        )

    def _check_evict(self, policy: Policy, *, has_limit: bool) -> bool:
        """Return whether evictions continue after the prefill."""
        if self.evict not in (None, "prefill", "always"):
            raise ValueError(f"evict must be 'prefill', 'always' or None, got {self.evict!r}")
        if policy.needs_replay and self.evict == "always":
            raise ValueError(
                f"evict must be 'prefill' or None with policy {policy.name!r}, which scores entries in a second "
                "pass over the prompt, got 'always'"
            )
        return has_limit and not policy.needs_replay if self.evict is None else self.evict == "always"

    def _check_quantization(self) -> Quantization | None:
        """Return how entries are quantized; None if they are not, or if it follows from the memory."""
        quantization = parse_bits(self.bits)
        if quantization is not None and self.rerotate:
            raise ValueError(
                f"bits must be None with rerotate=True, got {self.bits!r}: each rotation of a quantized key would add "
                "an error"
            )
        if self.memory is not None and self.rerotate:
            raise ValueError(f"memory must be None with rerotate=True, which does not quantize, got {self.memory!r}")
        return quantization


@dataclass(frozen=True)
class CheckedArguments:
    """The result of `CacheArguments.check`.

    Args:
        policy: which entries to keep.
        budget: number of entries, or fraction of the tokens seen; None if the memory is limited.
        protection: which entries are always kept.
        limit: limit on the bytes, see `MemoryBudget`; None if there is a budget.
        evict_always: whether evictions continue after the prefill.
        interval: number of generated tokens between evictions; None to choose it.
        rerotate: rotate kept keys to consecutive positions.
        measure_capacity: measure the share of the capacity that is kept, where this is possible.
        quantization: how entries are quantized; None if they are not, or if it follows from the memory.
        repair: repair the kept entries after an eviction.

    """

    policy: Policy
    budget: float | None
    protection: Protection
    limit: int | float | None
    evict_always: bool
    interval: int | None
    rerotate: bool
    measure_capacity: bool
    quantization: Quantization | None
    repair: bool

    def settings(self, model: PreTrainedModel) -> CacheSettings:
        """Return the settings of a cache for a model.

        Raises:
            ValueError: the model, or one of the arguments with this model, is not supported.

        """
        modules = compressed_layers(model)
        policy = self.policy
        if isinstance(policy.allocation, HeadProfile):
            policy = replace(policy, allocation=policy.allocation.bind(model))
        has_windows = sliding_window(stock_layers(model)[next(iter(modules))], model) is not None
        if has_windows:
            check_sliding(model, policy, rerotate=self.rerotate, repair=self.repair)
        # Raises an error if keys cannot be rotated.
        find_rotary_embeddings(model, list(modules), policy, rerotate=self.rerotate, repair=self.repair)
        max_entries = self._max_entries(model)
        memory, quantization = None, self.quantization
        if self.limit is not None:
            check_equal_layers(modules.values(), policy)
            memory = self._memory_budget(self.limit, policy)
            quantization = quantization or Quantization()
        has_latents = any(map(caches_latents, modules.values()))
        per_head = has_windows or (policy.allocation.per_head and not has_latents)
        measures_capacity = not (self.evict_always or policy.allocation.is_global or policy.needs_replay)
        settings = CacheSettings(
            policy=policy,
            budget=self.budget,
            protection=self.protection,
            evict_always=self.evict_always,
            # Evict before generated tokens fill the rest of the context window.
            interval=min(self.interval or _DEFAULT_INTERVAL, max_entries or sys.maxsize),
            rerotate=self.rerotate,
            measure_capacity=self.measure_capacity and measures_capacity,
            num_layers=len(modules),
            storage=StorageConfig(per_head, quantization),
            sharding=Sharding.from_model(model),
            max_entries=max_entries,
            memory=memory,
            repair=self.repair,
        )
        if has_latents:
            check_latents(model, policy, repair=self.repair)
        return settings

    def _max_entries(self, model: PreTrainedModel) -> int | None:
        """Return the largest number of entries that a head may keep; None for no limit."""
        window = context_window(model) if self.rerotate else None
        return None if window is None or self.budget is None else max_rerotated_entries(window, self.budget)

    def _memory_budget(self, limit: int | float, policy: Policy) -> MemoryBudget:
        bits = None if self.quantization is None else self.quantization.bits
        return MemoryBudget(limit, policy, self.protection, self.evict_always, bits, self.interval, self.repair)
