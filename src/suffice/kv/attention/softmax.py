"""The softmax of attention: soft cap of the logits, attention sinks, and attention that uses them."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOGITS = 1 << 24
"""Largest number of logits in memory at a time."""


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Return c tanh(logits / c) for the soft cap c; the logits themselves if there is none."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def softmax_with_sinks(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Return the softmax over the last dimension, with attention sinks in the denominator.

    Args:
        logits: [..., queries, entries], −∞ where a query may not read an entry.
        sink_logits: logits of the sinks, broadcastable to [..., queries, 1]; None for no sinks.

    Returns:
        Weights, shaped like `logits`. The weights of a query sum to 1, or to less if there are sinks. They are 0 if the
        query may read no entry.

    """
    largest = logits.amax(-1, keepdim=True)
    if sink_logits is not None:
        largest = torch.maximum(largest, sink_logits)
    # Without the replacement, a query that may read no entry would get −∞ − (−∞), which is NaN.
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink_logits - largest).exp()
    return weights / total.masked_fill(total == 0, 1)


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Compute attention with a soft cap and sinks, in float32 (in float64 for float64 tensors).

    Args:
        query: [..., queries, head_dim].
        key: [..., entries, head_dim].
        value: [..., entries, value_dim].
        mask: bool, broadcastable to [..., queries, entries], True where a query may read an entry; None if each query
            may read all entries.
        bias: numbers that are added to the logits, [..., 1 or queries, entries]; None for none.
        scaling: factor on the query-key product.
        softcap: soft cap of the logits; None for no soft cap.
        sink_logits: logits of the sinks, [..., 1 or queries, 1]; None for no sinks.

    Returns:
        [..., queries, value_dim], in the dtype of the query; 0 for a query that may read no entry.

    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(dtype), value.to(dtype)
    num_queries = query.shape[-2]
    block_size = max(1, _MAX_LOGITS // max(1, key[..., 0].numel()))

    def select(x: Tensor | None, block: slice) -> Tensor | None:
        return None if x is None else x.expand(*x.shape[:-2], num_queries, -1)[..., block, :]

    outputs: list[Tensor] = []
    for start in range(0, num_queries, block_size):
        block = slice(start, start + block_size)
        weights = attention_weights(
            query[..., block, :],
            key,
            select(mask, block),
            bias=select(bias, block),
            scaling=scaling,
            softcap=softcap,
            sink_logits=select(sink_logits, block),
        )
        outputs.append((weights @ value).to(query.dtype))
    return torch.cat(outputs, dim=-2)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return attention weights [..., queries, entries] in float32 or float64; see `attend_with_sinks`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = cap_logits(query.to(dtype) @ key.to(dtype).mT * scaling, softcap)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return softmax_with_sinks(logits, None if sink_logits is None else sink_logits.to(dtype))
