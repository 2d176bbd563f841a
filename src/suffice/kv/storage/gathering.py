"""Gathering kept entries out of all entries."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.kv.storage.base import Entries


def gather_vectors(x: Tensor, index: Tensor) -> Tensor:
    """Gather whole vectors into a new tensor.

    Args:
        x: [batch, heads, tokens, dim].
        index: long [batch, heads, width], indices of tokens.

    Returns:
        [batch, heads, width, dim].

    """
    return index_vectors(x, flat_index(x, index).flatten()).unflatten(0, index.shape)


def flat_index(x: Tensor, index: Tensor) -> Tensor:
    """Return the flat index of each indexed vector among all vectors of x, in memory order.

    Args:
        x: [batch, heads, tokens, dim].
        index: long [batch, heads, width], indices of tokens.

    """
    batch, heads, tokens, _ = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    if _is_tokens_first(x):
        row, head = first // heads, first % heads
        return index * heads + (row * tokens * heads + head)
    return index + first * tokens


def index_vectors(x: Tensor, flat: Tensor) -> Tensor:
    """Copy vectors of x by their flat index, [m, dim]; several times faster than `gather`.

    Most models store values with tokens before heads; they are indexed in that order, without a copy.
    """
    return (x.transpose(1, 2) if _is_tokens_first(x) else x).flatten(0, 2).index_select(0, flat)


def gather_index_columns(entries: Entries, index: Tensor, empty: Tensor | None = None) -> dict[str, Tensor]:
    """Gather positions, rotary positions (if there are any) and columns of entries.

    Args:
        entries: all entries.
        index: long [batch, num_key_value_heads, width].
        empty: bool, shaped like `index`, where the result holds no entry; None for nowhere.

    Returns:
        Tensors [batch, num_key_value_heads, width] by name; positions are int32, −1 for no entry.

    """
    columns = {"positions": entries.positions, "rope_positions": entries.rope_positions, **entries.columns}
    gathered: dict[str, Tensor] = {}
    for name, x in columns.items():
        if x is None:
            continue
        own = x.expand(-1, index.shape[1], -1).gather(2, index)
        is_position = name in ("positions", "rope_positions")
        own = own if empty is None else own.masked_fill(empty, -1 if is_position else 0)
        gathered[name] = own.to(torch.int32) if is_position else own
    return gathered


def _is_tokens_first(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
