"""One forward pass for several caches, one row of the batch each: the model's weights are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.call import AttentionCall
from suffice.kv.attention.hook import attach_observer
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer


class BatchedCaches(Cache):
    """Stands in for several caches of one row each that have seen the same number of tokens.

    Row r of the batch continues from `caches[r]`, with the attention that this cache would have alone. The caches take
    the new tokens of their rows; pass copies to keep them as they are.

    Args:
        caches: caches with a batch of one, without padding, all of the same model.

    Raises:
        ValueError: no cache, caches that have seen different numbers of tokens, or one with a larger batch or padding.

    Example:
        >>> rows = BatchedCaches([cache.copy() for cache in caches])      # doctest: +SKIP
        >>> model(ids.expand(len(caches), -1), past_key_values=rows)      # doctest: +SKIP

    """

    def __init__(self, caches: Sequence[CompressedCache]) -> None:
        if not caches:
            raise ValueError("caches must hold at least one CompressedCache, got none")
        num_seen = [cache.get_seq_length() for cache in caches]
        if len(set(num_seen)) > 1:
            raise ValueError(f"caches must have seen the same number of tokens, got {num_seen}")
        for number, cache in enumerate(caches):
            padding = [row.num_padding for row in cache.compressed_layers[0].rows]
            if len(padding) > 1 or any(padding):
                raise ValueError(
                    f"caches[{number}] must hold one row without padding, got {len(padding)} rows with {sum(padding)} "
                    "tokens of padding"
                )
        self.caches = tuple(caches)
        columns: list[tuple[Any, ...]] = list(zip(*(cache.layers for cache in caches), strict=True))
        super().__init__(
            layers=[
                (_BatchedCompressedLayer if isinstance(column[0], CompressedLayer) else _BatchedStockLayer)(column)
                for column in columns
            ]
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchedCaches:
        """Return a batch of copies of the caches."""
        return BatchedCaches([cache.copy() for cache in self.caches])


class _BatchedLayer(DynamicLayer):
    """Base class of both kinds of layers; it reports what the layer of the first row reports."""

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
    """Passes each row of an attention call to the layer of its own cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_rows(key_states)
        for row, layer in enumerate(self._layers):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        return attach_observer(key_states, self), value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        outputs = [layer.attend(_select_row(call, row))[0] for row, layer in enumerate(self._layers)]
        return torch.cat(outputs), None


class _BatchedStockLayer(_BatchedLayer):
    """Fills the layer of every cache that is not compressed, such as a sliding window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_rows(key_states)
        rows = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1], *args, **kwargs)
            for row, layer in enumerate(self._layers)
        ]
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


def _select_row(call: AttentionCall, row: int) -> AttentionCall:
    one = slice(row, row + 1)
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[one]
    return replace(call, query=call.query[one], key=call.key[one], value=call.value[one], mask=mask)
