"""Training of a model from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from suffice.link.data.graph import Graph, Split, SplitConfig
from suffice.link.models import LinkPredictor, ModelSettings
from suffice.link.train.config import TrainConfig
from suffice.link.train.memory import reuse_freed_memory
from suffice.link.train.state import EpochResult, TrainResult
from suffice.link.train.trainer import fit


def train_model(
    graph: Graph,
    split: Split,
    split_config: SplitConfig,
    model_settings: ModelSettings,
    train_config: TrainConfig,
    *,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> tuple[LinkPredictor, TrainResult]:
    """Build a model and train it. Its checkpoint can be loaded with `load_trained`.

    Args:
        graph: graph, prepared for the split.
        split: edges of the graph.
        split_config: settings of the split.
        model_settings: settings of the model.
        train_config: settings of the training; its seed also decides the initial parameters.
        device: torch device.
        checkpoint: file to write after each epoch. If it exists, the training resumes from it.
        on_epoch: called with the result of each epoch.

    """
    reuse_freed_memory(graph.num_nodes, model_settings.hidden)
    in_channels = graph.num_features
    model = model_settings.build(in_channels, train_config.seed).to(device)
    metadata = {
        "model": model_settings.to_dict(),
        "split": asdict(split_config),
        "graph": graph.name,
        "in_channels": in_channels,
    }
    result = fit(model, graph, split, train_config, checkpoint=checkpoint, metadata=metadata, on_epoch=on_epoch)
    return model, result
