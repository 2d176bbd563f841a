"""Rerotation: kept keys are rotated to consecutive positions right before the next token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.storage.base import Entries


def rerotate(stats: AttentionStats, entries: Entries, kept: Tensor) -> Entries:
    """Rotate the kept keys to the consecutive positions right before the next token, in their order.

    Args:
        stats: statistics of the attention call, with the rotary embedding of the layer.
        entries: all entries.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty
            slots.

    Returns:
        The entries with rotated keys, in their own dtype, and new `rope_positions`. Keys of a layer without a rotary
        embedding do not change.

    """
    index = kept.clamp_min(0)
    target = torch.arange(-kept.shape[-1], 0, device=kept.device) + stats.num_seen[:, None, None]
    current = stats.rope_positions.long().expand(-1, stats.num_key_value_heads, -1)
    shifts = (target.expand_as(kept) - current.gather(2, index)).masked_fill(kept < 0, 0)
    # The empty slots of a short head all have index 0 and shift 0, so shifts are added rather than written.
    all_shifts = torch.zeros_like(current).scatter_add(2, index, shifts)
    keys = entries.keys
    if stats.rotary is not None:
        keys = stats.rotary.rotate_keys(keys, all_shifts).to(keys.dtype)
    return replace(entries, keys=keys, rope_positions=current + all_shifts)
