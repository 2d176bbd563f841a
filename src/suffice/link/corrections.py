"""Corrections of composition bias, one call each, on any module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from suffice.link.auditing.norm_layers import FrozenBatchNorm, batch_norms
from suffice.link.batches.composition import Composition, Fixed, Random
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.graph import Graph, Split
from suffice.link.train.trainer import TrainResult, TrainSettings, fit


@dataclass(frozen=True)
class Change:
    """One thing that a correction changed."""

    name: str
    before: str
    after: str


def replace_batch_norm(
    module: nn.Module, norm: str = "layer", *, names: Sequence[str] | None = None
) -> tuple[Change, ...]:
    """Swap BatchNorm for LayerNorm or for nothing, in place; the module needs to be trained again.

    Args:
        module: any module.
        norm: `layer` or `none`.
        names: paths of the layers to swap; all if not given.

    Returns:
        What was changed, empty if there is no BatchNorm.

    Raises:
        ValueError: `norm` or a name is not accepted, or the module itself is a BatchNorm.

    """
    if norm not in ("layer", "none"):
        raise ValueError(f"norm is {norm!r}; accepted: layer, none")
    found = _wrappers(module)
    if "" in found:
        raise ValueError("module is a BatchNorm itself; accepted: a module that holds some")
    if names is not None and (wrong := set(names) - found.keys()):
        raise ValueError(f"names is {sorted(wrong)}; accepted: {sorted(found)}")
    changes: list[Change] = []
    for name in found if names is None else names:
        old, channels, like = found[name]
        new = nn.Identity() if norm == "none" else nn.LayerNorm(channels)
        if like is not None:
            new = new.to(like.device, like.dtype)
        _put(module, name, new.train(old.training))
        changes.append(Change(name, type(old).__name__, type(new).__name__))
    return tuple(changes)


def freeze_statistics(
    module: nn.Module,
    score: Callable[[Tensor], Tensor],
    positives: Tensor,
    num_nodes: int,
    *,
    known: Tensor | None = None,
    composition: Composition | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> tuple[Change, ...]:
    """Re-estimate population statistics over one epoch of a given composition, and freeze them, in place.

    Args:
        module: any module.
        score: scores pairs [2, edges] through the module.
        positives: edges to estimate on, [2, edges].
        num_nodes: nodes of the graph.
        known: edges that are never drawn as negatives.
        composition: of the batches; 1:1 if not given.
        batch_size: edges in a batch.
        seed: of the batches.

    Returns:
        What was changed.

    Raises:
        ValueError: there is no BatchNorm with statistics.

    """
    layers = {name: layer for name, layer in batch_norms(module).items() if layer.running_mean is not None}
    if not layers or "" in layers:
        raise ValueError("module holds no BatchNorm with statistics; accepted: a module that holds some")
    batches = EdgeBatches(positives, num_nodes, composition or Fixed(), batch_size=batch_size, known=known, seed=seed)
    modes = [(part, part.training) for part in module.modules()]
    momenta = {name: layer.momentum for name, layer in layers.items()}
    module.eval()
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over all batches
        layer.training = True
    with torch.no_grad():
        for batch in batches:
            score(batch.pairs)
    for part, training in modes:
        part.training = training
    for name, layer in layers.items():
        layer.momentum = momenta[name]
        _put(module, name, FrozenBatchNorm(layer))
    return tuple(Change(name, type(layer).__name__, "FrozenBatchNorm") for name, layer in layers.items())


def train_corrected(
    model: nn.Module,
    graph: Graph,
    split: Split,
    settings: TrainSettings,
    *,
    composition: Composition | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[TrainResult, tuple[Change, ...]]:
    """Train with `Random` composition and balanced loss (arXiv 2604.25978; the balance is ours).

    Args:
        model: trained in place; called as `model(x, edge_index, pairs)`.
        graph: features and size.
        split: edges.
        settings: everything else.
        composition: `Random(0.05, 0.95)` if not given.
        checkpoint: as for `fit`.

    Returns:
        The training, and what of the settings was changed.

    """
    new = replace(settings, composition=composition or Random(), balanced=True)
    changes = (
        Change("composition", str(settings.composition), str(new.composition)),
        Change("balanced", str(settings.balanced), str(new.balanced)),
    )
    return fit(model, graph, split, new, checkpoint=checkpoint), changes


def _wrappers(module: nn.Module) -> dict[str, tuple[nn.Module, int, Tensor | None]]:
    """Batch norms by path with their channels and a parameter; of PyG's wrapper, the wrapper."""
    found: dict[str, tuple[nn.Module, int, Tensor | None]] = {}
    for name, layer in batch_norms(module).items():
        outer = name.rpartition(".")[0]
        parent = module.get_submodule(outer)
        wrapped = isinstance(parent, pyg.BatchNorm)
        found[outer if wrapped else name] = (parent if wrapped else layer, layer.num_features, layer.weight)
    return found


def _put(module: nn.Module, name: str, new: nn.Module) -> None:
    outer, _, last = name.rpartition(".")
    setattr(module.get_submodule(outer), last, new)
