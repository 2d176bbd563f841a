"""How work over the tokens is cut into programs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST_SPLITS = 64
"""Parts that the tokens of one head are cut into at most: the next pass reads one partial result of each."""


def rows_of(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, which keys and values have as a rule."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_tokens(tokens: int, heads: int, block: int, per_processor: int, device: torch.device) -> tuple[int, int]:
    """Cut the tokens of each head so that all processors of the device have work.

    Args:
        tokens: of each head.
        heads: of all rows together.
        block: tokens that a program works on at a time.
        per_processor: programs wanted for each multiprocessor.
        device: where they run.

    Returns:
        Number of parts, and tokens of each, a multiple of `block`.

    """
    wanted = -(-per_processor * processors(device) // heads)
    # Short parts would spend their time on partial results.
    splits = max(1, min(wanted, MOST_SPLITS, tokens // (4 * block)))
    chunk = -(-tokens // (splits * block)) * block
    return -(-tokens // chunk), chunk


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; under the interpreter, enough to cut even short inputs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
