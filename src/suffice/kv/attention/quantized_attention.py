"""Attention over quantized entries of heads of any length together with exact entries, in plain torch.

The queries are divided by the scales of the quantized keys and rotated as these are, and the output of quantized values
is rotated back. The entries are dequantized block by block, so that no layer is ever dequantized as a whole.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from suffice.kv.attention.entry_blocks import EntryBlock, divide_entries
from suffice.kv.attention.masks import readable_entries
from suffice.kv.attention.softmax import cap_logits, softmax_with_sinks

# Numbers that are dequantized at a time. A block should stay in the processor's cache.
_BLOCK_NUMBERS = 3 << 17
# Largest number of queries of a head for which products are computed by group of dimensions, and then scaled. For more
# queries, it is faster to scale the keys and values.
_MAX_QUERIES_BY_GROUP = 16
# Largest number of logits in memory at a time.
_MAX_LOGITS = 1 << 22
# Logit of entries that a query may not read. It is finite, so that a query that may read none does not get NaN.
_NOT_READABLE = -1e30


class PackedVectors(Protocol):
    """Packed integers and scales of vectors; see `suffice.kv.storage.vector_format`."""

    @property
    def codes(self) -> Tensor:
        """Packed integers, uint8 [vectors, bytes]."""
        ...

    @property
    def scales(self) -> Tensor:
        """Logarithm of the scale of each group, uint8 [vectors, groups]."""
        ...


class QuantizedFormat(Protocol):
    """How vectors are quantized; see `suffice.kv.storage.vector_format`."""

    @property
    def bits(self) -> int:
        """Number of bits of an integer."""
        ...

    @functools.cached_property
    def group_size(self) -> int:
        """Number of dimensions that share a scale."""
        ...

    @property
    def padded_dim(self) -> int:
        """Number of dimensions of a rotated vector."""
        ...

    def rotation(self, like: Tensor) -> Tensor:
        """Return the orthogonal transform of vectors, [dim, padded_dim]."""
        ...

    def unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the integers of each group, times a factor, [groups, vectors, group_size]."""
        ...

    def unpack_scales(self, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scales of each group, divided by the factor, [groups, vectors]."""
        ...

    def middles(self, like: Tensor) -> Tensor:
        """Return the number that stands for 0 in each group of the result of `unpack`, [groups]."""
        ...

    def rotation_and_middles(self, like: Tensor) -> Tensor:
        """Return `rotation`, and minus the sums of its columns in each group times `middles`, [dim, any]."""
        ...


class QuantizedHeads(Protocol):
    """Quantized entries of all rows and heads, one head after the other; see `suffice.kv.storage.quantized_entries`."""

    @property
    def key_format(self) -> QuantizedFormat:
        """How keys are quantized."""
        ...

    @property
    def value_format(self) -> QuantizedFormat:
        """How values are quantized."""
        ...

    @property
    def keys(self) -> PackedVectors:
        """Quantized keys without the mean."""
        ...

    @property
    def values(self) -> PackedVectors:
        """Quantized values."""
        ...

    @property
    def lengths(self) -> list[list[int]]:
        """Number of entries of each row and head."""
        ...

    @property
    def logit_bias(self) -> Tensor | None:
        """Numbers that are added to the logits, float32 [entries]; None if there are none."""
        ...

    @property
    def means(self) -> Tensor:
        """Mean key of each row and head, which was subtracted, [batch, num_key_value_heads, head_dim]."""
        ...

    @property
    def scales(self) -> Tensor:
        """Scale by which each dimension of the keys was multiplied, [batch, num_key_value_heads, head_dim]."""
        ...

    def decode_keys(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return rotated and scaled keys without the mean, [entries, padded_dim]."""
        ...

    def decode_values(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return rotated values, [entries, padded_dim]."""
        ...


@dataclass(frozen=True)
class ExactEntries:
    """Entries of all rows and heads that are not quantized. Any slot may be empty.

    Args:
        keys: [batch, num_key_value_heads, width, head_dim].
        values: [batch, num_key_value_heads, width, value_dim].
        positions: [batch, num_key_value_heads, width]; negative in empty slots.
        is_full: whether it is known that no slot is empty.
        logit_bias: numbers that are added to the logits, float32 [batch, num_key_value_heads, width]; None if there are
            none. The quantized entries have a bias if and only if the exact ones have.

    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    is_full: bool = False
    logit_bias: Tensor | None = None


def attend_quantized(
    query: Tensor,
    quantized: QuantizedHeads,
    exact: ExactEntries,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute scaled dot-product attention over quantized and exact entries, in float32 (float64 for float64 queries).

    Args:
        query: queries of the new tokens, [batch, heads, new, head_dim].
        quantized: quantized entries, which every new token may read.
        exact: the other entries, including those of the new tokens.
        mask: bool [batch or 1, 1, new, new], which new tokens each new token may read; None if it may read all before
            it.
        scaling: factor on the query-key product.
        softcap: soft cap of the logits; None for no soft cap.
        sink_logits: logit of the attention sink of each query head, [heads]; None for no sinks.

    Returns:
        [batch, new, heads, value_dim], contiguous, because models may call `view` on it.

    """
    batch, heads, new, _ = query.shape
    num_heads = exact.keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries = (query.to(dtype) * scaling).view(batch, num_heads, -1, *query.shape[2:])
    readable = None if exact.is_full and new == 1 else readable_entries(exact.positions, mask, new)
    sinks = None if sink_logits is None else sink_logits.to(dtype).view(num_heads, -1, 1, 1)
    width = max(itertools.chain(*quantized.lengths)) + exact.keys.shape[2]
    block = max(1, _MAX_LOGITS // max(1, batch * heads * width))
    attention = _Attention(quantized, exact, softcap, sinks)
    if new <= block or readable is None:
        output = attention(queries, readable)
    else:
        outputs = map(attention, queries.split(block, dim=3), readable.split(block, dim=2))
        output = torch.cat(tuple(outputs), dim=3)
    return output.view(batch, heads, new, -1).transpose(1, 2).to(query.dtype).contiguous()


class _Attention:
    """The attention over some entries, for blocks of queries.

    Args:
        quantized: quantized entries.
        exact: the other entries.
        softcap: soft cap of the logits; None for no soft cap.
        sinks: logits of the attention sinks, [num_key_value_heads, groups, 1, 1]; None for no sinks.

    """

    def __init__(
        self, quantized: QuantizedHeads, exact: ExactEntries, softcap: float | None, sinks: Tensor | None
    ) -> None:
        self._quantized, self._exact = quantized, exact
        self._softcap, self._sinks = softcap, sinks
        self._lengths = tuple(itertools.chain(*quantized.lengths))
        self._width = max(self._lengths)  # the first logits are those of quantized entries

    def __call__(self, queries: Tensor, readable: Tensor | None) -> Tensor:
        """Compute the attention.

        Args:
            queries: scaled queries, [batch, num_key_value_heads, groups, queries, head_dim].
            readable: which exact entries each query may read, bool [batch, num_key_value_heads, queries, exact]; None
                for all.

        Returns:
            [batch, num_key_value_heads, groups, queries, value_dim].

        """
        shape, width = queries.shape[:-1], self._width
        flat = queries.reshape(shape[0] * shape[1], -1, queries.shape[-1])
        keys, values = (x.to(flat.dtype).flatten(0, 1) for x in (self._exact.keys, self._exact.values))
        by_group = flat.shape[1] <= _MAX_QUERIES_BY_GROUP
        logits = flat.new_empty(*flat.shape[:2], width + keys.shape[1])
        logits[:, :, width:] = torch.bmm(flat, keys.mT)
        if width:
            write_logits = self._write_logits_by_group if by_group else self._write_logits
            write_logits(logits, flat)
        logits = cap_logits(logits, self._softcap).view(*shape, -1)
        if self._exact.logit_bias is not None:
            logits[..., width:] += self._exact.logit_bias[:, :, None, None]
            if width:
                logits[..., :width] += self._quantized_bias().view(*shape[:2], 1, 1, width)
        if readable is not None:
            logits[..., width:].masked_fill_(~readable[:, :, None], _NOT_READABLE)
        if min(self._lengths) < width:
            lengths = _lengths_tensor(self._lengths, logits.device).view(*shape[:2], 1, 1, 1)
            is_empty = torch.arange(width, device=logits.device) >= lengths
            logits[..., :width].masked_fill_(is_empty, _NOT_READABLE)
        weights = logits.softmax(-1) if self._sinks is None else softmax_with_sinks(logits, self._sinks)
        weights = weights.view(*flat.shape[:2], -1)
        if width:
            format_ = self._quantized.value_format
            rotated = (self._sum_values_by_group if by_group else self._sum_values)(weights)
            output = torch.baddbmm(rotated @ format_.rotation(rotated).mT, weights[:, :, width:], values)
        else:
            output = torch.bmm(weights, values)
        return output.view(*shape, -1)

    def _quantized_bias(self) -> Tensor:
        """Return what is added to the logits of quantized entries, [batch * num_key_value_heads, width]."""
        assert self._quantized.logit_bias is not None
        parts = list(self._quantized.logit_bias.split(self._lengths))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def _transform_queries(self, queries: Tensor, transform: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries for quantized keys, multiplied by a matrix, and their products with the mean key."""
        statistics = map(_for_autograd, (self._quantized.means, self._quantized.scales))
        means, scales = (x.to(queries.dtype).flatten(0, 1)[:, None] for x in statistics)
        return (queries / scales) @ transform, torch.bmm(queries, means.mT)

    def _write_logits(self, logits: Tensor, queries: Tensor) -> None:
        """Write the logits of quantized entries, [batch * num_key_value_heads, queries, width].

        Empty slots are not written.
        """
        rotation = self._quantized.key_format.rotation(queries)
        rotated, of_mean = self._transform_queries(queries, rotation)
        for block in self._blocks(self._quantized.key_format):
            keys = self._quantized.decode_keys(block.entries, queries.dtype)
            for part in block.parts:
                part_logits = torch.baddbmm(of_mean[part.heads], rotated[part.heads], part.of(keys).mT)
                logits[part.heads, :, part.columns] = part_logits

    def _sum_values(self, weights: Tensor) -> Tensor:
        """Return the weighted sums of the rotated values, [batch * num_key_value_heads, queries, padded_dim]."""
        format_ = self._quantized.value_format
        sums = weights.new_zeros(*weights.shape[:2], format_.padded_dim)
        for block in self._blocks(format_):
            values = self._quantized.decode_values(block.entries, weights.dtype)
            for part in block.parts:
                sums[part.heads].baddbmm_(weights[part.heads, :, part.columns], part.of(values))
        return sums

    # With few queries, it is faster to scale the results than to scale the keys and values. In a group of dimensions,
    # the number of an integer c is s (c - m), where s is the scale and m is the middle of all integers: q·k is the sum
    # of s (q·c - m Σ q) over all groups, and Σ w v is Σ (w s) c - m Σ (w s) in each group.

    def _write_logits_by_group(self, logits: Tensor, queries: Tensor) -> None:
        """Write the logits as `_write_logits` does."""
        keys, format_ = self._quantized.keys, self._quantized.key_format
        transformed, of_mean = self._transform_queries(queries, format_.rotation_and_middles(queries))
        scales = format_.unpack_scales(keys.scales, queries.dtype)
        rotated, of_middle = transformed.tensor_split((format_.padded_dim,), dim=-1)
        rotated = rotated.unflatten(-1, (len(scales), -1)).permute(2, 0, 1, 3).contiguous()
        of_middle = of_middle.permute(2, 0, 1)[..., None]
        for block in self._blocks(format_):
            integers = format_.unpack(keys.codes[block.entries], queries.dtype)
            for part in block.parts:
                products = torch.baddbmm(part.of_heads(of_middle), part.of_heads(rotated), part.of_block(integers).mT)
                products = products.view(len(scales), -1, queries.shape[1], part.length)
                products = products.mul_(part.of_layer(scales)[:, :, None]).sum(0)
                logits[part.heads, :, part.columns] = products.add_(of_mean[part.heads])

    def _sum_values_by_group(self, weights: Tensor) -> Tensor:
        """Return the weighted sums as `_sum_values` does."""
        values, format_ = self._quantized.values, self._quantized.value_format
        scales = format_.unpack_scales(values.scales, weights.dtype)
        num_heads, queries, _ = weights.shape
        middles = -format_.middles(weights).view(-1, 1, 1, 1)
        sums = weights.new_zeros(len(scales), num_heads, queries, format_.group_size)
        for block in self._blocks(format_):
            integers = format_.unpack(values.codes[block.entries], weights.dtype)
            for part in block.parts:
                own = weights[part.heads, :, part.columns] * part.of_layer(scales)[:, :, None]
                of_middle = (own.sum(-1, keepdim=True) * middles).flatten(0, 1)
                own_sums = torch.baddbmm(of_middle, own.flatten(0, 1), part.of_block(integers))
                sums[:, part.heads].add_(own_sums.view(len(scales), -1, *sums.shape[2:]))
        return sums.permute(1, 2, 0, 3).flatten(2)

    def _blocks(self, format_: QuantizedFormat) -> tuple[EntryBlock, ...]:
        return divide_entries(self._lengths, max(1, _BLOCK_NUMBERS // format_.padded_dim))


@functools.lru_cache(maxsize=1024)
def _lengths_tensor(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(lengths, device=device)


def _for_autograd(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a copy of one that was made in inference mode, if that has ended."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
