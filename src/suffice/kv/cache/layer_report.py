"""Report of what one layer of a cache keeps, by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from suffice.kv.cache.layer import CompressedLayer


@dataclass(frozen=True)
class HeadRepair:
    """Repair of the kept entries of one KV head.

    Args:
        is_kept: whether the head has kept a repair, in at least one row.
        error_before: relative error of the outputs of held-out queries before the last repair that was kept, or, if
            none was, at the last eviction: root of the sum of the squared errors over that of the squared lengths,
            averaged over rows. None if the head kept all entries, or if there were too few queries.
        error_after: the same after the repair.

    """

    is_kept: bool
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True)
class HeadReport:
    """What one KV head of one layer keeps, summed over the rows of the batch. Tokens are counted without padding.

    Args:
        layer: index of the layer in the model.
        head: index of the KV head in the model.
        tokens_seen: number of tokens seen.
        tokens_kept: number of entries kept.
        bytes_full: bytes that the head would hold without eviction, including padding.
        bytes_kept: bytes of the keys and values that it holds.
        capacity_retained: share of the capacity that the kept entries carry; None if it was not measured.
        bits: bits of the numbers of quantized keys and of quantized values; None if the cache does not quantize.
        key_error: relative error of quantized keys: root of the sum of the squared errors, divided by the root of the
            sum of the squared lengths. The mean key of the head is subtracted from the keys first. The error covers all
            entries that were quantized, including those that were evicted later. None if no entry was quantized.
        value_error: the same for values, from which no mean is subtracted.
        repair: repair of the kept entries; None if they were not repaired.

    """

    layer: int
    head: int
    tokens_seen: int
    tokens_kept: int
    bytes_full: int
    bytes_kept: int
    capacity_retained: float | None
    bits: tuple[int, int] | None = None
    key_error: float | None = None
    value_error: float | None = None
    repair: HeadRepair | None = None


@dataclass(frozen=True)
class LayerReport:
    """What one compressed layer holds.

    Args:
        heads: one report for each KV head; none before the first token.
        num_rows: number of rows of the batch.
        bytes_full: bytes of keys and values that a cache of transformers would store, without eviction and with
            padding.
        bytes_kept: bytes of the stored keys and values.
        bytes_index: bytes of everything else: positions of the entries, the numbers that repair adds to their logits,
            spare slots, and what the policy remembers for the next eviction.
        bytes_limit: limit on the sum of `bytes_kept` and `bytes_index`; None for no limit.

    """

    heads: tuple[HeadReport, ...] = ()
    num_rows: int = 0
    bytes_full: int = 0
    bytes_kept: int = 0
    bytes_index: int = 0
    bytes_limit: int | None = None


def report_layer(layer: CompressedLayer) -> LayerReport:
    """Return the report of a layer."""
    state, storage = layer.state, layer.state.storage
    if storage is None:
        return LayerReport()
    num_rows, num_heads = len(state.rows), storage.num_heads
    num_tokens = num_rows * min(state.num_seen, layer.max_readable or state.num_seen)
    bytes_full = num_tokens * num_heads * storage.bytes_per_entry
    return LayerReport(
        heads=tuple(_report_heads(layer, bytes_full // num_heads)),
        num_rows=num_rows,
        bytes_full=bytes_full,
        bytes_kept=storage.nbytes,
        bytes_index=storage.nbytes_index + state.nbytes,
        bytes_limit=layer.memory.bytes_limit(state, bytes_full),
    )


def _report_heads(layer: CompressedLayer, bytes_full: int) -> list[HeadReport]:
    """Return one report for each KV head, each of which would hold `bytes_full` without eviction."""
    state, storage = layer.state, layer.state.storage
    assert storage is not None
    heads = storage.num_heads
    sharding = layer.settings.sharding_of(heads)
    first_head = 0 if sharding is None else sharding.rank * heads  # index of the first head in the whole model
    kept = storage.num_kept.sum(0).tolist()
    nbytes = storage.nbytes_by_head
    shares = [None] * heads if state.capacity is None else state.capacity.mean(0).tolist()
    errors = [error or (None, None) for error in storage.quantization_errors]
    repairs = [None] * heads if state.repair_errors is None else _describe_repairs(state.repair_errors)
    return [
        HeadReport(
            layer=layer.index,
            head=first_head + head,
            tokens_seen=len(state.rows) * state.num_seen - sum(state.num_padding),
            tokens_kept=kept[head],
            bytes_full=bytes_full,
            bytes_kept=nbytes[head],
            capacity_retained=shares[head],
            bits=storage.bits,
            key_error=errors[head][0],
            value_error=errors[head][1],
            repair=repairs[head],
        )
        for head in range(heads)
    ]


def _describe_repairs(errors: Tensor) -> list[HeadRepair]:
    """Return the repair of each head.

    Args:
        errors: errors before and after the repair, see `suffice.kv.policy.repair.Repair`.

    """
    is_kept = (errors[..., 1] < errors[..., 0]).any(0).tolist()
    means = errors.nanmean(0).tolist()
    return [
        HeadRepair(kept, *(None if math.isnan(error) else error for error in mean))
        for kept, mean in zip(is_kept, means, strict=True)
    ]
