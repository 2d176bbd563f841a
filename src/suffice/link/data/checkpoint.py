"""Checkpoints: one safetensors file whose header holds the rest as JSON, replaced by rename."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A file is no checkpoint of ours, or one of another run."""


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write a checkpoint; a reader sees the old file or the new one, never half of either.

    Args:
        path: where to.
        tensors: by name.
        facts: anything that JSON holds.

    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        # Copies, because safetensors refuses tensors that share memory.
        save_file(
            {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
            name,
            metadata={"suffice": json.dumps(facts)},
        )
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors and its facts.

    Raises:
        CheckpointError: the file is missing or no checkpoint of ours.

    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = (file.metadata() or {}).get("suffice")
            if facts is None:
                raise CheckpointError(f"{path} is no checkpoint of a link predictor")
            names: list[str] = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, json.loads(facts)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors named `optimizer/PARAMETER/NAME`."""
    return {
        f"optimizer/{number}/{name}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `pack_optimizer` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in select_prefix(tensors, "optimizer").items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix/`, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + "/")}
