"""Memory of a training: a check before it starts, advice when memory runs out, and reuse of freed memory."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from suffice import SufficeError

_GIB = 2**30

# Parameters of mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MMAP_THRESHOLD = 2**25  # glibc maps new pages for blocks of at least this number of bytes


class NotEnoughMemoryError(SufficeError):
    """A training needs more memory than is available."""


def min_training_bytes(x: Tensor, num_edges: int, model: nn.Module) -> int:
    """Return a lower bound of the memory that a training allocates, in bytes.

    The bound counts the message-passing edges in compressed sparse rows, the parameters with their gradients and two
    moments of Adam, one tensor of node embeddings with its gradient, and a copy of the features if they are on another
    device than the model.

    Args:
        x: node features, [nodes, features].
        num_edges: number of message-passing edges, each undirected edge counted once.
        model: model to train.

    """
    parameters = list(model.parameters())
    parameter_bytes = 4 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    channels = getattr(getattr(model, "encoder", model), "out_channels", 0)
    embedding_bytes = 2 * x.size(0) * channels * x.element_size()
    feature_bytes = x.numel() * x.element_size() if x.device != parameters[0].device else 0
    edge_bytes = 2 * num_edges * 3 * 8
    return parameter_bytes + embedding_bytes + feature_bytes + edge_bytes


def available_bytes(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated on a device, or None if this is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def check_memory(x: Tensor, num_edges: int, model: nn.Module) -> None:
    """Raise if a training needs more memory than is available on the device of its model, even at the lower bound.

    Args:
        x: node features, [nodes, features].
        num_edges: number of message-passing edges, each undirected edge counted once.
        model: model to train.

    Raises:
        NotEnoughMemoryError: the lower bound exceeds the available memory.

    """
    device = next(model.parameters()).device
    needed, available = min_training_bytes(x, num_edges, model), available_bytes(device)
    if available is not None and needed > available:
        raise NotEnoughMemoryError(
            f"training on {x.size(0)} nodes with {x.size(1)} features and {num_edges} edges needs at least "
            f"{needed / _GIB:.1f} GiB on {device}, but only {available / _GIB:.1f} GiB are available. Use fewer "
            f"channels or features, a smaller graph or another device"
        )


@contextmanager
def explain_out_of_memory(checkpoint: str | Path | None = None) -> Generator[None]:
    """Turn out-of-memory errors of Python and torch into an error that says what to do.

    Args:
        checkpoint: checkpoint of the finished epochs; mentioned in the error if the file exists.

    Raises:
        NotEnoughMemoryError: memory ran out.

    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error)
        is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_out_of_memory and "can't allocate memory" not in message:
            raise
        request = re.search(r"allocate (\d+) bytes", message)
        details = f"{int(request[1]) / _GIB:.1f} GiB more were requested" if request else message.partition("\n")[0]
        text = f"memory ran out{details and f' ({details})'}. Use a smaller batch_size or fewer hidden channels"
        if checkpoint is not None and Path(checkpoint).exists():
            text += f". Finished epochs are kept in {checkpoint}; the same settings resume from there"
        raise NotEnoughMemoryError(text) from error


def reuse_freed_memory(num_nodes: int, channels: int) -> bool:
    """Let the C library keep freed memory for the next tensors, for the whole process.

    By default, glibc maps new pages for each tensor above 32 MB and returns them when it is freed. Keeping them halves
    the time of a training on a graph of a million edges, but takes more memory (docs/results/link-models.md lists
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
