"""Checkpoints of trainings, from which a training is resumed and a trained model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suffice.link.data import checkpoint as files
from suffice.link.data.checkpoint import CheckpointError
from suffice.link.data.graph import Graph, Split
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
    expected = json.loads(json.dumps(metadata))
    _check_digests(path, found, expected["data"])
    for key, value in expected.items():
        if found.get(key) != value:
            here, there = _describe_difference(value, found.get(key))
            raise CheckpointError(
                f"checkpoint must be of a training with {key} {here}, got {path} with {there}. To go on with "
                f"it, use its settings; for another training, write another file"
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


def data_digests(graph: Graph, split: Split) -> dict[str, str]:
    """Return a digest of the graph (nodes, features and edges) and one of the split, by which checkpoints know them."""
    edges = graph.edges[:, (graph.edges[0] * graph.num_nodes + graph.edges[1]).argsort()]
    parts = [getattr(split, name) for name in Split.__dataclass_fields__]
    return {"graph": _digest(graph.x, edges, name=graph.features), "split": _digest(*parts)}


def check_data(path: str | Path, metadata: Mapping[str, Any], graph: Graph, split: Split) -> None:
    """Raise unless a model was trained on a graph and a split.

    Args:
        path: its checkpoint, for the message.
        metadata: metadata of the checkpoint, as `load_trained` returns it.
        graph: the graph.
        split: edges of the graph.

    Raises:
        CheckpointError: the model was trained on another graph or split.

    """
    _check_digests(path, metadata, data_digests(graph, split))


def _check_digests(path: str | Path, metadata: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    found = metadata.get("data", {})
    if found.get("graph") != expected["graph"]:
        raise CheckpointError(
            f"checkpoint must be of a training on this graph, got {path}, which was trained on other edges or features "
            f"({metadata.get('graph', 'no name')}). Delete the file or choose another one"
        )
    if found.get("split") != expected["split"]:
        raise CheckpointError(
            f"checkpoint must be of a training on this split, got {path}, which was trained on another split of the "
            f"graph, so that it may know edges of this test. Use the same seed and fractions, or another file"
        )


def _digest(*tensors: Tensor, name: str = "") -> str:
    digest = hashlib.sha256(name.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _describe_difference(here: Any, there: Any) -> tuple[str, str]:
    """Return the values that differ: of mappings, only the items that do."""
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return repr(here), repr(there)
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    first, second = (", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (here, there))
    return first, second
