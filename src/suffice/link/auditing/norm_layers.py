"""Normalisation layers of any module: which there are, what each sees, and how to run them as in training."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

# Layers whose output for a row depends on the other rows, in training or always.
_MIXING = (TorchBatchNorm, pyg.GraphNorm, pyg.PairNorm, pyg.MeanSubtractionNorm, pyg.DiffGroupNorm)
_ROW_WISE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_BY_MODE = (pyg.LayerNorm, pyg.InstanceNorm)


@dataclass(frozen=True)
class NormLayer:
    """One normalisation layer.

    Args:
        name: path in the module.
        kind: class.
        sees: `edge batch`, `nodes`, or `not called`.
        mixes_rows: whether a row's output depends on the other rows while it is trained.
        frozen: whether it uses stored statistics even in training.

    """

    name: str
    kind: str
    sees: str
    mixes_rows: bool
    frozen: bool


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in training too.

    Args:
        layer: where statistics and affine parameters come from.

    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: TorchBatchNorm) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError("layer tracks no statistics; accepted: one with running_mean and running_var")
        self.num_features, self.eps = layer.num_features, layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("running_mean", layer.running_mean.detach().clone())
        self.register_buffer("running_var", layer.running_var.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [rows, channels]."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        """Return the size."""
        return str(self.num_features)


def batch_norms(module: nn.Module) -> dict[str, TorchBatchNorm]:
    """Return torch's batch norms by path, those inside PyG's wrappers too."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, TorchBatchNorm)}


def frozen_names(module: nn.Module, extra: Sequence[str] = ()) -> set[str]:
    """Return the batch norms that keep their statistics in training.

    These are the layers named in `extra`, those in eval mode while the module trains, and those whose affine
    parameters alone are not trained.
    """
    found = set(extra)
    layers = batch_norms(module)
    if missing := found - layers.keys():
        raise ValueError(f"frozen names {sorted(missing)}; accepted: {sorted(layers)}")
    trained = any(parameter.requires_grad for parameter in module.parameters())
    for name, layer in layers.items():
        own = list(layer.parameters())
        fixed = bool(own) and trained and not any(parameter.requires_grad for parameter in own)
        if fixed or (module.training and not layer.training):
            found.add(name)
    return found


def find_norms(
    module: nn.Module, score: Callable[[Tensor], Tensor], pairs: Tensor, frozen: set[str]
) -> tuple[NormLayer, ...]:
    """List the normalisation layers; whether one sees edges or nodes shows in the rows it is called with."""
    layers = _outermost(module)
    rows: dict[str, list[int]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: rows[name].append(inputs[0].size(0))

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    sizes = (pairs.size(1), pairs.size(1) // 2)
    try:
        with torch.no_grad():
            for size in sizes:
                score(pairs[:, :size])
    finally:
        for handle in handles:
            handle.remove()
    found: list[NormLayer] = []
    for name, layer in layers.items():
        seen = rows[name]
        half = len(seen) // 2
        grows = half > 0 and seen[:half] != seen[half:]
        sees = "edge batch" if grows else "nodes" if seen else "not called"
        inner = any(isinstance(part, FrozenBatchNorm) for part in layer.modules())
        still = name in frozen or f"{name}.module" in frozen or inner
        found.append(NormLayer(name, type(layer).__name__, sees, _mixes(layer) and not still, still))
    return tuple(found)


@contextmanager
def untouched(module: nn.Module | None) -> Generator[None]:
    """Give back modes, buffers and random generators as they were."""
    modes = [(part, part.training) for part in module.modules()] if module is not None else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    saved = [(buffer, buffer.detach().clone()) for buffer in _small_buffers(module)]
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
        for part, mode in modes:
            part.training = mode
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def mode(module: nn.Module | None, *, batch_statistics: bool, frozen: set[str]) -> Generator[None]:
    """Run norm layers on batch statistics or on stored ones, and everything else (dropout) in eval mode."""
    if module is not None:
        for part in module.modules():
            part.training = False
        for name, layer in _outermost(module).items():
            for inner, part in layer.named_modules():
                path = f"{name}.{inner}" if inner else name
                part.training = batch_statistics and path not in frozen
    yield


def _small_buffers(module: nn.Module | None) -> list[Tensor]:
    # Only norm layers run as in training, so that only their buffers can move; a graph kept in a buffer
    # elsewhere is not copied.
    if module is None:
        return []
    return [buffer for layer in _outermost(module).values() for buffer in layer.buffers()]


def _outermost(module: nn.Module) -> dict[str, nn.Module]:
    """Norm layers by path; of PyG's wrapper and torch's layer inside it, the wrapper."""
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        known = isinstance(layer, (*_MIXING, *_ROW_WISE, *_BY_MODE, pyg.BatchNorm, FrozenBatchNorm))
        if not inside and (known or _named_norm(layer)):
            found[name] = layer
    return found


def _named_norm(layer: nn.Module) -> bool:
    # Norms of other libraries; containers of norms are no norm themselves.
    kind = type(layer).__name__.lower()
    return kind.endswith(("batchnorm1d", "norm")) and not isinstance(layer, nn.ModuleList)


def _mixes(layer: nn.Module) -> bool:
    if isinstance(layer, pyg.LayerNorm):
        return layer.mode == "graph"
    if isinstance(layer, pyg.InstanceNorm):
        return True
    return isinstance(layer, (*_MIXING, pyg.BatchNorm)) or not _known_row_wise(layer)


def _known_row_wise(layer: nn.Module) -> bool:
    return isinstance(layer, (*_ROW_WISE, FrozenBatchNorm)) or "layer" in type(layer).__name__.lower()


def as_module(value: object) -> nn.Module | None:
    """Return the module if it is one."""
    return value if isinstance(value, nn.Module) else None
