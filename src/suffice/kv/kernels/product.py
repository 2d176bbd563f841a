"""The matrix product that all kernels use: float32 sums of exact products, whatever the inputs; and parts of inputs."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

import os
from typing import Any

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def cut(x: "Any"):
    """Return float32 numbers without the bits that bfloat16 has no room for: a mask, where rounding is a conversion."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product(left: "Any", right: "Any", total: "Any"):
    """Return total + left · right; 32-bit inputs are split in three, so that no bit of theirs is lost."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    if left.dtype == tl.float32:
        return tl.dot(left, right, total, input_precision="tf32x3")
    return tl.dot(left, right, total)
