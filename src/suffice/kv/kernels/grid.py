"""Division of the tokens of a head among programs of a kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_SPLITS = 64
"""Maximum number of splits of one head. The next kernel reads one partial result for each split."""


def contiguous_rows(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension. Keys and values usually have one already and are not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_tokens(
    num_tokens: int, num_heads: int, block: int, programs_per_processor: int, device: torch.device
) -> tuple[int, int]:
    """Split the tokens of each head so that all multiprocessors of the device have work.

    Args:
        num_tokens: number of tokens of each head.
        num_heads: number of heads in the whole batch.
        block: number of tokens that a program processes at a time.
        programs_per_processor: number of programs wanted for each multiprocessor.
        device: device that runs the kernel.

    Returns:
        Number of splits of each head, and number of tokens in a split, a multiple of `block`.

    """
    wanted = -(-programs_per_processor * num_multiprocessors(device) // num_heads)
    # Each split has at least four blocks, because writing and reading the partial results of shorter splits takes
    # longer than the computation that they distribute.
    num_splits = max(1, min(wanted, MAX_SPLITS, num_tokens // (4 * block)))
    split_size = -(-num_tokens // (num_splits * block)) * block
    return -(-num_tokens // split_size), split_size


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device.

    On the CPU, where Triton's interpreter runs the kernels, the number is 8, so that short inputs are split too.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
