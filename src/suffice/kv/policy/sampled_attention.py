"""Attention from queries that are evenly spaced over the text, to entries at some distance before each of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.policy.attention_stats import AttentionStats

_QUERIES_PER_SET = 4
"""Number of queries whose attention is summed first."""
_LOGITS_PER_BLOCK = 2**20
"""Number of logits of each query head of a group that are computed at a time."""
_LOGITS_PER_BLOCK_ON_CPU = 2**16
"""Small blocks need more operations, but leave out more entries that their queries may not read."""


def sampled_attention(stats: AttentionStats, count: int, min_distance: int) -> Tensor:
    """Return the mean attention from evenly spaced queries to entries at least `min_distance` tokens before them.

    The attention of a query is normalized over those entries, without nearer entries and attention sinks. The soft cap
    of the model is applied. Queries without such an entry are left out of the mean.

    Args:
        stats: statistics of the attention call.
        count: number of queries.
        min_distance: smallest distance from a query to an entry, in tokens.

    Returns:
        Float32 [batch, num_key_value_heads, entries], averaged over the heads of a GQA group.

    """

    def compute() -> Tensor:
        if stats.is_complete:
            return _attention_of_complete_rows(stats, count, min_distance)
        return _attention(stats, count, min_distance)

    return stats.memoize(("sampled attention", count, min_distance), compute)


def sampled_query_indices(stats: AttentionStats, count: int) -> Tensor:
    """Return the indices of `count` evenly spaced queries of each row, long [batch, count], ascending.

    The last index is that of the newest query. If a row has fewer than `count` queries, indices are repeated.
    """
    if stats.valid_queries is None:
        num_valid = torch.full((stats.batch_size, 1), stats.num_queries, device=stats.device)
    else:
        num_valid = stats.valid_queries.sum(-1, keepdim=True)
    steps = torch.arange(1, count + 1, device=stats.device)
    # The valid queries are the last ones; the index among them is ⌈step · num_valid / count⌉ − 1.
    return stats.num_queries - num_valid + (steps * num_valid + count - 1) // count - 1


def _attention(stats: AttentionStats, count: int, min_distance: int) -> Tensor:
    """Compute `sampled_attention` for rows that may have padding or evicted entries."""
    indices = sampled_query_indices(stats, count)
    latest = stats.query_positions.gather(1, indices) - min_distance  # last position that each query may read
    gathered = indices[:, None, :, None].expand(-1, stats.queries.shape[1], -1, stats.head_dim)
    queries = stats.group_heads(stats.queries.gather(2, gathered).float() * stats.scaling).flatten(2, 3)
    logits = stats.add_bias(stats.cap_logits(queries @ stats.keys32.mT)).unflatten(2, (stats.num_key_value_groups, -1))
    too_near = stats.positions[:, :, None] > latest[:, None, :, None]
    is_masked = too_near if stats.valid is None else too_near | ~stats.valid[:, :, None]
    logits.masked_fill_(is_masked[:, :, None], -torch.inf)
    # The softmax of a query that may read no entry is NaN.
    reads_any = ~is_masked.all(-1)
    weights = logits.softmax(-1).masked_fill_(~reads_any[:, :, None, :, None], 0.0)
    return weights.sum((2, 3)) / (stats.num_key_value_groups * reads_any.sum(-1).clamp_min(1)[..., None])


def _attention_of_complete_rows(stats: AttentionStats, count: int, min_distance: int) -> Tensor:
    """Compute `sampled_attention` where the entries are all tokens seen so far.

    Indices are then known without reading the device, and entries that a query may not read are left out of the
    product instead of being masked.
    """
    indices = [(step * stats.num_queries + count - 1) // count - 1 for step in range(1, count + 1)]
    offset = stats.num_entries - stats.num_queries  # number of entries before the first query
    # Index of each query that may read an entry, and of the last entry that it may read.
    reads = [(index, offset + index - min_distance) for index in indices if offset + index >= min_distance]
    received = torch.zeros(stats.batch_size, stats.num_key_value_heads, stats.num_entries, device=stats.device)
    if not reads:
        return received
    selected = stats.queries.index_select(2, async_tensor([index for index, _ in reads], stats.device))
    queries = stats.group_heads(selected.float() * stats.scaling)
    latest = [last for _, last in reads]
    block_size = _LOGITS_PER_BLOCK_ON_CPU if stats.device.type == "cpu" else _LOGITS_PER_BLOCK
    max_sets = max(1, block_size // (stats.batch_size * queries.shape[1] * _QUERIES_PER_SET * latest[-1]))
    num_full = len(reads) // _QUERIES_PER_SET * _QUERIES_PER_SET  # the last set may be smaller
    starts = [*range(0, num_full, max_sets * _QUERIES_PER_SET), num_full]
    blocks = [slice(start, stop) for start, stop in itertools.pairwise(starts)] + [slice(num_full, len(reads))]
    for block in blocks:
        if latest[block]:
            _add_attention(received, stats, queries[:, :, :, block], latest[block], len(reads))
    return received


def _add_attention(
    received: Tensor, stats: AttentionStats, queries: Tensor, latest: Sequence[int], num_queries: int
) -> None:
    """Add the attention from a block of queries, divided by `num_queries`, to the attention that entries received.

    Args:
        received: [batch, num_key_value_heads, entries].
        stats: statistics of the attention call.
        queries: [batch, num_key_value_heads, num_key_value_groups, queries, head_dim], scaled.
        latest: index of the last entry that each query may read, ascending.
        num_queries: number of queries of all blocks.

    """
    size = min(_QUERIES_PER_SET, len(latest))
    rows = stats.num_key_value_groups * size
    # [batch, num_key_value_heads, sets, num_key_value_groups, size, head_dim]
    sets = queries.unflatten(3, (-1, size)).transpose(2, 3)
    # All queries of the block may read entries up to latest[0], and none reads after latest[-1].
    first, columns = latest[0] + 1, latest[-1] + 1
    logits = stats.add_bias(stats.cap_logits(sets.flatten(2, 4) @ stats.keys32[:, :, :columns].mT))
    too_near = torch.arange(first, columns, device=stats.device) > async_tensor(latest, stats.device)[:, None]
    masked = logits.unflatten(2, (-1, stats.num_key_value_groups, size))[..., first:]
    masked.masked_fill_(too_near.unflatten(0, (-1, 1, size)), -torch.inf)
    weights = logits.softmax(-1).unflatten(2, (-1, rows))
    share = weights.new_full((1, rows), 1 / (stats.num_key_value_groups * num_queries))
    for attention in (share @ weights).squeeze(3).unbind(2):
        received[..., :columns] += attention
