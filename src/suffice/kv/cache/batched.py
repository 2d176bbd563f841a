"""Batches of caches: one forward pass continues from several caches, with one row of the batch for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.call import AttentionCall
from suffice.kv.attention.masks import additive_mask
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.group import CacheGroup, check_caches
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import has_linear_states
from suffice.kv.cache.positions import new_tokens, num_new_tokens


@dataclass
class _BatchState:
    """What all layers of a batch need to know.

    Args:
        num_seen: number of tokens of the batch so far, including padding: the length of the longest row, if all were
            read together from the start.
        num_padding: number of padding tokens of each row among the new tokens of the current forward pass.

    """

    num_seen: int
    num_padding: list[int] = field(default_factory=list[int])


def rows_can_differ_in_length(cache: CompressedCache) -> bool:
    """Return whether a `BatchedCaches` may hold such caches after different numbers of tokens.

    Layers that are not compressed, such as those with a sliding window, and states of linear attention need rows of
    equal length.
    """
    layers: list[Any] = cache.layers
    return all(
        isinstance(layer, CompressedLayer) or not hasattr(layer, "get_seq_length") for layer in layers
    ) and not any(map(has_linear_states, layers))


class BatchedCaches(CacheGroup):
    """A batch of several caches, each with one row.

    Row r of the batch continues from `caches[r]`, and its attention is the same as with this cache alone. The new
    tokens of each row are added to its cache. Pass copies to leave the caches unchanged.

    The caches may have seen different numbers of tokens, and new tokens may be padded on the left, as `attention_mask`
    and `position_ids` say (`generate` makes the positions from the mask). Caches are not given padding, so each stores
    and evicts exactly as it would alone. This requires that all layers with a cache are compressed and that there
    are no states of linear attention; for other models, all rows must have seen the same number of tokens.

    Args:
        caches: caches with a batch of one, without padding, all of the same model.

    Raises:
        TypeError: `caches` is not a list of caches.
        ValueError: there is no cache, a cache occurs twice, the caches have seen different numbers of tokens and the
            model does not support this, or a cache has several rows or padding.

    Example:
        >>> rows = BatchedCaches([cache.copy() for cache in caches])      # doctest: +SKIP
        >>> model(ids.expand(len(caches), -1), past_key_values=rows)      # doctest: +SKIP

    """

    def __init__(self, caches: Sequence[CompressedCache]) -> None:
        caches = check_caches(caches, hint=". Pass a copy() for each row")
        for number, cache in enumerate(caches):
            padding = cache.compressed_layers[0].state.num_padding
            if len(padding) > 1 or any(padding):
                raise ValueError(
                    f"caches[{number}] must hold one row without padding, got {len(padding)} rows with {sum(padding)} "
                    "tokens of padding"
                )
        num_seen = [cache.get_seq_length() for cache in caches]
        self._drops_padding = all(map(rows_can_differ_in_length, caches))
        if len(set(num_seen)) > 1 and not self._drops_padding:
            raise ValueError(
                f"caches must have seen the same number of tokens, got {num_seen}, because the model has layers with a "
                "sliding window or linear attention, which are not compressed"
            )
        self._state = _BatchState(max(num_seen))
        super().__init__(caches)

    def make_layer(self, layers: tuple[Any, ...]) -> Any:
        """Return a layer of the batch."""
        if isinstance(layers[0], CompressedLayer):
            return _BatchedCompressedLayer(layers, self._state)
        return _BatchedOtherLayer(layers)

    def states_before(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all layers: each is one row."""
        return layers

    def row_of_cache(self, number: int) -> int:
        """Return the row of a cache."""
        return number

    def begin_pass(self, decoder: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Prepare every cache for a forward pass over its row, without padding.

        Raises:
            ValueError: the input has another number of rows, or rows whose padding is not on the left; or the positions
                of rows of different lengths are missing.

        """
        given = new_tokens(inputs)
        num_rows = 0 if given is None else len(given)
        if num_rows != len(self.caches):
            raise ValueError(f"the batch must have {len(self.caches)} rows, one for each cache, got {num_rows}")
        num_new = num_new_tokens(inputs)
        self._state.num_padding = self._read_padding(inputs, num_new)
        for row, (cache, padding) in enumerate(zip(self.caches, self._state.num_padding, strict=True)):
            own = _inputs_of_row(inputs, row, padding)
            cache.begin_pass(decoder, {**own, "attention_mask": None} if self._drops_padding else own)
        self._num_new = num_new

    def end_pass(self, *, failed: bool) -> None:
        """Finish the forward pass in every cache."""
        super().end_pass(failed=failed)
        if not failed:
            self._state.num_seen += self._num_new

    def _read_padding(self, inputs: Mapping[str, Any], num_new: int) -> list[int]:
        """Return the number of padding tokens of each row among the new tokens."""
        none = [0] * len(self.caches)
        if not self._drops_padding:
            return none
        held = [cache.get_seq_length() for cache in self.caches]
        if min(held) < self._state.num_seen and inputs.get("position_ids") is None:
            raise ValueError(
                f"position_ids must be given for rows that have seen different numbers of tokens ({held}), got None. "
                "`generate` makes them from attention_mask"
            )
        mask = inputs.get("attention_mask")
        if num_new < 2 or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < num_new:
            return none  # the masks of single tokens are not read, to avoid a synchronization at each step
        valid = mask.bool()
        is_new = valid[:, -num_new:]
        has_holes = (is_new[:, :-1] & ~is_new[:, 1:]).any(-1) | ~is_new[:, -1]
        rows = torch.stack(((~is_new).sum(-1), has_holes.long(), valid[:, :-num_new].sum(-1)), -1).tolist()
        for row, (_, holes, num_earlier) in enumerate(rows):
            if holes:
                raise ValueError(
                    f"attention_mask must pad new tokens on the left only, got other masked tokens in row {row} of a "
                    "batch of caches"
                )
            if num_earlier != held[row]:
                raise ValueError(
                    f"attention_mask must mark the {held[row]} tokens that caches[{row}] has seen, and mask all other "
                    f"earlier tokens of row {row}, got {num_earlier}"
                )
        return [row[0] for row in rows]

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchedCaches:
        """Return a batch of copies of the caches."""
        other = BatchedCaches([cache.copy() for cache in self.caches])
        other._state.num_seen = self._state.num_seen
        return other


def _inputs_of_row(inputs: Mapping[str, Any], row: int, padding: int) -> dict[str, Any]:
    """Return the arguments of a decoder for one row, without padding among its new tokens."""
    own = dict(inputs)
    for name in ("input_ids", "inputs_embeds"):
        if (x := inputs.get(name)) is not None:
            own[name] = x[row : row + 1, padding:]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor):
        own["attention_mask"] = mask if len(mask) == 1 else mask[row : row + 1]
    if isinstance(positions, Tensor) and positions.dim() > 1:
        # [batch, new], or [axes, batch, new] for models with several axes of positions.
        chosen = positions if positions.shape[-2] == 1 else positions[..., row : row + 1, :]
        own["position_ids"] = chosen[..., padding:]
    return own


class _BatchedLayer(DynamicLayer):
    """Base class of the layers of a batch."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        super().__init__()
        self._layers = layers
        self.is_sliding = bool(getattr(layers[0], "is_sliding", False))


class _BatchedCompressedLayer(_BatchedLayer):
    """Passes each row of an attention call, without its padding, to the layer of its cache."""

    def __init__(self, layers: tuple[Any, ...], state: _BatchState) -> None:
        super().__init__(layers)
        self._state = state

    def get_seq_length(self, *args: Any) -> int:
        return self._state.num_seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return new, self._state.num_seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for row, (layer, padding) in enumerate(zip(self._layers, self._state.num_padding, strict=True)):
            layer.update(key_states[row : row + 1, :, padding:], value_states[row : row + 1, :, padding:])
        return self._layers[0].observe_call(key_states, self), value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        outputs: list[Tensor] = []
        weights: list[Tensor | None] = []
        for row, (layer, padding) in enumerate(zip(self._layers, self._state.num_padding, strict=True)):
            own = _select_row(call, row, padding)
            output, own_weights = layer.attend(own)
            missing = call.query.shape[2] - own.query.shape[2]
            outputs.append(pad(output, (0, 0, 0, 0, missing, 0)))
            weights.append(None if own_weights is None else pad(own_weights, (0, 0, missing, 0)))
        return torch.cat(outputs), _join_weights(weights) if call.needs_weights else None


class _BatchedOtherLayer(_BatchedLayer):
    """Updates a layer that is not compressed, for example one with a sliding window, in every cache.

    Its length and the sizes of its mask are those of the first cache, because all rows have the same length.
    """

    def get_seq_length(self, *args: Any) -> int:
        return self._layers[0].get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._layers[0].get_mask_sizes(query_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1], *args, **kwargs)
            for row, layer in enumerate(self._layers)
        ]
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


