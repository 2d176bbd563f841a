"""Checkpoints: one safetensors file of tensors, with everything else as JSON in its header."""

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

_HEADER_KEY = "suffice"


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint, or it is the checkpoint of another run."""


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write a checkpoint and return its path.

    The file is replaced by a rename, so that other processes read either the old file or the complete new one.

    Args:
        path: file to write.
        tensors: tensors by name.
        metadata: everything else, in types that JSON can represent.

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
            metadata={_HEADER_KEY: json.dumps(metadata)},
        )
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Returns:
        Its tensors by name, and its metadata.

    Raises:
        CheckpointError: the file is missing or damaged, or another program or an earlier version wrote it.

    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if _HEADER_KEY not in header:
                raise CheckpointError(
                    f"{path} must hold {_HEADER_KEY!r} in its header, got {sorted(header)}. Another program or an "
                    f"earlier version wrote this file: delete or rename it, and write it again with this version."
                )
            names: list[str] = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, json.loads(header[_HEADER_KEY])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a checkpoint in safetensors format, got an error: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors named `optimizer/PARAMETER/NAME`."""
    return {
        f"optimizer/{number}/{name}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `pack_optimizer` returned into an optimizer, in place."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in select_prefix(tensors, "optimizer").items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix/`, named without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + "/")}
