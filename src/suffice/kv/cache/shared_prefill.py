"""One prefill for several caches: compare policies on the same tensors at the price of one forward pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.hook import Call, mark
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer


def prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], caches: Sequence[CompressedCache], *, share: bool = False
) -> SharedPrefill:
    """Run one prefill that fills several empty caches of the model, each by its own policy and budget.

    Args:
        model: the model that the caches were made for.
        inputs: `input_ids` [batch, tokens] and, with padding, `attention_mask`.
        caches: empty caches.
        share: compute statistics that several policies look at once for all of them, as the attention that tokens
            received; the seconds of a cache then are what it took on top of those before it.

    Returns:
        The last token's logits and the seconds that each cache took to score and evict.

    Raises:
        ValueError: no cache, or one that has already seen tokens.

    """
    if not caches:
        raise ValueError("caches is empty; accepted: one or more empty CompressedCache")
    for number, cache in enumerate(caches):
        if cache.get_seq_length():
            raise ValueError(f"caches[{number}] has seen {cache.get_seq_length()} tokens; accepted: empty ones")
    shared = SharedPrefill(caches, share)
    with torch.no_grad():
        out: Any = model(**inputs, past_key_values=shared, use_cache=True, logits_to_keep=1)
    shared.logits = out.logits[:, -1]
    return shared


class SharedPrefill(Cache):
    """Stands in for several caches during one prefill.

    Attributes:
        logits: [batch, vocabulary], of the last token.
        seconds: for each cache, what its scoring and eviction took.

    """

    def __init__(self, caches: Sequence[CompressedCache], share: bool = False) -> None:
        self.seconds = [0.0] * len(caches)
        self.logits = torch.empty(0)
        columns: list[tuple[Any, ...]] = list(zip(*(cache.layers for cache in caches), strict=True))
        super().__init__(
            layers=[
                _SharedLayer(column, self.seconds, share) if isinstance(column[0], CompressedLayer) else _Stock(column)
                for column in columns
            ]
        )


class _SharedLayer(DynamicLayer):
    """Hands one attention call to the layer of every cache."""

    def __init__(self, layers: tuple[CompressedLayer, ...], seconds: list[float], share: bool) -> None:
        super().__init__()
        self._layers, self._seconds, self._share = layers, seconds, share

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer in self._layers:
            layer.update(key_states, value_states)
        return mark(key_states, self), value_states

    def before(self, call: Call) -> Call | None:
        for layer in self._layers:
            layer.before(call)
        return call

    def attend(self, call: Call) -> Tensor:
        raise AssertionError("a prefill reads the new tokens only")

    def after(self, call: Call, attention: Tensor | None) -> None:
        if self._share:
            call = replace(call, memo={})
        for number, layer in enumerate(self._layers):
            start = time.perf_counter()
            layer.after(call, attention)
            self._seconds[number] += time.perf_counter() - start


class _Stock(DynamicLayer):
    """Fills the layer that no policy touches, as a sliding window, in every cache."""

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
