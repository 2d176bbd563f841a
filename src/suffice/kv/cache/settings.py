"""Settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass

from suffice.kv.budget.protection import Protection
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.storage.build import StorageConfig


@dataclass(frozen=True)
class CacheSettings:
    """Settings that all layers of a cache share.

    Args:
        policy: which entries to keep.
        budget: entries to keep in each head, or a fraction of the tokens seen.
        protection: which entries are always kept.
        evict_always: hold the budget at all times; False evicts after the first forward pass only.
        interval: with `evict_always`, number of generated tokens between evictions.
        rerotate: move kept keys together by their rotary embedding.
        measure_capacity: measure the share of the capacity that is kept.
        num_layers: number of compressed layers.
        storage: what the kept entries are stored in.
        sharding: how the heads are split over processes; None if they are not.
        max_entries: largest number of entries that a head may keep; None for no limit.

    """

    policy: Policy
    budget: float
    protection: Protection
    evict_always: bool
    interval: int
    rerotate: bool
    measure_capacity: bool
    num_layers: int
    storage: StorageConfig
    sharding: Sharding | None = None
    max_entries: int | None = None
