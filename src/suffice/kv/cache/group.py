"""The base class of caches that pass each forward pass on to several caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from suffice.kv.cache.cache import CompressedCache


class CacheGroup(Cache):
    """A cache that passes each forward pass on to several caches of one model.

    Args:
        caches: the caches.
        layers: layers of this cache.

    """

    def __init__(self, caches: Sequence[CompressedCache], layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.caches = tuple(caches)

    def begin_pass(self, decoder: nn.Module) -> None:
        """Prepare every cache for a forward pass."""
        for cache in self.caches:
            cache.begin_pass(decoder)

    def end_pass(self, *, failed: bool) -> None:
        """Finish the forward pass in every cache."""
        for cache in self.caches:
            cache.end_pass(failed=failed)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values to a layer and return what its attention reads."""
        for cache in self.caches:
            cache.will_store()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
