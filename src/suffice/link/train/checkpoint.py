"""Checkpoints of trainings, from which a training is resumed and a trained model is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suffice.link.data import checkpoint as files
from suffice.link.data.checkpoint import CheckpointError
from suffice.link.models import LinkPredictor, ModelSettings
from suffice.link.train.state import EpochResult, TrainState


def save_training(
    path: str | Path,
    metadata: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
) -> None:
    """Write everything that `resume_training` needs.

    Args:
        path: file to write.
        metadata: JSON-serializable description of the training; a training is resumed only if it is equal.
        model: model with the parameters of the last epoch.
        optimizer: its optimizer.
        state: finished epochs.

    """
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"best/{key}": value for key, value in state.best_parameters.items()}
    tensors |= files.pack_optimizer(optimizer)
    epochs = [asdict(epoch) for epoch in state.epochs]
    files.save_checkpoint(path, tensors, {**metadata, "epochs": epochs, "kept_epoch": state.kept_epoch})


def resume_training(
    path: str | Path, metadata: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Load model and optimizer, in place, and return the finished epochs.

    Raises:
        CheckpointError: the checkpoint belongs to a training with other metadata.

    """
    tensors, found = files.load_checkpoint(path)
    for key, value in metadata.items():
        if found.get(key) != json.loads(json.dumps(value)):
            raise CheckpointError(
                f"checkpoint must be of a training with {key} {value}, got {path} with {key} {found.get(key)}. "
                f"Delete the file or choose another one"
            )
    model.load_state_dict(files.select_prefix(tensors, "model"))
    files.unpack_optimizer(optimizer, tensors)
    epochs = [EpochResult(e["number"], e["loss"], e["metric"], tuple(e["fractions"])) for e in found["epochs"]]
    return TrainState(epochs, found["kept_epoch"], files.select_prefix(tensors, "best"))


def load_trained(path: str | Path, device: str = "cpu") -> tuple[LinkPredictor, dict[str, Any]]:
    """Load the link predictor of a checkpoint, in eval mode, with the metadata of its training.

    Args:
        path: checkpoint that `suffice link` or a study wrote.
        device: device for the model.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint of this package, or does not describe its model.

    """
    tensors, metadata = files.load_checkpoint(path)
    if "model" not in metadata or "in_channels" not in metadata:
        raise CheckpointError(
            f"{path} must be a checkpoint written by `suffice link` or by a study, "
            "got one that does not describe its model"
        )
    model = ModelSettings.from_dict(metadata["model"]).build(metadata["in_channels"])
    model.load_state_dict(files.select_prefix(tensors, "best") or files.select_prefix(tensors, "model"))
    return model.to(device).eval(), metadata
