"""Large blocks of memory kept for reuse: glibc gives each tensor above 32 MB fresh pages, and takes them back."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters (malloc.h)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


_FRESH = 2**25  # bytes of a tensor from which on its pages are fresh, unless asked


def reuse_large_blocks(nodes: int, channels: int) -> bool:
    """Let the C library keep what large tensors held for the next ones, for the whole process.

    Trainings on graphs of a million edges take about half the time, for more memory (docs/link-models.md has both).
    Small ones, whose embeddings are below 32 MB, are left alone.

    Args:
        nodes: of the graph.
        channels: of an embedding, in float32.

    Returns:
        Whether it was asked for and taken; other C libraries than glibc take nothing.

    """
    if 4 * nodes * channels < _FRESH or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*pair) == 1 for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)))
