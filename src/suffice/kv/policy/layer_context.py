"""Where a layer stands in the model: what budgets and a few weights need to know beside the tensors."""

from __future__ import annotations

from dataclasses import dataclass

from suffice.kv.hf.tensor_parallel import Sharding


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
