"""Corrections of composition bias: replace or freeze BatchNorm in any module, or train with random compositions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from suffice.arguments import check_choice, check_names
from suffice.link.auditing.norm_layers import FrozenBatchNorm, batch_norms
from suffice.link.batches.composition import Composition, Fixed, Random
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.graph import Graph, Split
from suffice.link.train.config import TrainConfig
from suffice.link.train.trainer import TrainResult, fit


@dataclass(frozen=True)
class Change:
    """One change that a correction made.

    Args:
        name: name of the layer or setting.
        before: class of the layer, or value of the setting, before the correction.
        after: class or value after the correction.

    """

    name: str
    before: str
    after: str


def replace_batch_norm(
    module: nn.Module, norm: str = "layer", *, names: Sequence[str] | None = None
) -> tuple[Change, ...]:
    """Replace BatchNorm by LayerNorm or by no norm, in place. The module must be trained again afterwards.

    Args:
        module: any module.
        norm: `layer` or `none`.
        names: names of the layers to replace (as in `named_modules`); all BatchNorm layers by default.

    Returns:
        the replaced layers; empty if there is no BatchNorm.

    Raises:
        ValueError: `norm` is unknown, a name is not a BatchNorm of the module, or the module itself is a BatchNorm.

    """
    check_choice("norm", norm, ("layer", "none"))
    if names is not None:
        names = check_names("names", names, "names of layers", "['decoder.norm']")
    layers = _replaceable_layers(module)
    if "" in layers:
        raise ValueError(
            f"module must contain BatchNorm layers, got {type(module).__name__}, which cannot be replaced in place"
        )
    if names is not None and (unknown := set(names) - layers.keys()):
        raise ValueError(f"names must be BatchNorm layers of the module ({sorted(layers)}), got {sorted(unknown)}")
    changes: list[Change] = []
    for name in layers if names is None else names:
        old, batch_norm = layers[name]
        new = nn.Identity() if norm == "none" else nn.LayerNorm(batch_norm.num_features)
        parameter = next(batch_norm.parameters(), None)
        if parameter is not None:
            new = new.to(parameter.device, parameter.dtype)
        _replace_submodule(module, name, new.train(old.training))
        changes.append(Change(name, type(old).__name__, type(new).__name__))
    return tuple(changes)


def freeze_statistics(
    module: nn.Module,
    score: Callable[[Tensor], Tensor],
    positives: Tensor,
    num_nodes: int | tuple[int, int],
    *,
    known: Tensor | None = None,
    composition: Composition | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> tuple[Change, ...]:
    """Estimate the running statistics of BatchNorm again over one epoch, and freeze them, in place.

    Args:
        module: any module.
        score: scoring function that uses `module`, pairs [2, edges] -> scores [edges].
        positives: positive edges of the epoch, long [2, edges].
        num_nodes: number of nodes of the graph, or the numbers of both sides of a bipartite graph.
        known: more edges that are never sampled as negatives, long [2, edges].
        composition: how many positives a batch contains; `Fixed(0.5)` by default.
        batch_size: edges in a batch.
        seed: seed of the batches.

    Returns:
        the frozen layers.

    Raises:
        ValueError: the module contains no BatchNorm with running statistics.

    """
    layers = {name: layer for name, layer in batch_norms(module).items() if layer.running_mean is not None}
    if not layers or "" in layers:
        raise ValueError(f"module must contain BatchNorm layers with running statistics, got {type(module).__name__}")
    batches = EdgeBatches(positives, num_nodes, composition or Fixed(), batch_size=batch_size, known=known, seed=seed)
    with _collect_statistics(module, list(layers.values())), torch.no_grad():
        for batch in batches:
            score(batch.pairs)
    for name, layer in layers.items():
        _replace_submodule(module, name, FrozenBatchNorm(layer))
    return tuple(Change(name, type(layer).__name__, "FrozenBatchNorm") for name, layer in layers.items())


def train_corrected(
    model: nn.Module,
    graph: Graph,
    split: Split,
    config: TrainConfig,
    *,
    composition: Composition | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[TrainResult, tuple[Change, ...]]:
    """Train with the `Random` composition and the balanced loss.

    The composition is the correction of arXiv 2604.25978. The balanced loss is added to it because random fractions
    alone can teach a model to infer the fraction of positives in its batch.

    Args:
        model: module called as `model(x, edge_index, pairs)`; trained in place.
        graph: graph that provides the node features.
        split: edges of the graph.
        config: all other settings of the training.
        composition: how many positives a batch contains; `Random(0.05, 0.95)` by default.
        checkpoint: file to write after each epoch and to resume from, as for `fit`.

    Returns:
        the result of the training and the settings that were changed.

    """
    corrected = replace(config, composition=composition or Random(), balanced=True)
    changes = (
        Change("composition", str(config.composition), str(corrected.composition)),
        Change("balanced", str(config.balanced), str(corrected.balanced)),
    )
    return fit(model, graph, split, corrected, checkpoint=checkpoint), changes


def _replaceable_layers(module: nn.Module) -> dict[str, tuple[nn.Module, TorchBatchNorm]]:
    """Return the layers to replace by name, each with torch's BatchNorm: PyG's wrapper is replaced with its content."""
    found: dict[str, tuple[nn.Module, TorchBatchNorm]] = {}
    for name, layer in batch_norms(module).items():
        parent_name = name.rpartition(".")[0]
        parent = module.get_submodule(parent_name)
        if isinstance(parent, pyg.BatchNorm):
            found[parent_name] = parent, layer
        else:
            found[name] = layer, layer
    return found


@contextmanager
def _collect_statistics(module: nn.Module, layers: Sequence[TorchBatchNorm]) -> Generator[None]:
    """Reset the statistics of BatchNorm layers and average them over all batches scored within the context.

    Everything else is in eval mode. Modes and momenta are restored on exit.
    """
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean over all batches
        layer.training = True
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _replace_submodule(module: nn.Module, name: str, new: nn.Module) -> None:
    parent_name, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent_name), attribute, new)
