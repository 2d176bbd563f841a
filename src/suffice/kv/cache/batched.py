"""One forward pass for several caches, a row of the batch each: the weights are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.hook import Call, mark, observed
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer


class Rows(Cache):
    """Stands in for several caches of one row each, that have seen the same number of tokens.

    Row r of a batch goes on from `caches[r]`, by the attention that this cache would have had alone. The caches
    take what the rows bring; give copies to keep them as they are.

    Args:
        caches: caches of a batch of one, without padding, all of the same model.

    Raises:
        ValueError: no cache, caches that have seen different numbers of tokens, or one of a larger batch.

    Example:
        >>> rows = Rows([cache.copy() for cache in caches])               # doctest: +SKIP
        >>> model(ids.expand(len(caches), -1), past_key_values=rows)      # doctest: +SKIP

    """

    def __init__(self, caches: Sequence[CompressedCache]) -> None:
        if not caches:
            raise ValueError("caches is empty; accepted: one or more CompressedCache")
        seen = [cache.get_seq_length() for cache in caches]
        if len(set(seen)) > 1:
            raise ValueError(f"caches have seen {seen} tokens; accepted: caches that have seen as many")
        for number, cache in enumerate(caches):
            padding = cache.compressed_layers[0].padding
            if len(padding) > 1 or any(padding):
                raise ValueError(
                    f"caches[{number}] holds {len(padding)} rows with {sum(padding)} tokens of padding; "
                    "accepted: one row without padding"
                )
        self.caches = tuple(caches)
        columns: list[tuple[Any, ...]] = list(zip(*(cache.layers for cache in caches), strict=True))
        super().__init__(
            layers=[
                _CompressedRows(column) if isinstance(column[0], CompressedLayer) else _Stock(column)
                for column in columns
            ]
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        """Return one over copies of the caches."""
        return Rows([cache.copy() for cache in self.caches])


class _Row(DynamicLayer):
    """What both kinds of layers say of themselves: what the first row's says."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        super().__init__()
        self._layers = layers
        self.is_sliding = bool(getattr(layers[0], "is_sliding", False))

    def get_seq_length(self, *args: Any) -> int:
        return self._layers[0].get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._layers[0].get_mask_sizes(query_length)

    def _check(self, key_states: Tensor) -> None:
        if key_states.shape[0] != len(self._layers):
            raise ValueError(f"the batch has {key_states.shape[0]} rows; accepted: {len(self._layers)}, one a cache")


class _CompressedRows(_Row):
    """Hands each row of an attention call to its own cache's layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check(key_states)
        for row, layer in enumerate(self._layers):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        return mark(key_states, self), value_states

    def before(self, call: Call) -> Call | None:
        return None

    def attend(self, call: Call) -> Tensor:
        return torch.cat([observed(_row(call, row), layer)[0] for row, layer in enumerate(self._layers)])

    def after(self, call: Call, attention: Tensor | None) -> None:
        """Nothing is left to do: each row's layer has seen its own call."""


class _Stock(_Row):
    """Fills the layer that no policy touches, as a sliding window, of every cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check(key_states)
        held = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1], *args, **kwargs)
            for row, layer in enumerate(self._layers)
        ]
        return torch.cat([keys for keys, _ in held]), torch.cat([values for _, values in held])


def _row(call: Call, row: int) -> Call:
    one = slice(row, row + 1)
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[one]
    return replace(call, query=call.query[one], key=call.key[one], value=call.value[one], mask=mask)
