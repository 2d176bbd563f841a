"""Dropout whose mask is drawn a byte for each number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class ByteDropout(nn.Dropout):
    """Dropout, many times as fast on CPUs: one random byte for each number, eight at a draw.

    The share that is kept is rounded to 1/256, and what is kept is scaled by the rounded share. On other devices it
    is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Drop numbers of a tensor of any shape."""
        kept = round(256 * (1 - self.p))
        if not self.training or kept in (0, 256) or not input.is_cpu:
            return super().forward(input)
        count = input.numel()
        words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = words.view(torch.uint8)[:count].view(input.shape)
        return _Masked.apply(input, torch.lt(mask, kept, out=mask), 256 / kept)  # pyright: ignore[reportReturnType]


class _Masked(Function):
    # The mask stays a byte for each number. Bytes are compared, and made floats, several times as fast as booleans.
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.mask, ctx.scale = mask, scale
        return mask.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.mask.to(gradients[0].dtype).mul_(gradients[0]).mul_(ctx.scale), None, None


def drop_features(dropout: nn.Module, x: Tensor) -> Tensor:
    """Apply dropout to features, of a sparse matrix (CSR) to what it holds."""
    if x.layout != torch.sparse_csr:
        return dropout(x)
    values = dropout(x.values())
    if values is x.values():
        return x
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)
