"""Orthogonal transforms that spread outliers over all dimensions of a vector before it is quantized."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

DIM_MULTIPLE = 8
"""Vectors are padded with zeros to a multiple of this number of dimensions, because packed integers fill bytes."""


def padded_dim(dim: int) -> int:
    """Return the number of dimensions after padding."""
    return -(-dim // DIM_MULTIPLE) * DIM_MULTIPLE


@functools.lru_cache(maxsize=32)
def rotation(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an orthogonal matrix R without dominant entries; vectors x are transformed to x R.

    For a power of two, this is the normalized Hadamard matrix. For dim = 2^k m with an odd m, it is the Kronecker
    product of the Hadamard matrix of 2^k dimensions and the orthonormal discrete cosine transform of m dimensions.

    Args:
        dim: number of dimensions before padding.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        [dim, padded_dim(dim)]; its rows are orthonormal.

    """
    size = padded_dim(dim)
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    matrix = torch.kron(hadamard / math.sqrt(power), _cosine_transform(size // power))
    # A tensor that is made in inference mode could not be used outside of it.
    with torch.inference_mode(False):
        return matrix[:dim].to(dtype=dtype, device=device, copy=True)


def _cosine_transform(size: int) -> Tensor:
    """Return the orthonormal discrete cosine transform (DCT-II), [size, size]."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (index[:, None] + 0.5) * index) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix
