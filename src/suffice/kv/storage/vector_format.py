"""The format of quantized vectors: integers of a few bits with one scale for each group of dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from suffice.kv.storage.bit_packing import field_masks, num_bytes, pack_bits, unpack_bits, unpack_parts
from suffice.kv.storage.error_feedback import ErrorFeedback
from suffice.kv.storage.rotation import padded_dim, rotation

GROUP_SIZE = 32
"""Number of dimensions that share a scale, if it divides the number of dimensions."""
# A scale is 2 to the power (byte − 160) / 4: from 2^−40 to 2^23.75, in steps of 19 %.
_STEPS, _OFFSET, _MAX_EXPONENT = 4, 160, 255
# Number of scales that are tried for each group. Smaller scales than the one that represents all numbers clip the
# largest ones, but represent the others more accurately; with fewer bits, more clipping is best.
_NUM_SCALES = {2: 5, 3: 3, 4: 2, 5: 2, 8: 1}
# Number of vectors that are quantized at a time, which limits the temporary memory.
_BLOCK = 1 << 12


@dataclass(frozen=True)
class QuantizedVectors:
    """Quantized vectors.

    Args:
        codes: packed integers, uint8 [vectors, bytes].
        scales: logarithm of the scale of each group, uint8 [vectors, groups].

    """

    codes: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedVectors:
        """Apply a function to both tensors."""
        return QuantizedVectors(function(self.codes), function(self.scales))

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class VectorFormat:
    """Quantizes vectors: rotates them, divides them into groups of dimensions, and rounds each group to integers.

    With b bits, the integers c from 0 to 2^b − 1 stand for the numbers s (c − (2^b − 1) / 2), where s is the scale of
    the group. The scale is that with the smallest squared error among a few candidates.

    Args:
        dim: number of dimensions of a vector.
        bits: number of bits of an integer: 2, 3, 4, 5 or 8.

    """

    dim: int
    bits: int

    @property
    def padded_dim(self) -> int:
        """Number of dimensions after padding."""
        return padded_dim(self.dim)

    @cached_property
    def group_size(self) -> int:
        """Number of dimensions of a group: a divisor of the dimensions, close to `GROUP_SIZE`."""
        size = self.padded_dim
        divisors = [x for x in range(8, size + 1, 8) if size % x == 0]
        return min(divisors, key=lambda x: max(x / GROUP_SIZE, GROUP_SIZE / x))

    @cached_property
    def num_groups(self) -> int:
        """Number of groups of a vector."""
        return self.padded_dim // self.group_size

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of the integers and scales of a vector."""
        return num_bytes(self.padded_dim, self.bits) + self.num_groups

    @property
    def middle(self) -> float:
        """The number in the middle of all integers, which stands for 0."""
        return (2**self.bits - 1) / 2

    @property
    def num_scales(self) -> int:
        """Number of scales that are tried for each group."""
        return _NUM_SCALES[self.bits]

    def rotation(self, like: Tensor) -> Tensor:
        """Return the orthogonal transform [dim, padded_dim], in the dtype and on the device of a tensor."""
        return rotation(self.dim, like.dtype, like.device)

    def empty(self, device: torch.device) -> QuantizedVectors:
        """Return no vectors."""
        codes = torch.empty(0, num_bytes(self.padded_dim, self.bits), dtype=torch.uint8, device=device)
        return QuantizedVectors(codes, torch.empty(0, self.num_groups, dtype=torch.uint8, device=device))

    def quantize(self, vectors: Tensor, feedback: ErrorFeedback | None = None) -> tuple[QuantizedVectors, Tensor]:
        """Quantize vectors.

        Args:
            vectors: [vectors, dim].
            feedback: how rounding compensates the errors of other dimensions; None to round each number to the nearest
                integer. With feedback, each scale is the smallest one that represents all numbers of its group.

        Returns:
            The quantized vectors, and the squared error of each, float32 [vectors]; NaN or infinite if the vector is
            not finite or too large for the scales.

        """
        if feedback is not None and len(vectors):
            return self._quantize_with_feedback(vectors, feedback)
        parts = [self._quantize_block(block) for block in vectors.split(_BLOCK)] if len(vectors) else []
        if not parts:
            return self.empty(vectors.device), vectors.new_zeros(0, dtype=torch.float32)
        codes, scales, errors = (torch.cat(part) for part in zip(*parts, strict=True))
        return QuantizedVectors(codes, scales), errors

    def _quantize_with_feedback(self, vectors: Tensor, feedback: ErrorFeedback) -> tuple[QuantizedVectors, Tensor]:
        x = vectors.float()
        x = x @ self.rotation(x)
        # Smaller scales, which clip the largest numbers, would have smaller mean squared errors of the products with
        # queries (by 30 % with 3 bits). But they make the largest products smaller, and the answers to questions worse.
        no_clipping = self._exponents_without_clipping(x.unflatten(-1, (self.num_groups, self.group_size)))
        exponents = no_clipping.clamp(0, _MAX_EXPONENT)
        codes, errors = feedback.round(x, _scales(exponents), 2**self.bits - 1)
        errors = errors.masked_fill((no_clipping > _MAX_EXPONENT).any(-1), torch.inf)
        return QuantizedVectors(pack_bits(codes, self.bits), exponents.to(torch.uint8)), errors

    def _exponents_without_clipping(self, x: Tensor) -> Tensor:
        """Return the logarithm of the smallest scale that represents all numbers of each group, [..., group_size]."""
        largest = x.abs().amax(-1)  # many times faster than `vector_norm` with infinite order
        return (largest / self.middle).log2().mul_(_STEPS).ceil_().add_(_OFFSET)

    def _quantize_block(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = vectors.float()
        x = (x @ self.rotation(x)).unflatten(-1, (self.num_groups, self.group_size))
        no_clipping = self._exponents_without_clipping(x)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for step in range(self.num_scales):
            exponents = (no_clipping - step).clamp_(0, _MAX_EXPONENT)
            scale = _scales(exponents)[..., None]
            exact = (x / scale).add_(self.middle)
            codes = exact.round().clamp_(0, 2 * self.middle)
            errors = torch.linalg.vector_norm(exact.sub_(codes), dim=-1).mul_(scale[..., 0]).square_()
            if best is None:
                best = codes, exponents, errors
                continue
            is_better = errors < best[2]
            best = (
                torch.where(is_better[..., None], codes, best[0]),
                torch.where(is_better, exponents, best[1]),
                torch.where(is_better, errors, best[2]),
            )
        assert best is not None
        codes, exponents, errors = best
        too_large = no_clipping > _MAX_EXPONENT
        total = errors.masked_fill(too_large, torch.inf).sum(-1)
        return pack_bits(codes.flatten(-2).to(torch.uint8), self.bits), exponents.to(torch.uint8), total

    def dequantize(self, vectors: QuantizedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rotated vectors, [vectors, padded_dim]. Multiply by `rotation` transposed to rotate them back."""
        x = torch.empty(len(vectors.codes), self.padded_dim, dtype=dtype, device=vectors.codes.device)
        unpack_bits(vectors.codes, self.bits, x).sub_(self.middle)
        groups = x.view(-1, self.num_groups, self.group_size)
        groups.mul_(_scales(vectors.scales)[..., None])
        return x

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """Factor of the integers of each group in the result of `unpack`."""
        if not self._groups_are_in_fields:
            return (1,) * self.num_groups
        per_field = self.num_groups // len(field_masks(self.bits))
        return tuple(mask & -mask for mask in field_masks(self.bits) for _ in range(per_field))

    @cached_property
    def _groups_are_in_fields(self) -> bool:
        """Whether each field of the bytes (see `field_masks`) holds the integers of whole groups."""
        num_fields = len(field_masks(self.bits))
        return num_fields > 0 and self.num_groups % num_fields == 0

    def unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the integers of each group of dimensions, times its factor, as numbers of a dtype.

        Args:
            codes: packed integers, uint8 [vectors, bytes].
            dtype: dtype of the result.

        Returns:
            [num_groups, vectors, group_size], contiguous.

        """
        num, size = len(codes), self.group_size
        groups = torch.empty(self.num_groups, num, size, dtype=dtype, device=codes.device)
        if self._groups_are_in_fields:
            # The integers are not shifted to the lowest bits. It is faster to divide the few scales by the factors.
            masks = _field_masks(self.bits, codes.device)
            fields = (codes & masks if len(masks) > 1 else codes).view(len(masks), num, -1, size)
            groups.view(len(masks), -1, num, size).copy_(fields.transpose(1, 2))
            return groups
        start = 0
        for part in unpack_parts(codes, self.bits):
            end = start + part.shape[-1]
            for group in range(start // size, -(-end // size)):
                first, last = max(start, group * size), min(end, (group + 1) * size)
                groups[group, :, first - group * size : last - group * size] = part[:, first - start : last - start]
            start = end
        return groups

    def unpack_scales(self, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scale of each group, divided by its factor, as numbers of a dtype.

        Args:
            exponents: logarithms of the scales, uint8 [vectors, num_groups].
            dtype: dtype of the result.

        Returns:
            [num_groups, vectors], contiguous.

        """
        scales = exponents.T.to(torch.float32, memory_format=torch.contiguous_format)
        return scales.mul_(1 / _STEPS).sub_(_exponents_of_one(self.factors, scales.device)).exp2_().to(dtype)

    def middles(self, like: Tensor) -> Tensor:
        """Return the number that stands for 0 in each group of the result of `unpack`, [num_groups]."""
        return _middles(self.factors, self.middle, like.dtype, like.device)

    def rotation_and_middles(self, like: Tensor) -> Tensor:
        """Return a matrix by which queries are multiplied before their products with the integers of keys.

        The first columns are `rotation`. The other columns, one for each group, give the sum of the rotated query over
        the group times minus the middle of its integers: the term that corrects the product, because the integers are
        not centered.

        Returns:
            [dim, padded_dim + num_groups].

        """
        return _rotation_and_middles(self.dim, self.factors, self.middle, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _rotation_and_middles(
    dim: int, factors: tuple[int, ...], middle: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    matrix = rotation(dim, dtype, device)
    with torch.inference_mode(False), torch.no_grad():
        sums = matrix.unflatten(-1, (len(factors), -1)).sum(-1)
        return torch.cat((matrix, -sums * _middles(factors, middle, dtype, device)), dim=-1)


@functools.lru_cache(maxsize=64)
def _middles(factors: tuple[int, ...], middle: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _constant([x * middle for x in factors], dtype, device)


@functools.lru_cache(maxsize=64)
def _exponents_of_one(factors: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the logarithm of the factor of each group, beside the offset of exponents, [num_groups, 1]."""
    return _constant([_OFFSET / _STEPS + math.log2(x) for x in factors], torch.float32, device)[:, None]


@functools.lru_cache(maxsize=64)
def _field_masks(bits: int, device: torch.device) -> Tensor:
    """Return the bits of each field, uint8 [fields, 1, 1]."""
    return _constant(field_masks(bits), torch.uint8, device)[:, None, None]


def _constant(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor that can be used in any mode: one that is made in inference mode could not be used outside."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _scales(exponents: Tensor) -> Tensor:
    return (exponents * (1 / _STEPS)).sub_(_OFFSET / _STEPS).exp2_()
