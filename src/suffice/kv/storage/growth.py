"""Room behind stored entries, so that a new token is written down instead of everything being copied."""

from __future__ import annotations

import torch
from torch import Tensor

# The cache grows by a sixteenth of itself at a time: one copy then serves as many new tokens.
_PART = 16


class Room:
    """Places for new entries in tensors that copies of a storage share, until one of them writes there.

    Args:
        filled: where the first free place is.
        end: where there are no more.

    """

    def __init__(self, filled: int = 0, end: int = 0) -> None:
        self.filled, self.end = filled, max(filled, end)
        self.shared = False  # by copies, for each of which what is there must stay

    def take(self, at: int, new: int) -> bool:
        """Take places for new entries from `at` on; False if there are too few, or a copy has written there."""
        if at != self.filled or at + new > self.end:
            return False
        self.filled += new
        return True


def room_for(width: int, new: int) -> int:
    """Return the places to leave free behind entries: none for a chunk, after which comes an eviction or the answer."""
    return width // _PART if new == 1 else 0


def writable(stored: Tensor, new: Tensor) -> bool:
    """Whether entries may be written into a tensor: not where gradients flow, nor into tensors of inference mode."""
    if torch.is_grad_enabled() and (stored.requires_grad or new.requires_grad):
        return False
    return torch.is_inference_mode_enabled() or not stored.is_inference()
