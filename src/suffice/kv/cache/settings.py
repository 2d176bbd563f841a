"""Settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.budget.protection import Protection
from suffice.kv.cache.memory import MemoryBudget
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.repair import NUM_REMEMBERED
from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import UniformStorage

STORAGES: dict[str, type[Storage]] = {
    storage.kind: storage for storage in (UniformStorage, RaggedStorage, QuantizedStorage)
}


@dataclass(frozen=True)
class StorageConfig:
    """How a layer stores its entries.

    Args:
        per_head: whether heads of a layer may keep different numbers of entries.
        quantization: how entries are quantized; None if they are not.

    """

    per_head: bool = False
    quantization: Quantization | None = None

    @property
    def bits(self) -> tuple[int, int] | None:
        """Number of bits of keys and of values; None if they are not quantized."""
        return None if self.quantization is None else self.quantization.bits

    def store_all(self, entries: Entries, query_moments: Tensor | None = None, *, padded: bool) -> Storage:
        """Store all entries, without copying them if they are not quantized.

        Args:
            entries: all entries.
            query_moments: see `QuantizedStorage.gather`.
            padded: whether some slots may be empty.

        """
        if self.quantization is None:
            return UniformStorage.from_all(entries, padded=padded)
        slots = torch.arange(entries.keys.shape[2], device=entries.keys.device).expand(entries.keys.shape[:3])
        kept = slots.where(entries.positions >= 0, -1)
        return QuantizedStorage.gather(entries, kept, self.quantization, query_moments)

    def store_kept(
        self, entries: Entries, kept: Tensor, counts: Tensor | None, query_moments: Tensor | None = None
    ) -> Storage:
        """Copy the kept entries into a new storage; see `gather` of the storages for the arguments."""
        if self.quantization is not None:
            return QuantizedStorage.gather(entries, kept, self.quantization, query_moments)
        storage = RaggedStorage if self.per_head else UniformStorage
        return storage.gather(entries, kept, counts)


@dataclass(frozen=True)
class CacheSettings:
    """Settings that all layers of a cache share.

    Args:
        policy: which entries to keep.
        budget: number of entries to keep in each head, on average, or fraction of the tokens seen; None if it follows
            from `memory`.
        protection: which entries are always kept.
        evict_always: keep evicting after the prefill; False evicts after the first forward pass only.
        interval: with `evict_always`, number of generated tokens between evictions.
        rerotate: rotate kept keys to consecutive positions.
        measure_capacity: measure the share of the capacity that is kept.
        num_layers: number of compressed layers.
        storage: how the kept entries are stored.
        sharding: how the heads are split over processes; None if they are not.
        max_entries: largest number of entries that a head may keep; None for no limit.
        memory: limit on the bytes, from which the number of entries, the interval and the bits follow; None if `budget`
            is given.
        repair: repair the kept entries after an eviction.

    """

    policy: Policy
    budget: float | None
    protection: Protection
    evict_always: bool
    interval: int
    rerotate: bool
    measure_capacity: bool
    num_layers: int
    storage: StorageConfig
    sharding: Sharding | None = None
    max_entries: int | None = None
    memory: MemoryBudget | None = None
    repair: bool = False

    @property
    def num_queries_needed(self) -> int | None:
        """Number of newest queries that an eviction needs; None for all since the last eviction."""
        needed = self.policy.weights.num_queries_needed
        return needed if needed is None or not self.repair else max(needed, NUM_REMEMBERED)

    def sharding_of(self, num_heads: int) -> Sharding | None:
        """Return how a layer with `num_heads` KV heads on this process is split; None if it has all heads."""
        return self.sharding if self.sharding is not None and self.sharding.is_split(num_heads) else None
