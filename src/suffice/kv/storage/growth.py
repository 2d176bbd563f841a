"""Spare slots behind stored entries, so that a new token is written in place instead of copying everything."""

from __future__ import annotations

import torch
from torch import Tensor

# A buffer grows by a sixteenth of its size, so that one copy makes room for as many new tokens.
_GROWTH = 16


class SpareSlots:
    """Free slots at the end of buffers that copies of a storage share until one of them writes there.

    Args:
        first_free: index of the first free slot.
        end: one past the last slot.

    """

    def __init__(self, first_free: int = 0, end: int = 0) -> None:
        self.first_free, self.end = first_free, max(first_free, end)
        self.is_shared = False  # by copies of the storage, whose entries must not move

    def claim(self, start: int, count: int) -> bool:
        """Claim slots for new entries; False if there are too few, or if a copy has already written there."""
        if start != self.first_free or start + count > self.end:
            return False
        self.first_free += count
        return True


def num_spare_slots(width: int, num_new: int) -> int:
    """Return how many slots to leave free behind entries; none for a chunk, because an eviction follows it."""
    return width // _GROWTH if num_new == 1 else 0


def can_write_in_place(stored: Tensor, new: Tensor) -> bool:
    """Whether new entries may be written into a tensor: not with gradients, nor into tensors of inference mode."""
    if torch.is_grad_enabled() and (stored.requires_grad or new.requires_grad):
        return False
    return torch.is_inference_mode_enabled() or not stored.is_inference()
