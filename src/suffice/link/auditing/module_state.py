"""Run a module's norm layers in training or eval mode, and restore its state afterwards."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from suffice.link.auditing.norm_layers import norm_layers


@contextmanager
def norm_mode(module: nn.Module | None, *, training: bool, frozen: set[str]) -> Generator[None]:
    """Put the norm layers into training or eval mode, and everything else (such as dropout) into eval mode.

    The mode of every submodule is restored on exit.

    Args:
        module: module whose modes are changed; None to change nothing.
        training: whether norm layers use batch statistics (as in training) or stored ones.
        frozen: names of norm layers that stay in eval mode.

    """
    if module is None:
        yield
        return
    modes = _training_modes(module)
    for part in module.modules():
        part.training = False
    for name, layer in norm_layers(module).items():
        for inner_name, part in layer.named_modules():
            path = f"{name}.{inner_name}" if inner_name else name
            part.training = training and path not in frozen
    try:
        yield
    finally:
        _restore_modes(modes)


@contextmanager
def preserve_state(module: nn.Module | None) -> Generator[None]:
    """Disable gradients, and on exit restore modes, norm-layer buffers and all random generators.

    Buffers outside norm layers are not copied: they may be large (a whole graph), and nothing changes them while all
    other layers are in eval mode.
    """
    modes = _training_modes(module) if module is not None else []
    buffers = _norm_buffers(module) if module is not None else []
    saved = [(buffer, buffer.detach().clone()) for buffer in buffers]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
        _restore_modes(modes)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _training_modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(part, part.training) for part in module.modules()]


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training


def _norm_buffers(module: nn.Module) -> list[Tensor]:
    return [buffer for layer in norm_layers(module).values() for buffer in layer.buffers()]
