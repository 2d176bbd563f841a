"""Weights that accelerate keeps elsewhere: a `device_map` with layers on "cpu" or "disk"."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fetched(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's own weight where it is computed with, read from where it waits if need be; None for none."""
    weight: Tensor | None = getattr(module, name, None)
    if weight is None or weight.device.type != "meta":
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module computes on."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
