"""Reuse of freed memory: by default, glibc maps new pages for each tensor above 32 MB and returns them at once."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MMAP_THRESHOLD = 2**25  # bytes from which on glibc maps new pages by default


def reuse_freed_memory(num_nodes: int, channels: int) -> bool:
    """Let the C library keep freed memory for the next tensors, for the whole process.

    This halves the time of a training on a graph of a million edges, but takes more memory (docs/results/link-models.md lists
    both). Nothing is changed for small graphs, whose node embeddings take less than 32 MB.

    Args:
        num_nodes: number of nodes.
        channels: channels of a node embedding in float32.

    Returns:
        whether the setting was changed; always False with C libraries other than glibc.

    """
    if 4 * num_nodes * channels < _MMAP_THRESHOLD or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
