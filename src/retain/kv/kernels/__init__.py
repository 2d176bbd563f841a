"""Triton kernels for what is read often on a GPU; everything here has a form in plain torch that says the same.

* `observation`: log weights of the default policy, K read twice.
* `gram`, `cholesky`, `leverage`: Σ w v vᵀ, the inverse of its Cholesky factor, vᵀA⁻¹v; V read twice.
* `compaction`: kept entries moved together in place.
* `decoding`: attention of one new token over heads of unequal length.

Nothing here is imported before `usable` has said yes, so that neither Triton nor a GPU is needed for the rest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Generator
from contextvars import ContextVar

import torch
from torch import Tensor

_enabled: ContextVar[bool] = ContextVar("retain_kernels", default=True)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def torch_only() -> Generator[None, None, None]:
    """Use plain torch inside this context, as on a machine without Triton: for comparisons."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors [..., dim]: on a CUDA device, nothing to be differentiated."""
    return (
        _enabled.get()
        and all(x.is_cuda and x.dtype == tensors[0].dtype and 16 <= x.shape[-1] <= 128 for x in tensors)
        and tensors[0].dtype in _DTYPES
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
