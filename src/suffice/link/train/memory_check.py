"""Whether a training fits the memory: refused before any work if it can't, named if it runs out on the way."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from suffice import SufficeError

_GIB = 2**30


class DoesNotFitError(SufficeError):
    """A training needs more memory than there is."""


def least_bytes(x: Tensor, edges: int, model: nn.Module) -> int:
    """Return bytes that a training can't do without: a lower bound, for what is certain not to fit.

    Messages in compressed rows, weights with their gradients and Adam's two moments, one embedding of the nodes with
    its gradient, and the features, if they are not where the weights are.

    Args:
        x: features, [nodes, features].
        edges: message edges, each once.
        model: what is trained.

    """
    weights = list(model.parameters())
    held = 4 * sum(part.numel() * part.element_size() for part in weights)
    width = getattr(getattr(model, "encoder", model), "out_channels", 0)
    embedding = 2 * x.size(0) * width * x.element_size()
    moved = x.numel() * x.element_size() if x.device != weights[0].device else 0
    return held + embedding + moved + 2 * edges * 3 * 8


def free_bytes(device: torch.device) -> int | None:
    """Return bytes that a process could still take on a device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def check_room(x: Tensor, edges: int, model: nn.Module) -> None:
    """Refuse a training that can't fit where the model's weights are.

    Args:
        x: features, where they are held, [nodes, features].
        edges: message edges, each once.
        model: what is trained.

    Raises:
        DoesNotFitError: it needs more than is free.

    """
    device = next(model.parameters()).device
    needed, free = least_bytes(x, edges, model), free_bytes(device)
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"{x.size(0)} nodes of {x.size(1)} features and {edges} edges need at least {needed / _GIB:.1f} GiB on "
            f"{device}, {free / _GIB:.1f} GiB are free; accepted: fewer channels or features, a smaller graph, or "
            f"another device"
        )


@contextmanager
def named_shortage(checkpoint: str | Path | None = None) -> Generator[None]:
    """Turn an allocator's failure into words about what to change, and about what is kept.

    Args:
        checkpoint: file that holds the epochs that are finished, if there is one.

    Raises:
        DoesNotFitError: memory ran out.

    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in words:
            raise
        asked = re.search(r"allocate (\d+) bytes", words)
        what = f"{int(asked[1]) / _GIB:.1f} GiB more were asked for" if asked else words.partition("\n")[0]
        kept = checkpoint is not None and Path(checkpoint).exists()
        raise DoesNotFitError(
            f"memory ran out{what and f' ({what})'}; a smaller batch_size or hidden needs less"
            + (f"; finished epochs are kept in {checkpoint}, same settings go on from there" if kept else "")
        ) from error
