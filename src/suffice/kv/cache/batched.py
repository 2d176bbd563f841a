"""Batches of caches: one forward pass continues from several caches, with one row of the batch for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.call import AttentionCall
from suffice.kv.attention.masks import additive_mask
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.group import CacheGroup, check_caches
from suffice.kv.cache.layer import CompressedLayer


class BatchedCaches(CacheGroup):
    """A batch of several caches, each with one row, that have seen the same number of tokens.

    Row r of the batch continues from `caches[r]`, and its attention is the same as with this cache alone. The new
    tokens of each row are added to its cache. Pass copies to leave the caches unchanged.

    Args:
        caches: caches with a batch of one, without padding, all of the same model.

    Raises:
        TypeError: `caches` is not a list of caches.
        ValueError: there is no cache, a cache occurs twice, the caches have seen different numbers of tokens, or a
            cache has several rows or padding.

    Example:
        >>> rows = BatchedCaches([cache.copy() for cache in caches])      # doctest: +SKIP
        >>> model(ids.expand(len(caches), -1), past_key_values=rows)      # doctest: +SKIP

    """

    def __init__(self, caches: Sequence[CompressedCache]) -> None:
        caches = check_caches(caches, hint=". Pass a copy() for each row")
        num_seen = [cache.get_seq_length() for cache in caches]
        if len(set(num_seen)) > 1:
            raise ValueError(f"caches must have seen the same number of tokens, got {num_seen}")
        for number, cache in enumerate(caches):
            padding = cache.compressed_layers[0].state.num_padding
            if len(padding) > 1 or any(padding):
                raise ValueError(
                    f"caches[{number}] must hold one row without padding, got {len(padding)} rows with {sum(padding)} "
                    "tokens of padding"
                )
        super().__init__(caches)

    def make_layer(self, layers: tuple[Any, ...]) -> Any:
        """Return a layer of the batch."""
        return (_BatchedCompressedLayer if isinstance(layers[0], CompressedLayer) else _BatchedOtherLayer)(layers)

    def states_before(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all layers: each is one row."""
        return layers

    def row_of_cache(self, number: int) -> int:
        """Return the row of a cache."""
        return number

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchedCaches:
        """Return a batch of copies of the caches."""
        return BatchedCaches([cache.copy() for cache in self.caches])


class _BatchedLayer(DynamicLayer):
    """Base class of the layers of a batch. The sequence length and the mask sizes are those of the first cache."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        super().__init__()
        self._layers = layers
        self.is_sliding = bool(getattr(layers[0], "is_sliding", False))

    def get_seq_length(self, *args: Any) -> int:
        return self._layers[0].get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._layers[0].get_mask_sizes(query_length)

    def _check_rows(self, key_states: Tensor) -> None:
        if key_states.shape[0] != len(self._layers):
            raise ValueError(
                f"the batch must have {len(self._layers)} rows, one for each cache, got {key_states.shape[0]}"
            )


class _BatchedCompressedLayer(_BatchedLayer):
    """Passes each row of an attention call to the layer of its cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_rows(key_states)
        for row, layer in enumerate(self._layers):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        return self._layers[0].observe_call(key_states, self), value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        outputs, weights = zip(
            *(layer.attend(_select_row(call, row)) for row, layer in enumerate(self._layers)), strict=True
        )
        return torch.cat(outputs), _join_weights(weights) if call.needs_weights else None


class _BatchedOtherLayer(_BatchedLayer):
    """Updates a layer that is not compressed, for example one with a sliding window, in every cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_rows(key_states)
        rows = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1], *args, **kwargs)
            for row, layer in enumerate(self._layers)
        ]
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


def _join_weights(rows: tuple[Tensor, ...]) -> Tensor:
    """Join the attention weights of rows, [1, heads, new, own width] each, right-aligned."""
    width = max(weights.shape[-1] for weights in rows)
    return torch.cat([torch.nn.functional.pad(weights, (width - weights.shape[-1], 0)) for weights in rows])


def _select_row(call: AttentionCall, row: int) -> AttentionCall:
    rows = slice(row, row + 1)
    mask = call.mask
    if mask is not None and not isinstance(mask, Tensor):
        readable = call.dense_mask  # a block mask cannot be divided into rows
        mask = None if readable is None else additive_mask(readable, call.query.dtype)
    mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
    return replace(call, query=call.query[rows], key=call.key[rows], value=call.value[rows], mask=mask)
