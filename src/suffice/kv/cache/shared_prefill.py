"""One prefill for several caches, to compare policies on the same tensors with a single forward pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.group import CacheGroup
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.source_layer import SourceLayer


@dataclass(frozen=True)
class PrefillResult:
    """The result of a prefill of several caches.

    Args:
        logits: logits of the last token, [batch, vocabulary].
        seconds: time that each cache took to score and evict, including the replay, if there was one.

    """

    logits: Tensor
    seconds: list[float]


class SharedPrefill(CacheGroup):
    """A cache that passes the attention calls of one prefill to several caches.

    Args:
        caches: empty caches.
        share_statistics: compute statistics that several policies use only once for all caches.

    Attributes:
        seconds: time that each cache took to score and evict.

    """

    def __init__(self, caches: Sequence[CompressedCache], share_statistics: bool = False) -> None:
        self.seconds = [0.0] * len(caches)
        self._share_statistics = share_statistics
        super().__init__(caches)

    def make_layer(self, layers: tuple[Any, ...]) -> Any:
        """Return a layer of this cache."""
        if isinstance(layers[0], CompressedLayer):
            return _SharedCompressedLayer(layers, self.seconds, self._share_statistics)
        return _SharedOtherLayer(layers)

    def states_before(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the first layer: all are empty."""
        return layers[:1]

    def row_of_cache(self, number: int) -> None:
        """Return None: every cache has all rows."""


class _SharedCompressedLayer(DynamicLayer):
    """Passes one attention call to the compressed layer of every cache."""

    def __init__(self, layers: tuple[CompressedLayer, ...], seconds: list[float], share_statistics: bool) -> None:
        super().__init__()
        self._layers, self._seconds, self._share_statistics = layers, seconds, share_statistics
        self.is_sliding = layers[0].is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer in self._layers:
            layer.update(key_states, value_states)
        return self._layers[0].observe_call(key_states, self), value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if isinstance(self._layers[0], SourceLayer) and not self._layers[0].owns(call):
            return run_attention(call)  # of a later layer that reads the same keys
        for layer in self._layers:
            layer.pre_attention(call)
        output, attention = run_attention(call)
        if self._share_statistics:
            call = replace(call, memo={})
        for number, layer in enumerate(self._layers):
            start = time.perf_counter()
            layer.post_attention(call, attention)
            self._seconds[number] += time.perf_counter() - start
        return output, attention


class _SharedOtherLayer(DynamicLayer):
    """Updates a layer that is not compressed, for example one with a sliding window, in every cache."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        super().__init__()
        self._layers = layers
        self.is_sliding = bool(getattr(layers[0], "is_sliding", False))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer in self._layers:
            layer.update(key_states.clone(), value_states.clone(), *args, **kwargs)
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._layers[0].get_mask_sizes(query_length)
