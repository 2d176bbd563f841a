"""The base class of caches that pass each forward pass on to several caches."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from suffice.arguments import check_list, shown
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import copy_states, has_linear_states


def check_caches(caches: object, hint: str = "") -> list[CompressedCache]:
    """Return the argument `caches` of a function as a list.

    Args:
        caches: the argument.
        hint: text after the error that a cache occurs twice.

    Raises:
        TypeError: it is not a list of caches.
        ValueError: there is no cache, or a cache occurs twice.

    """
    accepted = "CompressedCaches", "[cache]"
    if isinstance(caches, Cache):  # which can be iterated in some versions of transformers
        raise TypeError(f"caches must be a list of {accepted[0]}, such as {accepted[1]}, got a {type(caches).__name__}")
    items = check_list("caches", caches, *accepted)
    for index, cache in enumerate(items):
        if not isinstance(cache, CompressedCache):
            raise TypeError(f"caches must hold {accepted[0]}, got {shown(cache)} as item {index}")
    if not items:
        raise ValueError("caches must hold at least one CompressedCache, got none")
    if len(set(map(id, items))) < len(items):
        raise ValueError(f"caches must be different, got the same CompressedCache twice{hint}")
    return items


class CacheGroup(Cache, ABC):
    """A cache that passes each forward pass on to several caches of one model.

    Args:
        caches: the caches.

    """

    def __init__(self, caches: Sequence[CompressedCache]) -> None:
        self.caches = tuple(caches)
        super().__init__(layers=[self._group_layer(layers) for layers in self.layers_by_index])

    @property
    def layers_by_index(self) -> list[tuple[Any, ...]]:
        """For each layer, the layers of all caches."""
        return list(zip(*(cache.layers for cache in self.caches), strict=True))

    @abstractmethod
    def make_layer(self, layers: tuple[Any, ...]) -> Any:
        """Return a layer of this cache that passes keys and values on to a layer of each cache."""

    def _group_layer(self, layers: tuple[Any, ...]) -> Any:
        first = layers[0]
        if not has_linear_states(first):
            # A layer without `get_seq_length` stores nothing.
            return self.make_layer(layers) if hasattr(first, "get_seq_length") else first
        group_layer = copy.copy(first)
        if isinstance(group_layer, CompressedLayer):
            from suffice.kv.cache.hybrid_layer import HybridGroupLayer

            group_layer = HybridGroupLayer(self.make_layer(layers), first.number_of_states)
        copy_states(self.states_before(layers), group_layer)
        return group_layer

    def begin_pass(self, decoder: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Prepare every cache for a forward pass."""
        for cache in self.caches:
            cache.begin_pass(decoder, inputs)

    def end_pass(self, *, failed: bool) -> None:
        """Finish the forward pass in every cache."""
        if not failed:
            self.return_states()
        for cache in self.caches:
            cache.end_pass(failed=failed)

    @abstractmethod
    def states_before(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the layers whose states of linear attention a pass of this cache starts from."""

    def return_states(self) -> None:
        """Give every cache the states of linear attention that a complete forward pass has left in this cache."""
        for group_layer, layers in zip(self.layers, self.layers_by_index, strict=True):
            if has_linear_states(group_layer):
                for number, layer in enumerate(layers):
                    copy_states([group_layer], layer, self.row_of_cache(number))

    @abstractmethod
    def row_of_cache(self, number: int) -> int | None:
        """Return the row of this cache that belongs to a cache; None if all rows do."""

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update the state of a convolution; see `transformers.Cache`."""
        self._will_store()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update the state of a layer with linear attention; see `transformers.Cache`."""
        self._will_store()
        return super().update_recurrent_state(*args, **kwargs)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values to a layer and return what its attention reads."""
        self._will_store()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _will_store(self) -> None:
        for cache in self.caches:
            cache.will_store()
