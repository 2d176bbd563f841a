"""Matrix products with float32 accumulation, and rounding of their operands."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

import os
from typing import Any

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers instead of their values.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def truncate_to_bfloat16(x: "Any"):
    """Return float32 numbers without the bits that bfloat16 cannot hold.

    Truncation applies a bit mask. Rounding would convert in both directions, which is slower.
    """
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def precise_dot(left: "Any", right: "Any", acc: "Any"):
    """Return acc + left · right, accumulated in float32.

    float32 operands are multiplied as three TF32 parts each, which preserves their precision.
    """
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    if left.dtype == tl.float32:
        return tl.dot(left, right, acc, input_precision="tf32x3")
    return tl.dot(left, right, acc)
