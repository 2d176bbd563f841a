"""Settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffice.kv.budget.protection import Protection
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.quantized import Quantization, QuantizedStorage
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

    def store_all(self, entries: Entries, *, padded: bool) -> Storage:
        """Store all entries without copying them. `padded` means that some slots may be empty."""
        return UniformStorage.from_all(entries, padded=padded)

    def store_kept(self, entries: Entries, kept: Tensor, counts: Tensor | None) -> Storage:
        """Copy the kept entries into a new storage; see `UniformStorage.gather` for the arguments."""
        storage = RaggedStorage if self.per_head else UniformStorage
        return storage.gather(entries, kept, counts)

    def quantize(self, storage: Storage) -> Storage:
        """Return a storage with quantized entries if this configuration asks for it, otherwise the storage itself."""
        if self.quantization is None or not isinstance(storage, UniformStorage):
            return storage
        entries = Entries(storage.keys, storage.values, storage.positions, storage.rope_positions, storage.columns)
        return QuantizedStorage(entries, self.quantization)


@dataclass(frozen=True)
class CacheSettings:
    """Settings that all layers of a cache share.

    Args:
        policy: which entries to keep.
        budget: number of entries to keep in each head, on average, or fraction of the tokens seen.
        protection: which entries are always kept.
        evict_always: keep evicting after the prefill; False evicts after the first forward pass only.
        interval: with `evict_always`, number of generated tokens between evictions.
        rerotate: rotate kept keys to consecutive positions.
        measure_capacity: measure the share of the capacity that is kept.
        num_layers: number of compressed layers.
        storage: how the kept entries are stored.
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


def check_quantization(quantized: str | Quantization | None, policy: Policy) -> Quantization | None:
    """Check how entries are to be quantized, which may be a name; None if they are not.

    Raises:
        TypeError: the argument has the wrong type.
        ValueError: the name is not known, or heads may keep different numbers of entries.
        ImportError: a package that is needed is not installed.

    """
    if quantized is None:
        return None
    if not isinstance(quantized, (str, Quantization)):
        raise TypeError(f"quantized must be a name, a Quantization or None, got {quantized!r}")
    if policy.allocation.per_head:
        raise ValueError(
            f"quantized must be None for heads of unequal length (allocation {policy.allocation}), got {quantized!r}. "
            "Use allocation='equal' or 'pyramid'; the best policy is then 'capkv'"
        )
    quantization = Quantization(quantized) if isinstance(quantized, str) else quantized
    quantization.check()
    return quantization
