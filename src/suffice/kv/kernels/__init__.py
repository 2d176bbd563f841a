"""Triton kernels for the operations of the KV cache that are limited by memory bandwidth on a GPU.

Each operation has an equivalent in plain PyTorch, which computes the same results up to rounding.

* `mixture`: log weights of the policies `capkv`, `capkv-spread` and `capkv-profile`. It reads the keys twice:
  `key_sums` is the first pass, `key_scores` the second, and `log_weights` combines their results. `moments` computes
  the mean and mean square of the queries.
* `leverage`: leverage scores and capacity. It reads the values twice: `gram` computes G = Σ w v vᵀ, `cholesky` inverts
  the Cholesky factor of I + G/σ², and `leverage` computes vᵀA⁻¹v.
* `compaction`: moves the kept entries to the front of their buffer.
* `decoding`: attention of one new token over heads of unequal length.
* `quantized_decoding`: the same over quantized entries.
* `packing`: quantizes rotated keys and values.
* `grid`, `blocks`, `dot`: shared by the kernels.

The modules of this package import Triton. Import them only after `usable` has returned True.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.gpu import can_use_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(*tensors: Tensor, max_dim: int = 128) -> bool:
    """Return whether the kernels support the dtype and the last dimension of these tensors [..., dim].

    The dtype must be float32, bfloat16 or float16, the same for all, and the last dimension from 16 to `max_dim`.
    """
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(x.dtype == dtype and 16 <= x.shape[-1] <= max_dim for x in tensors)


def usable(*tensors: Tensor) -> bool:
    """Return whether the kernels can process these tensors: `supports` and `can_use_kernels` are both true."""
    return supports(*tensors) and can_use_kernels(*tensors)
