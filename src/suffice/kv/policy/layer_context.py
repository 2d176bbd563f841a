"""What a layer tells a policy about an attention call besides its tensors: positions, and the place of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from suffice.kv.hf.tensor_parallel import Sharding


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


@dataclass(frozen=True)
class LayerContext:
    """Position of a layer among the compressed layers, and the limits that hold for its heads.

    Args:
        layer: index of the layer among the layers whose cache is compressed.
        num_layers: number of compressed layers.
        max_entries: largest number of entries that a head may keep; None for no limit.
        sharding: how the KV heads of the layer are split over processes; None if all of them are here.

    """

    layer: int = 0
    num_layers: int = 1
    max_entries: int | None = None
    sharding: Sharding | None = None
