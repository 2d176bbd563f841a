"""Helpers for computing on a GPU: when Triton kernels may be used, how they are launched, asynchronous copies.

Every Triton kernel of the package has an equivalent in plain PyTorch, which is used where the kernel cannot be.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_kernels_enabled: ContextVar[bool] = ContextVar("suffice_kernels", default=True)

_reduced_stages: dict[Any, int] = {}
"""Number of pipeline stages of the kernels that do not fit the device with the requested number."""


class KernelFallbackError(Exception):
    """A Triton kernel cannot compute a result that plain PyTorch can compute."""


@contextlib.contextmanager
def disable_kernels() -> Generator[None, None, None]:
    """Context manager in which plain PyTorch is used instead of the Triton kernels.

    Example:
        >>> with disable_kernels():
        ...     kernels_enabled()
        False

    """
    token = _kernels_enabled.set(False)
    try:
        yield
    finally:
        _kernels_enabled.reset(token)


def kernels_enabled() -> bool:
    """Return whether Triton kernels are enabled: True outside of `disable_kernels`."""
    return _kernels_enabled.get()


def can_use_kernels(*tensors: Tensor) -> bool:
    """Return whether Triton kernels can process these tensors.

    Kernels need a supported CUDA device and a supported version of Triton. They have no backward pass, so they are not
    used for tensors that require a gradient.
    """
    return (
        kernels_enabled()
        and all(x.is_cuda for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and _is_supported(tensors[0].device.index)
    )


@functools.cache
def _is_supported(device: int) -> bool:
    """Return whether Triton 3.3 or newer is installed and the device has compute capability 8.0 or newer."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    import triton

    # Triton 3.2 fails to compile a load whose mask depends on another load.
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= (3, 3) and torch.cuda.get_device_capability(device) >= (8, 0)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument.

    If the device has too little shared memory for `num_stages` pipeline stages, fewer are used.

    Args:
        kernel: function decorated with `triton.jit`.
        grid: number of programs in each dimension.
        arguments: arguments of the kernel; the first is a tensor.
        options: compile-time constants of the kernel, `num_warps` and `num_stages` (1 by default).

    Raises:
        KernelFallbackError: the device has too little shared memory for a single stage.

    """
    from triton.runtime.errors import OutOfResources

    first: Tensor = arguments[0]
    stages: int = options.pop("num_stages", 1)

    def key() -> Any:
        return (kernel, first.dtype, first.device, *sorted(options.items()))

    if _reduced_stages:  # Empty on most devices; then building the key, which takes time, is skipped.
        stages = _reduced_stages.get(key(), stages)
    while stages > 0:
        try:
            with torch.cuda.device_of(first):
                kernel[grid](*arguments, **options, num_stages=stages)
        except OutOfResources:
            stages = _reduced_stages[key()] = stages - 1
        else:
            return
    raise KernelFallbackError


def block_size(size: int, minimum: int = 16) -> int:
    """Return the smallest power of two that is at least `size` and `minimum`.

    Triton requires block sizes that are powers of two, and at least 16 for the operands of `tl.dot`.
    """
    return max(minimum, 1 << (size - 1).bit_length())


def async_tensor(data: Any, device: torch.device) -> Tensor:
    """Create a tensor on a device without a synchronization.

    Args:
        data: a number or a (nested) sequence of numbers, as for `torch.tensor`.
        device: device of the tensor.

    """
    return torch.tensor(data).to(device, non_blocking=True)
