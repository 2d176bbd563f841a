"""Rerotation: kept keys are rotated to consecutive positions right before the next token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from suffice.kv.hf.rotary import RotaryEmbedding, shift_positions
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.storage.base import Entries


def rerotate(stats: AttentionStats, entries: Entries, kept: Tensor, rotary: RotaryEmbedding) -> Entries:
    """Rotate the kept keys to the consecutive positions right before the next token, in their order.

    Args:
        stats: statistics of the attention call.
        entries: all entries.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty
            slots.
        rotary: the model's rotary embedding.

    Returns:
        The entries with rotated keys and new `rope_positions`.

    """
    index = kept.clamp_min(0)
    target = torch.arange(-kept.shape[-1], 0, device=kept.device) + stats.num_seen[:, None, None]
    current = stats.rope_positions.long().expand(-1, stats.num_key_value_heads, -1)
    shifts = (target.expand_as(kept) - current.gather(2, index)).masked_fill(kept < 0, 0)
    # The empty slots of a short head all have index 0 and shift 0, so shifts are added rather than written.
    all_shifts = torch.zeros_like(current).scatter_add(2, index, shifts)
    keys = shift_positions(entries.keys, all_shifts, rotary, stats.rotate_half)
    return replace(entries, keys=keys, rope_positions=current + all_shifts)
