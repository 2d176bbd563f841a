"""Attention from queries that are spread over a text, to what lies some way behind each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.policy.attention_stats import NEGATIVE, Signals

_BLOCK = 4  # queries that are worked on at a time


def sampled_attention(signals: Signals, count: int, apart: int) -> Tensor:
    """Attention from `count` queries, evenly spaced, to entries at least `apart` tokens behind each, on average.

    Each query's attention is over those entries alone and sums to 1 over them; a query that has none is left out.

    Returns:
        [batch, kv_heads, tokens], float32.

    """
    return signals.memo(("sample", count, apart), lambda: _attention(signals, count, apart))


def sample(signals: Signals, count: int) -> Tensor:
    """Return where `count` queries stand that are evenly spaced over each row's own, long [batch, count].

    The last is the newest; a row of fewer queries has some more than once.
    """
    total = signals.queries.shape[2]
    if signals.asked is None:
        own = torch.full((signals.batch, 1), total, device=signals.device)
    else:
        own = signals.asked.sum(-1, keepdim=True)
    return _place(torch.arange(1, count + 1, device=signals.device), own, total, count)


def _place(number: Any, own: Any, total: int, count: int) -> Any:
    """Where query `number` of `count`, from 1 on, stands among `total`, the row's own the last `own` of them."""
    return total - own + (number * own + count - 1) // count - 1


def _attention(signals: Signals, count: int, apart: int) -> Tensor:
    if signals.plain:
        total = signals.queries.shape[2]
        return _plain(signals, [_place(number, total, total, count) for number in range(1, count + 1)], apart)
    places = sample(signals, count)
    latest = signals.query_positions.gather(1, places) - apart
    index = places[:, None, :, None].expand(-1, signals.queries.shape[1], -1, signals.dim)
    queries = signals.grouped(signals.queries.gather(2, index).float() * signals.scaling).flatten(2, 3)
    logits = (queries @ signals.keys32.mT).unflatten(2, (signals.group, -1))
    near = signals.positions[:, :, None] > latest[:, None, :, None]
    hidden = near if signals.valid is None else near | ~signals.valid[:, :, None]
    logits.masked_fill_(hidden[:, :, None], NEGATIVE)
    # The softmax of a query without any such entry is NaN.
    some = ~hidden.all(-1)
    weights = logits.softmax(-1).masked_fill_(~some[:, :, None, :, None], 0.0)
    return weights.sum((2, 3)) / (signals.group * some.sum(-1).clamp_min(1)[..., None])


def _plain(signals: Signals, places: list[int], apart: int) -> Tensor:
    """Do the same where all rows hold all their tokens: no query looks at what it can't see."""
    offset = signals.tokens - signals.queries.shape[2]
    seen = [(place, offset + place - apart) for place in places if offset + place >= apart]
    received = torch.zeros(signals.batch, signals.kv_heads, signals.tokens, device=signals.device)
    for start in range(0, len(seen), _BLOCK):
        index, latest = zip(*seen[start : start + _BLOCK], strict=True)
        asked = signals.queries.index_select(2, async_tensor(index, signals.device))
        queries = signals.grouped(asked.float() * signals.scaling).flatten(2, 3)
        # Queries ascend, so that only the newest columns lie beyond some of them.
        first, columns = latest[0] + 1, latest[-1] + 1
        logits = queries @ signals.keys32[:, :, :columns].mT
        beyond = torch.arange(first, columns, device=signals.device) > async_tensor(latest, signals.device)[:, None]
        logits.unflatten(2, (signals.group, -1))[..., first:].masked_fill_(beyond, NEGATIVE)
        weights = logits.softmax(-1)
        share = weights.new_full((1, weights.shape[2]), 1 / (signals.group * len(seen)))
        received[..., :columns] += (share @ weights).squeeze(2)
    return received
