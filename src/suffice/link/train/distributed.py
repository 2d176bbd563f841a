"""Data-parallel training: the graph on every rank, supervision edges sharded, gradients averaged by DDP."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from suffice.link.models.base import LinkPredictor
from suffice.link.sparse.adjacency import Adjacency


def ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are: 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str) -> Generator[str]:
    """Join the group that `torchrun` describes, if it does, and give the device of this rank.

    Args:
        device: as a person names it; `cuda` becomes the device of the local rank.

    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = f"cuda:{torch.cuda.current_device()}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Step(nn.Module):
    """What a training step runs forwards, as one module that DDP can wrap.

    Args:
        model: called as `model(x, edge_index, pairs)`.

    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, messages: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits whose losses are added up; of a foreign module, its scores."""
        if isinstance(self.model, LinkPredictor):
            return self.model.training_logits(x, messages, pairs)
        return (self.model(x, messages, pairs),)


def replicate(model: nn.Module) -> nn.Module:
    """Return the step of a model, with gradients averaged over ranks if there are several."""
    return Step(model) if ranks()[1] == 1 else DistributedDataParallel(Step(model))


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: statistics of norms, which each gathered on its own edges."""
    if ranks()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait() -> None:
    """Wait for all ranks."""
    if ranks()[1] > 1:
        dist.barrier()
