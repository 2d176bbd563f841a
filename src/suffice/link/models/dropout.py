"""Dropout whose mask is drawn with one byte for each element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class ByteDropout(nn.Dropout):
    """Dropout that draws one random byte for each element, eight at a time, which is much faster on a CPU.

    The probability of keeping an element is rounded to a multiple of 1/256, and kept elements are scaled by the rounded
    probability. On other devices this is `torch.nn.Dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Drop elements of a tensor of any shape."""
        num_kept = round(256 * (1 - self.p))  # of 256 byte values
        if not self.training or num_kept in (0, 256) or not input.is_cpu:
            return super().forward(input)
        count = input.numel()
        words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = words.view(torch.uint8)[:count].view(input.shape)
        mask = torch.lt(mask, num_kept, out=mask)
        return _ApplyMask.apply(input, mask, 256 / num_kept)  # pyright: ignore[reportReturnType]


class _ApplyMask(Function):
    # The mask stays uint8: bytes are compared and converted to floats several times as fast as booleans.
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.mask, ctx.scale = mask, scale
        return _scaled_product(mask, x, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scaled_product(ctx.mask, gradients[0], ctx.scale), None, None


def _scaled_product(mask: Tensor, x: Tensor, scale: float) -> Tensor:
    # `addcmul` to 0 multiplies by both in one pass.
    result = mask.to(x.dtype)
    return torch.addcmul(x.new_zeros(()), result, x, value=scale, out=result)


def drop_features(dropout: nn.Module, x: Tensor) -> Tensor:
    """Apply dropout to features [nodes, features]; of a sparse CSR tensor, to its stored values."""
    if x.layout != torch.sparse_csr:
        return dropout(x)
    values = dropout(x.values())
    if values is x.values():
        return x
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)
