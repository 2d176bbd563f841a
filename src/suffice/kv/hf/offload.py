"""Weights that accelerate offloads to the CPU or to disk (a `device_map` with "cpu" or "disk")."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def materialized_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return a weight of a module, loaded on its execution device if it is offloaded; None if it does not exist."""
    weight: Tensor | None = getattr(module, name, None)
    if weight is None or weight.device.type != "meta":
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    for submodule in module.modules():
        device = getattr(getattr(submodule, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