def _join_weights(rows: Sequence[Tensor | None]) -> Tensor:
    """Join the attention weights of rows, [1, heads, new, own width] each, right-aligned."""
    found = [weights for weights in rows if weights is not None]
    width = max(weights.shape[-1] for weights in found)
    return torch.cat([pad(weights, (width - weights.shape[-1], 0)) for weights in found])


def _select_row(call: AttentionCall, row: int, padding: int) -> AttentionCall:
    """Return an attention call of one row, without its padding."""
    rows = slice(row, row + 1)
    num_keys, num_queries = call.key.shape[2], call.query.shape[2]
    # Some models compute a layer for the last tokens only, with the keys of all new tokens.
    skipped = max(0, padding - (num_keys - num_queries))
    mask = call.mask
    if mask is not None and not isinstance(mask, Tensor):
        readable = call.dense_mask  # a block mask cannot be divided into rows
        mask = None if readable is None else additive_mask(readable, call.query.dtype)
    if mask is not None:
        mask = mask if mask.shape[0] == 1 else mask[rows]
        if padding:
            mask = mask[..., padding - num_keys :]
            mask = mask[..., skipped:, :] if mask.dim() == 4 else mask
    return replace(
        call,
        query=call.query[rows, :, skipped:],
        key=call.key[rows, :, padding:],
        value=call.value[rows, :, padding:],
        mask=mask,
    )
