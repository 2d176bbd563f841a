"""What all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass

from suffice.kv.budget.protection import Protection
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.storage.quantized import Quantization


@dataclass(frozen=True)
class Settings:
    """What all layers of a cache share.

    Args:
        policy: what to keep.
        budget: how much: entries of each head, or a fraction of what was seen.
        protection: what is always kept.
        always: hold the budget at all times; False evicts after the first forward pass only.
        interval: with `always`, how many tokens may be generated between evictions.
        compact: move kept keys together by their rotary embedding.
        measure_capacity: measure the share of the capacity that is kept.
        layers: number of layers.
        sharding: how the heads are split over processes; None if they are not.
        quantization: how what is kept is quantised; None if it is not.
        most: entries that a head may hold while others can take them; None if there is no limit.

    """

    policy: Policy
    budget: float
    protection: Protection
    always: bool
    interval: int
    compact: bool
    measure_capacity: bool
    layers: int
    sharding: Sharding | None = None
    quantization: Quantization | None = None
    most: int | None = None
