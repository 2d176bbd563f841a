"""Which storage holds the kept entries of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.quantized import Quantization, QuantizedStorage
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import UniformStorage

STORAGES: dict[str, type[Storage]] = {
    storage.kind: storage for storage in (UniformStorage, RaggedStorage, QuantizedStorage)
}


@dataclass(frozen=True)
class StorageConfig:
    """What a layer stores its entries in.

    Args:
        per_head: whether heads of a layer may keep different numbers of entries.
        quantization: how entries are quantised; None if they are not.

    """

    per_head: bool = False
    quantization: Quantization | None = None

    def store_all(self, entries: Entries, *, padded: bool) -> Storage:
        """Store all entries without copying them; `padded` if some slots may be empty."""
        return UniformStorage.from_all(entries, padded=padded)

    def store_kept(self, entries: Entries, kept: Tensor, counts: Tensor | None) -> Storage:
        """Copy the kept entries into a new storage; arguments as of `UniformStorage.gather`."""
        storage = RaggedStorage if self.per_head else UniformStorage
        return storage.gather(entries, kept, counts)

    def quantize(self, storage: Storage) -> Storage:
        """Return a storage with its entries quantised, if this configuration quantises and they are not yet."""
        if self.quantization is None or not isinstance(storage, UniformStorage):
            return storage
        entries = Entries(storage.keys, storage.values, storage.positions, storage.rope_positions, storage.columns)
        return QuantizedStorage(entries, self.quantization)
