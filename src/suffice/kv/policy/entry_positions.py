"""Positions of cached entries and of the newest queries, padding included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EntryPositions:
    """Where the entries and queries of an attention call stand in their texts.

    Without arguments, the entries are all tokens seen so far, without padding, and the queries are the last of them.
    A position is the index of a token within the text of its own row; it is negative where there is no token.

    Args:
        valid: bool [batch, entries], False on left padding. None if there is no padding, or if `entries` is given.
        entries: long [batch, 1 or num_key_value_heads, entries], positions of the entries. None if the entries are
            all tokens seen so far.
        queries: long [batch, queries], positions of the queries. Required together with `entries`.
        rope: long, shaped like `entries`: the positions by which the keys were rotated, if they differ from `entries`.
        num_seen: number of tokens that each row has seen, if it is known without reading it from the device.

    """

    valid: Tensor | None = None
    entries: Tensor | None = None
    queries: Tensor | None = None
    rope: Tensor | None = None
    num_seen: Sequence[int] | None = None
