"""Exact attention over heads of unequal length: torch's own, head by head, or a kernel of ours for all of them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from suffice.gpu import KernelFallbackError
from suffice.kv.kernels import usable
from suffice.kv.storage.ragged import RaggedStorage


def attend(query: Tensor, storage: RaggedStorage, mask: Tensor | None, scaling: float) -> Tensor:
    """Exact attention of new tokens over a ragged storage that already holds them in its tail.

    Args:
        query: [batch, heads, new, dim], of the newest tokens.
        storage: what they read.
        mask: bool [batch, 1, new, new], what each new token may read of the new ones; None for all before it.
        scaling: factor on the query-key product.

    Returns:
        [batch, new, heads, value_dim].

    """
    if query.shape[2] == 1 and usable(query, *storage.tensors):
        # What the mask says of one token, its position says too.
        with contextlib.suppress(KernelFallbackError):
            return _decode(query, storage, scaling)
    return _by_head(query, storage, _seen(query, storage, mask), scaling)


def _decode(query: Tensor, storage: RaggedStorage, scaling: float) -> Tensor:
    """One kernel for all heads, split along their keys. For one new token on a GPU."""
    from suffice.kv.kernels.decoding import Plan, decode

    if storage.plan is None:
        packed = [(start, count - storage.tail) for start, count in storage.spans]
        storage.plan = Plan.of(packed, storage.tail, query.device)
    keys, values = storage.tensors
    return decode(query[:, :, 0], keys, values, storage.tail_positions, storage.plan, scaling)[:, None]


def _by_head(query: Tensor, storage: RaggedStorage, seen: Tensor | None, scaling: float) -> Tensor:
    """Scaled dot-product attention, one KV head after the other.

    Args:
        query: [batch, heads, new, dim].
        storage: what is read.
        seen: bool [batch, new, tail], what each new token may read of the tail; None for all that came before it.
        scaling: factor on the query-key product.

    """
    batch, heads, new, dim = query.shape
    kv_heads, tail = len(storage.lengths[0]), storage.tail
    group = heads // kv_heads
    if seen is None and new > 1:
        seen = torch.ones(1, new, tail, dtype=torch.bool, device=query.device).tril_(tail - new).expand(batch, -1, -1)
    # The queries of one token that read the same keys are one matrix; in half precision on the CPU, torch is faster
    # with vectors.
    matrix = new == 1 and (query.is_cuda or query.dtype in (torch.float32, torch.float64))
    queries = query.reshape(batch * kv_heads, 1, *((1, group, dim) if matrix else (group, new, dim)))
    keys, values = storage.tensors
    bias, out = None, []
    for number, (start, count) in enumerate(storage.spans):
        if seen is not None and number % kv_heads == 0:
            widest = max(storage.lengths[number // kv_heads])
            bias = torch.nn.functional.pad(seen[number // kv_heads], (widest, 0), value=True)
        key, value = (x[start : start + count].expand(1, 1 if matrix else group, -1, -1) for x in (keys, values))
        own = None if bias is None else bias[:, bias.shape[1] - count :]
        out.append(scaled_dot_product_attention(queries[number], key, value, attn_mask=own, scale=scaling))
    return torch.cat(out).view(batch, heads, new, -1).transpose(1, 2)


def _seen(query: Tensor, storage: RaggedStorage, mask: Tensor | None) -> Tensor | None:
    """Return what each new token may read of the tail, bool [batch, new, tail]; None for all that came before it."""
    there = storage.tail_positions >= 0
    new, tail = query.shape[2], storage.tail
    if storage.tail_full and (mask is None or new == 1):  # of one token a mask says no more than its position
        return None
    before = there[:, None, : tail - new].expand(-1, new, -1)
    if mask is None:
        mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=query.device).tril_()
    return torch.cat((before, mask[:, 0].expand(len(before), -1, -1)), dim=-1)
