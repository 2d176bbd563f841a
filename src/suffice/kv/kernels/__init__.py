"""Triton kernels for what is read often on a GPU; everything here has a form in plain torch that says the same.

* `observation`: log weights of the default policy and of `capkv`, K read twice; its kernels are `first`, `second` and
  `terms`.
* `gram`, `cholesky`, `leverage`: Σ w v vᵀ, the inverse of its Cholesky factor, vᵀA⁻¹v and capacities; V read twice.
* `compaction`: kept entries moved together in place.
* `decoding`: attention of one new token over heads of unequal length.

Nothing here is imported before `usable` has said yes, so that neither Triton nor a GPU is needed for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.gpu import can_use_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels support the dtype, which must be one for all, and the last dimension of these tensors."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(x.dtype == dtype and 16 <= x.shape[-1] <= 128 for x in tensors)


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors [..., dim], which must be of one dtype."""
    return supports(*tensors) and can_use_kernels(*tensors)
