"""Find the normalization layers of any module, and tell which of them mix the edges of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

# Layers whose output for one row depends on the other rows, in training or always.
_MIXING_LAYERS = (
    TorchBatchNorm,
    pyg.BatchNorm,
    pyg.HeteroBatchNorm,
    pyg.GraphNorm,
    pyg.PairNorm,
    pyg.MeanSubtractionNorm,
    pyg.DiffGroupNorm,
)
_ROW_WISE_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, pyg.HeteroLayerNorm, pyg.MessageNorm)
_CONFIGURABLE_LAYERS = (pyg.LayerNorm, pyg.InstanceNorm)  # row-wise or mixing, depending on their arguments


@dataclass(frozen=True)
class NormLayer:
    """One normalization layer of a module.

    Args:
        name: name of the layer in the module (as in `named_modules`).
        kind: name of its class.
        input_rows: what the rows of its input are: `edges`, `nodes`, or `not called` if the layer is never called.
        mixes_rows: whether the output for one row depends on the other rows in training.
        frozen: whether the layer uses stored statistics even in training.

    """

    name: str
    kind: str
    input_rows: str
    mixes_rows: bool
    frozen: bool

    @property
    def mixes_edges(self) -> bool:
        """Whether the layer normalizes over the edges of a batch."""
        return self.mixes_rows and self.input_rows == "edges"


class FrozenBatchNorm(nn.Module):
    """Batch normalization with stored statistics, both in training mode and in eval mode.

    Args:
        layer: BatchNorm that provides statistics and affine parameters.

    Raises:
        ValueError: `layer` tracks no running statistics.

    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: TorchBatchNorm) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError("layer must be a BatchNorm with track_running_stats=True, got one without statistics")
        self.num_features, self.eps = layer.num_features, layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("running_mean", layer.running_mean.detach().clone())
        self.register_buffer("running_var", layer.running_var.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, [rows, channels]."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)


def batch_norms(module: nn.Module) -> dict[str, TorchBatchNorm]:
    """Return torch's BatchNorm layers by name, including those inside PyG's wrappers."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, TorchBatchNorm)}


def norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return all normalization layers by name.

    PyG wraps torch's BatchNorm; only the wrapper is listed.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        is_inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inside_another and _is_norm(layer):
            found[name] = layer
    return found


def find_mixing_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the known layers that normalize over the rows of their input, by name, with all names of each layer.

    Of PyG's wrappers of torch's BatchNorm, only the wrapper is listed.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        is_inside_another = name.rpartition(".")[0] in found
        if not is_inside_another and isinstance(layer, (*_MIXING_LAYERS, *_CONFIGURABLE_LAYERS)) and _mixes_rows(layer):
            found[name] = layer
    return found


def all_names(module: nn.Module, layer: nn.Module) -> list[str]:
    """Return every name under which a module holds a layer."""
    return [name for name, part in module.named_modules(remove_duplicate=False) if part is layer]


def check_batch_norms(module: nn.Module, names: Sequence[str]) -> set[str]:
    """Return the names of BatchNorm layers, with the first name of a layer that the module holds under several names.

    Raises:
        ValueError: a name in `names` is not a BatchNorm of the module.

    """
    layers = {
        name: layer for name, layer in module.named_modules(remove_duplicate=False) if isinstance(layer, TorchBatchNorm)
    }
    if unknown := set(names) - layers.keys():
        raise ValueError(
            f"frozen must contain names of BatchNorm layers of the module ({sorted(layers)}), got {sorted(unknown)}"
        )
    chosen = {id(layers[name]) for name in names}
    return {name for name, layer in batch_norms(module).items() if id(layer) in chosen}


def describe_norm_layers(
    module: nn.Module, score: Callable[[Tensor], Tensor], pairs: Tensor, frozen: set[str]
) -> tuple[NormLayer, ...]:
    """Describe every normalization layer of a module.

    A layer normalizes edges if the number of rows in its input changes with the number of scored pairs. If it is not
    called for the second set of pairs, its output was cached, so that it normalizes nodes.

    Args:
        module: module behind `score`.
        score: function that scores pairs.
        pairs: pairs to score, long [rows, edges].
        frozen: names of layers that keep their statistics in training.

    """
    layers = norm_layers(module)
    rows_of_all = _count_input_rows(layers, score, pairs)
    rows_of_half = _count_input_rows(layers, score, pairs[:, : pairs.size(1) // 2])
    described: list[NormLayer] = []
    for name, layer in layers.items():
        if not rows_of_all[name] and not rows_of_half[name]:
            rows = "not called"
        else:
            rows = "edges" if rows_of_half[name] and rows_of_half[name] != rows_of_all[name] else "nodes"
        is_replaced = any(isinstance(part, FrozenBatchNorm) for part in layer.modules())
        is_frozen = name in frozen or f"{name}.module" in frozen or is_replaced
        described.append(NormLayer(name, type(layer).__name__, rows, _mixes_rows(layer) and not is_frozen, is_frozen))
    return tuple(described)


def _count_input_rows(
    layers: dict[str, nn.Module], score: Callable[[Tensor], Tensor], pairs: Tensor
) -> dict[str, list[int]]:
    """Score pairs and return the number of input rows of each call of each layer."""
    rows: dict[str, list[int]] = {name: [] for name in layers}

    def record(name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def append_rows(_module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
            rows[name] += [tensor.size(0) for tensor in tensors[:1]]

        return append_rows

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            score(pairs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _is_norm(layer: nn.Module) -> bool:
    known = (*_MIXING_LAYERS, *_ROW_WISE_LAYERS, *_CONFIGURABLE_LAYERS, FrozenBatchNorm)
    if isinstance(layer, known):
        return True
    # Layers of other libraries are recognized by their names. A list of norms is not a norm itself.
    return type(layer).__name__.lower().endswith(("batchnorm1d", "norm")) and not isinstance(layer, nn.ModuleList)


def _mixes_rows(layer: nn.Module) -> bool:
    if isinstance(layer, pyg.LayerNorm):
        return layer.mode == "graph"
    if isinstance(layer, (*_MIXING_LAYERS, pyg.InstanceNorm)):
        return True
    is_row_wise = isinstance(layer, (*_ROW_WISE_LAYERS, FrozenBatchNorm)) or "layer" in type(layer).__name__.lower()
    return not is_row_wise
