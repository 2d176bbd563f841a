"""Where kept entries stand for the rotary embedding: moved up to the next token, so that no place is left empty."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from suffice.kv.hf.rotary import RotaryEmbedding, shift_positions
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.storage.uniform import Entries


def compacted(signals: Signals, entries: Entries, kept: Tensor, rotary: RotaryEmbedding) -> Entries:
    """Move what is kept to the places right before the next token, in its order.

    Args:
        signals: of the layer.
        entries: all of them.
        kept: which are kept, ascending, −1 for none: long [batch, kv_heads, width].
        rotary: the model's rotary embedding.

    """
    index = kept.clamp_min(0)
    target = torch.arange(-kept.shape[-1], 0, device=kept.device) + signals.seen[:, None, None]
    places = signals.places.long().expand(-1, signals.kv_heads, -1)
    steps = (target.expand_as(kept) - places.gather(2, index)).masked_fill(kept < 0, 0)
    # Left of the first kept entry of a short head stand empty places, all of index 0: added, not written.
    every = torch.zeros_like(places).scatter_add(2, index, steps)
    keys = shift_positions(entries.keys, every, rotary, signals.rotate)
    return replace(entries, keys=keys, places=places + every)
