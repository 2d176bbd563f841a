"""Quantization of rotated vectors: chooses the scale of each group, rounds its numbers and packs the integers.

The results are those of `suffice.kv.storage.vector_format.VectorFormat.quantize`, apart from the rounding of operations
that the device computes with less precision.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch

_BLOCK = 16
"""Number of vectors that a program quantizes."""

_ROUNDING = tl.constexpr(12582912.0)
"""1.5 · 2^23. Adding and subtracting it rounds a smaller float32 number to the nearest integer, ties to even."""


def quantize_rotated(vectors: Tensor, *, bits: int, group_size: int, num_scales: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rotated vectors.

    Args:
        vectors: float32 [vectors, padded_dim].
        bits: number of bits of an integer: 2, 3, 4, 5 or 8.
        group_size: number of dimensions that share a scale.
        num_scales: number of scales that are tried for each group.

    Returns:
        Packed integers, uint8 [vectors, bytes]; logarithms of the scales, uint8 [vectors, groups]; and the squared
        errors, float32 [vectors]: NaN or infinite if a vector is not finite or too large for the scales.

    """
    vectors = vectors.contiguous()
    count, padded_dim = vectors.shape
    num_groups = padded_dim // group_size
    codes = torch.empty(count, padded_dim * bits // 8, dtype=torch.uint8, device=vectors.device)
    scales = torch.empty(count, num_groups, dtype=torch.uint8, device=vectors.device)
    errors = torch.empty(count, dtype=torch.float32, device=vectors.device)
    launch(
        packing_kernel,
        (triton.cdiv(count, _BLOCK),),
        vectors,
        codes,
        scales,
        errors,
        count,
        BITS=bits,
        PADDED=padded_dim,
        GROUP_SIZE=group_size,
        NUM_SCALES=num_scales,
        BLOCK_GROUPS=block_size(num_groups, 1),
        BLOCK_SIZE=block_size(group_size, 1),
        BLOCK_N=_BLOCK,
        BLOCK_SECTION=block_size(padded_dim // 8 * {3: 1, 5: 4}.get(bits, bits), 1),
        BLOCK_EIGHTH=block_size(padded_dim // 8, 1),
        num_warps=4,
    )
    return codes, scales, errors


@triton.jit
def _scale(exponent: "Any"):
    return tl.exp2(exponent * 0.25 - 40.0)


@triton.jit
def nearest_integers(x: "Any", LARGEST: tl.constexpr):
    """Return the nearest integers from 0 to the largest one, as float32."""
    return (tl.minimum(tl.maximum(x, 0.0), LARGEST * 1.0) + _ROUNDING) - _ROUNDING


@triton.jit
def _integers(
    vectors: "Any",
    scales: "Any",
    offs_n: "Any",
    dims: "Any",
    mask: "Any",
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Return the integers of some dimensions of each vector, int32 [vectors, dims], with the stored scales."""
    x = tl.load(vectors + offs_n[:, None] * PADDED + dims[None, :], mask=mask, other=0.0)
    exponents = tl.load(
        scales + offs_n[:, None] * (PADDED // GROUP_SIZE) + (dims // GROUP_SIZE)[None, :], mask=mask, other=160
    )
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    return nearest_integers(x / _scale(exponents.to(tl.float32)) + MIDDLE, (1 << BITS) - 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_vectors"])
def packing_kernel(
    vectors: "Any",
    codes: "Any",
    scales: "Any",
    errors: "Any",
    num_vectors: "Any",
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SECTION: tl.constexpr,
    BLOCK_EIGHTH: tl.constexpr,
):
    """Quantize BLOCK_N vectors. Scale s and integer c of b bits stand for s (c − (2^b − 1)/2)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_vectors
    offs_g = tl.arange(0, BLOCK_GROUPS)
    offs_j = tl.arange(0, BLOCK_SIZE)
    mask_g = offs_g * GROUP_SIZE < PADDED
    dims = offs_g[:, None] * GROUP_SIZE + offs_j[None, :]
    mask = mask_n[:, None, None] & (mask_g[:, None] & (offs_j < GROUP_SIZE)[None, :])[None, :, :]
    x = tl.load(vectors + (offs_n * PADDED)[:, None, None] + dims[None, :, :], mask=mask, other=0.0)
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    no_clipping = tl.ceil(tl.log2(tl.max(tl.abs(x), 2) / MIDDLE) * 4.0) + 160.0
    best = tl.zeros((BLOCK_N, BLOCK_GROUPS), tl.float32)
    smallest = tl.full((BLOCK_N, BLOCK_GROUPS), float("inf"), tl.float32)
    for step in tl.static_range(NUM_SCALES):
        exponents = tl.minimum(tl.maximum(no_clipping - step, 0.0), 255.0)
        scale = _scale(exponents)
        exact = x / scale[:, :, None] + MIDDLE
        differences = exact - nearest_integers(exact, (1 << BITS) - 1)
        error = tl.sum(tl.where(mask, differences * differences, 0.0), 2) * scale * scale
        # The error of numbers that are not finite is stored, whatever the scale.
        is_better = (error < smallest) | (step == 0)
        best = tl.where(is_better, exponents, best)
        smallest = tl.where(is_better, error, smallest)
    mask_groups = mask_n[:, None] & mask_g[None, :]
    tl.store(scales + (offs_n * (PADDED // GROUP_SIZE))[:, None] + offs_g[None, :], best.to(tl.uint8), mask=mask_groups)
    smallest = tl.where(no_clipping > 255.0, float("inf"), smallest)
    tl.store(errors + offs_n, tl.sum(tl.where(mask_groups, smallest, 0.0), 1), mask=mask_n)
    # Wait until the scales are stored, because other threads read them.
    tl.debug_barrier()
    EIGHTH: tl.constexpr = PADDED // 8
    SECTION: tl.constexpr = EIGHTH if BITS == 3 else (4 * EIGHTH if BITS == 5 else EIGHTH * BITS)
    codes += offs_n[:, None] * (EIGHTH * BITS)
    offs_w = tl.arange(0, BLOCK_SECTION)
    mask_w = mask_n[:, None] & (offs_w < SECTION)[None, :]
    if BITS == 3:
        # The integers of the last two sections are in the two highest bits of the bytes of the other six.
        last = _integers(vectors, scales, offs_n, 6 * SECTION + offs_w, mask_w, BITS, PADDED, GROUP_SIZE)
        last |= _integers(vectors, scales, offs_n, 7 * SECTION + offs_w, mask_w, BITS, PADDED, GROUP_SIZE) << 3
        for block in tl.static_range(3):
            dims_w = block * SECTION + offs_w
            packed = _integers(vectors, scales, offs_n, dims_w, mask_w, BITS, PADDED, GROUP_SIZE)
            packed |= _integers(vectors, scales, offs_n, dims_w + 3 * SECTION, mask_w, BITS, PADDED, GROUP_SIZE) << 3
            packed |= ((last >> (2 * block)) & 3) << 6
            tl.store(codes + dims_w[None, :], packed.to(tl.uint8), mask=mask_w)
    else:
        LOW_BITS: tl.constexpr = SECTION // EIGHTH
        packed = tl.zeros((BLOCK_N, BLOCK_SECTION), tl.int32)
        for part in tl.static_range(EIGHTH * 8 // SECTION):
            integers = _integers(vectors, scales, offs_n, part * SECTION + offs_w, mask_w, BITS, PADDED, GROUP_SIZE)
            packed |= (integers & ((1 << LOW_BITS) - 1)) << (part * LOW_BITS)
        tl.store(codes + offs_w[None, :], packed.to(tl.uint8), mask=mask_w)
        if BITS == 5:
            offs_e = tl.arange(0, BLOCK_EIGHTH)
            mask_e = mask_n[:, None] & (offs_e < EIGHTH)[None, :]
            highest = tl.zeros((BLOCK_N, BLOCK_EIGHTH), tl.int32)
            for part in tl.static_range(8):
                integers = _integers(vectors, scales, offs_n, part * EIGHTH + offs_e, mask_e, BITS, PADDED, GROUP_SIZE)
                highest |= (integers >> 4) << part
            tl.store(codes + (SECTION + offs_e)[None, :], highest.to(tl.uint8), mask=mask_e)
