"""Corrections of composition bias: replace or freeze BatchNorm in any module, or train with random compositions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.lazy import LazyModuleMixin

from suffice.arguments import check_choice, check_names
from suffice.link.auditing.norm_layers import FrozenBatchNorm, all_names, batch_norms, find_mixing_layers
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


class NoNorm(nn.Module):
    """No normalization in place of a layer of PyG, which may be called with more than its input."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Return x."""
        return x


def replace_batch_norm(
    module: nn.Module, norm: str = "layer", *, names: Sequence[str] | None = None
) -> tuple[Change, ...]:
    """Replace BatchNorm by LayerNorm or by no norm, in place. The module must be trained again afterwards.

    Other layers of PyG that normalize over the rows of their input are replaced, too: GraphNorm, InstanceNorm,
    DiffGroupNorm, PairNorm, MeanSubtractionNorm, HeteroBatchNorm, and LayerNorm with `mode="graph"`. A layer that the
    module holds under several names is replaced under all of them.

    Args:
        module: any module.
        norm: `layer` or `none`.
        names: names of the layers to replace (as in `named_modules`); all of these layers by default.

    Returns:
        the replaced layers; empty if there are none.

    Raises:
        ValueError: `norm` is unknown, a name is not such a layer of the module, the module itself is one, a layer is
            not initialized yet, or LayerNorm cannot replace a layer because it does not know its number of channels.

    """
    check_choice("norm", norm, ("layer", "none"))
    if names is not None:
        names = check_names("names", names, "names of layers", "['decoder.norm']")
    layers = find_mixing_layers(module)
    if "" in layers:
        raise ValueError(
            f"module must contain BatchNorm layers, got {type(module).__name__}, which cannot be replaced in place"
        )
    if names is not None:
        names = [name if name in layers else name.removesuffix(".module") for name in names]
    if names is not None and (unknown := set(names) - layers.keys()):
        raise ValueError(
            f"names must be BatchNorm layers of the module, or others that normalize over rows ({sorted(layers)}), got "
            f"{sorted(unknown)}"
        )
    chosen = {id(layers[name]) for name in (layers if names is None else names)}
    new_layers: dict[int, nn.Module] = {}  # all are made before the first is replaced, so that errors change nothing
    for name, layer in layers.items():
        if id(layer) in chosen and id(layer) not in new_layers:
            new_layers[id(layer)] = _make_replacement(name, layer, norm)
    changes: list[Change] = []
    for name, layer in layers.items():
        if id(layer) in chosen:
            new = new_layers[id(layer)]
            _replace_submodule(module, name, new)
            changes.append(Change(name, type(layer).__name__, type(new).__name__))
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
        ValueError: the module contains no BatchNorm, or one that is not initialized yet.

    """
    layers = batch_norms(module)
    if not layers or "" in layers:
        raise ValueError(f"module must contain BatchNorm layers, got {type(module).__name__}")
    for name, layer in layers.items():
        _check_initialized(name, layer)
    batches = EdgeBatches(positives, num_nodes, composition or Fixed(), batch_size=batch_size, known=known, seed=seed)
    with _collect_statistics(module, list(layers.values())), torch.no_grad():
        for batch in batches:
            score(batch.pairs)
    changes: list[Change] = []
    for layer in layers.values():
        frozen = FrozenBatchNorm(layer)
        for name in all_names(module, layer):
            _replace_submodule(module, name, frozen)
            changes.append(Change(name, type(layer).__name__, "FrozenBatchNorm"))
    return tuple(changes)


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


def _make_replacement(name: str, layer: nn.Module, norm: str) -> nn.Module:
    """Return the layer that takes the place of one that normalizes over rows, and is called in the same way."""
    _check_initialized(name, layer)
    content = layer.module if isinstance(layer, pyg.BatchNorm) else layer
    is_of_torch = isinstance(layer, TorchBatchNorm)
    if norm == "none":
        new = nn.Identity() if is_of_torch else NoNorm()
    else:
        channels: int | None = getattr(content, "num_features", getattr(content, "in_channels", None))
        if channels is None:
            raise ValueError(
                f"norm must be none for {name}, because {type(layer).__name__} does not know its number of channels, "
                f"got {norm!r}"
            )
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            new = nn.GroupNorm(1, channels)  # LayerNorm for channels that are not the last dimension
        elif isinstance(layer, pyg.HeteroBatchNorm):
            new = pyg.HeteroLayerNorm(channels, layer.num_types)
        else:
            new = nn.LayerNorm(channels) if is_of_torch else pyg.LayerNorm(channels, mode="node")
    tensor = next((tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point()), None)
    if tensor is not None:
        new = new.to(tensor.device, tensor.dtype)
    return new.train(layer.training)


def _check_initialized(name: str, layer: nn.Module) -> None:
    if isinstance(layer, LazyModuleMixin) and cast(Any, layer).has_uninitialized_params():
        raise ValueError(f"module must be initialized, but {name} is not: score a batch first")


@contextmanager
def _collect_statistics(module: nn.Module, layers: Sequence[TorchBatchNorm]) -> Generator[None]:
    """Reset the statistics of BatchNorm layers and average them over all batches scored within the context.

    Everything else is in eval mode. Modes and momenta are restored on exit.
    """
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        if layer.running_mean is None:  # track_running_stats=False
            like = next(module.parameters())
            layer.track_running_stats = True
            layer.running_mean = torch.zeros(layer.num_features, device=like.device, dtype=like.dtype)
            layer.running_var = torch.ones_like(layer.running_mean)
            layer.num_batches_tracked = torch.tensor(0, device=like.device)
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
