"""Data-parallel training: every rank holds the graph and its share of the edges; DDP averages the gradients."""

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


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str) -> Generator[str]:
    """Join the process group of `torchrun`, if the process was started by it, and yield the device of this rank.

    Args:
        device: Torch device; `cuda` becomes the device of the local rank.

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


class TrainingForward(nn.Module):
    """The forward pass of a training step as one module, which DDP can wrap.

    Args:
        model: module called as `model(x, edge_index, pairs)` that returns logits [pairs].

    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of logits [pairs] whose losses are summed; a single one unless it is a `LinkPredictor`."""
        if isinstance(self.model, LinkPredictor):
            return self.model.training_logits(x, edge_index, pairs)
        return (self.model(x, edge_index, pairs),)


def distribute(model: nn.Module) -> nn.Module:
    """Return the forward pass of a training step; with several ranks, DDP averages its gradients."""
    forward = TrainingForward(model)
    return forward if rank_and_world_size()[1] == 1 else DistributedDataParallel(forward)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0, such as the running statistics of norm layers, to all ranks."""
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all_ranks() -> None:
    """Block until all ranks have called this function."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()
