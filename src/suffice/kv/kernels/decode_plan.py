"""Division of heads of unequal length into parts of similar length, which the decoding kernels process in parallel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from suffice.kv.kernels.grid import num_multiprocessors

_MIN_PART, _MAX_PART = 128, 4096
"""Minimum and maximum number of entries in a part."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Division of heads of unequal length into parts of similar length.

    A head consists of its packed entries, followed by the tail: the entries of the newest tokens, whose number may grow
    after the plan was made.

    Args:
        items: int32 [parts, 5], one row for each part: index of the head in the batch (row · kv_heads + head); index of
            the first entry; number of entries, −1 for all entries up to the newest; index of the first entry in the
            tail, −1 for a part of the packed entries; and index of the first entry among the packed entries of all
            heads. The parts of a head are consecutive, and the last one ends at the newest token.
        spans: int32 [batch * kv_heads + 1], index of the first part of each head, followed by the number of parts.
        bias: numbers that are added to the logits of the packed entries, float32 [packed]; None if there are none.

    """

    items: Tensor
    spans: Tensor
    bias: Tensor | None = None

    @classmethod
    def from_heads(
        cls, packed: list[tuple[int, int]], tail_length: int, device: torch.device, bias: Tensor | None = None
    ) -> DecodePlan:
        """Divide heads into parts.

        Args:
            packed: index of the first entry and number of packed entries of each head, row by row.
            tail_length: number of entries in the tail, which may be longer when the plan is used.
            device: device of the plan.
            bias: see `DecodePlan`.

        """
        first, sizes = np.asarray(packed, dtype=np.int64).T
        # About four parts for each multiprocessor.
        part = triton.next_power_of_2(int((sizes + tail_length).sum()) // (4 * num_multiprocessors(device)) + 1)
        part = min(max(part, _MIN_PART), _MAX_PART)
        packed_parts = -(-sizes // part)
        full_tail_parts = tail_length // part
        num_parts = packed_parts + full_tail_parts + 1
        ends = num_parts.cumsum()
        spans = np.concatenate(([0], ends))
        head = np.repeat(np.arange(len(sizes)), num_parts)
        number = np.arange(spans[-1]) - spans[head]
        in_tail = number >= packed_parts[head]
        tail_start = np.where(in_tail, (number - packed_parts[head]) * part, -1)
        start = first[head] + np.where(in_tail, sizes[head] + tail_start, number * part)
        size = np.where(in_tail, part, np.minimum(part, sizes[head] - number * part))
        size[ends - 1] = -1
        packed_start = (sizes.cumsum() - sizes)[head] + number * part
        items = torch.from_numpy(np.stack((head, start, size, tail_start, packed_start), axis=1).astype(np.int32))
        return cls(
            items.to(device, non_blocking=True),
            torch.from_numpy(spans.astype(np.int32)).to(device, non_blocking=True),
            bias,
        )
