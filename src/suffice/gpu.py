"""What kernels on a GPU have in common: whether they may be used, and how they are launched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_enabled: ContextVar[bool] = ContextVar("suffice_kernels", default=True)


@contextlib.contextmanager
def torch_only() -> Generator[None, None, None]:
    """Use plain torch inside this context, as on a machine without Triton: for comparisons."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def enabled() -> bool:
    """Whether kernels may be used here: not inside `torch_only`."""
    return _enabled.get()


def on_gpu(*tensors: Tensor) -> bool:
    """Whether Triton kernels may be used on these: on a CUDA device that they suit, nothing to be differentiated."""
    return (
        _enabled.get()
        and all(x.is_cuda for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and _supported(tensors[0].device.index)
    )


@functools.cache
def _supported(device: int) -> bool:
    """Whether Triton is installed, and the device has the matrix units that the kernels are written for."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    import triton

    # 3.2 fails to compile loads whose mask comes from another load.
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return release >= (3, 3) and torch.cuda.get_device_capability(device) >= (8, 0)


def upload(numbers: Any, device: torch.device) -> Tensor:
    """Return a few numbers as a tensor on a device, without waiting for what that device has still to do."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class KernelsDeclinedError(Exception):
    """Kernels can't compute what they were asked; plain torch can."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument; `options` are its constants, `num_warps` and `num_stages`.

    A device of little shared memory gets fewer stages.

    Raises:
        KernelsDeclinedError: it has too little for a single one.

    """
    from triton.runtime.errors import OutOfResources

    first: Tensor = arguments[0]
    stages: int = options.pop("num_stages", 1)

    def name() -> Any:
        return (kernel, first.dtype, first.device, *sorted(options.items()))

    if _fitting:  # most devices have room for all, and a launch no time to look
        stages = _fitting.get(name(), stages)
    while stages > 0:
        try:
            with torch.cuda.device_of(first):
                kernel[grid](*arguments, **options, num_stages=stages)
        except OutOfResources:
            stages = _fitting[name()] = stages - 1
        else:
            return
    raise KernelsDeclinedError


# Fewer stages that a kernel was found to fit with, by what it is compiled for.
_fitting: dict[Any, int] = {}


def power_of_two(size: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())
