"""Exact attention over heads of unequal length, in plain torch.

On a GPU, a Triton kernel computes the attention of single tokens (`suffice.kv.kernels.decoding`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from suffice.kv.attention.softmax import attend_with_sinks


class RaggedEntries(Protocol):
    """Keys and values of heads of unequal length, one head after the other; see `suffice.kv.storage.ragged`."""

    lengths: list[list[int]]
    tail_positions: Tensor
    tail_is_full: bool
    decode_plan: Any  # of the Triton kernel; None before its first call

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, [slots, dim] each."""
        ...

    @property
    def logit_bias(self) -> Tensor | None:
        """Numbers that are added to the logits of the packed entries, float32 [packed]; None if there are none."""
        ...

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each row and head, the index of the first slot and the number of entries."""
        ...


def attend_by_head(
    query: Tensor,
    entries: RaggedEntries,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute scaled dot-product attention, one KV head after the other, in plain torch.

    Args:
        query: queries of the new tokens, [batch, heads, new, head_dim].
        entries: the entries that the queries read, including those of the new tokens.
        mask: bool [batch, 1, new, new], which new tokens each new token may read; None if it may read all
            before it.
        scaling: factor on the query-key product.
        softcap: soft cap of the logits; None for no soft cap.
        sink_logits: logit of the attention sink of each query head, [heads]; None for no sinks.

    Returns:
        [batch, new, heads, value_dim], contiguous, because models may call `view` on it.

    """
    batch, heads, new, head_dim = query.shape
    num_key_value_heads, tail = len(entries.lengths[0]), entries.tail_positions.shape[1]
    num_key_value_groups = heads // num_key_value_heads
    readable = _readable_tail(query, entries, mask)
    if readable is None and new > 1:
        causal = torch.ones(1, new, tail, dtype=torch.bool, device=query.device).tril_(tail - new)
        readable = causal.expand(batch, -1, -1)
    # The queries of one token that read the same keys are computed as one matrix. In half precision on the CPU, torch
    # is faster with one vector for each query.
    as_matrix = new == 1 and (query.is_cuda or query.dtype in (torch.float32, torch.float64))
    shape = (1, num_key_value_groups, head_dim) if as_matrix else (num_key_value_groups, new, head_dim)
    sinks = None if sink_logits is None else sink_logits.view(num_key_value_heads, shape[0], -1, 1)
    # Rows whose heads have the same lengths are computed together.
    num_rows = batch if all(lengths == entries.lengths[0] for lengths in entries.lengths) else 1
    queries = query.reshape(-1, num_rows, num_key_value_heads, *shape).transpose(1, 2).flatten(0, 1).unbind()
    outputs: list[Tensor] = []
    bias, biases = None, _split_bias(entries, num_rows)
    for number, (key, value) in enumerate(_split_heads(entries, num_rows, shape[0])):
        row, head = divmod(number, num_key_value_heads)
        if readable is not None and head == 0:
            valid = readable if num_rows == batch else readable[row, None]
            bias = torch.nn.functional.pad(valid, (max(entries.lengths[row]), 0), value=True)[:, None]
        head_bias = None if bias is None else bias[..., bias.shape[-1] - key.shape[2] :]
        own_bias = None if biases is None else _pad_tail(biases[number], tail)
        if softcap is None and sinks is None:
            if own_bias is not None:
                own_bias = own_bias if head_bias is None else own_bias.masked_fill(~head_bias, -torch.inf)
                head_bias = own_bias.to(query.dtype)
            output = scaled_dot_product_attention(queries[number], key, value, attn_mask=head_bias, scale=scaling)
        else:
            head_sinks = None if sinks is None else sinks[head]
            output = attend_with_sinks(
                queries[number],
                key,
                value,
                head_bias,
                bias=own_bias,
                scaling=scaling,
                softcap=softcap,
                sink_logits=head_sinks,
            )
        outputs.append(output)
    output = torch.cat(outputs) if num_rows == 1 else torch.stack(outputs, dim=1)
    return output.view(batch, heads, new, -1).transpose(1, 2).contiguous()


def _split_heads(entries: RaggedEntries, num_rows: int, copies: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return keys and values of each head as views [num_rows, copies, entries, dim].

    Args:
        entries: the entries.
        num_rows: the number of rows, if every row has the same lengths: each view then holds one head of all rows. 1
            for one view for each row and head, one row after the other.
        copies: number of times that each head is repeated. The copies share memory.

    """
    spans, num_slots = entries.spans, len(entries.buffers[0]) // num_rows
    sizes: list[int] = []  # for each head, the number of its entries and then of its spare slots
    for (start, count), (following, _) in itertools.pairwise((*spans[: len(spans) // num_rows], (num_slots, 0))):
        sizes += [count, following - start - count]

    def split(buffer: Tensor) -> tuple[Tensor, ...]:
        by_row = buffer.view(num_rows, 1, num_slots, buffer.shape[-1])
        return by_row.expand(-1, copies, -1, -1).split(sizes, dim=2)[::2]

    return zip(*map(split, entries.buffers), strict=True)


def _split_bias(entries: RaggedEntries, num_rows: int) -> list[Tensor] | None:
    """Return the bias of the packed entries of each head, [num_rows, 1, 1, packed]; see `_split_heads`."""
    if entries.logit_bias is None:
        return None
    lengths = itertools.chain(*(entries.lengths[:1] if num_rows > 1 else entries.lengths))
    return [part[:, None, None] for part in entries.logit_bias.view(num_rows, -1).split(list(lengths), dim=1)]


def _pad_tail(bias: Tensor, tail: int) -> Tensor:
    return torch.nn.functional.pad(bias, (0, tail))


def _readable_tail(query: Tensor, entries: RaggedEntries, mask: Tensor | None) -> Tensor | None:
    """Return which entries of the tail each new token may read, bool [batch, new, tail]; None if all before it."""
    valid = entries.tail_positions >= 0
    new, tail = query.shape[2], valid.shape[1]
    # A single new token may read all valid entries, so that its mask is not needed.
    if entries.tail_is_full and (mask is None or new == 1):
        return None
    earlier = valid[:, None, : tail - new].expand(-1, new, -1)
    if mask is None:
        mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=query.device).tril_()
    return torch.cat((earlier, mask[:, 0].expand(len(earlier), -1, -1)), dim=-1)
