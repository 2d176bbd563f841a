"""Integers of 2, 3, 4, 5 or 8 bits, packed into bytes without unused bits."""

from __future__ import annotations

import torch
from torch import Tensor


def num_bytes(dim: int, bits: int) -> int:
    """Return the number of bytes of `dim` packed integers; `dim` is a multiple of 8."""
    return dim * bits // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integers of `bits` bits into bytes.

    A vector is divided into equal sections, whose integers share bytes: with 4 bits, byte i holds the integers i (low
    bits) and dim/2 + i (high bits); with 2 bits, it holds i, dim/4 + i, dim/2 + i and 3 dim/4 + i. With 3 bits, there
    are eight sections. The first six share bytes in pairs, as bits 0 to 2 and 3 to 5 of three blocks of dim/8 bytes.
    The two highest bits of these blocks hold the other two sections: their six bits, in order of the blocks. With 5
    bits, the four low bits of all integers come first, packed like integers of 4 bits. The highest bits follow, in
    eight sections: bit i of a byte belongs to section i.

    Args:
        codes: uint8 [..., dim], each below 2^bits. dim is a multiple of 8.
        bits: 2, 3, 4, 5 or 8.

    Returns:
        uint8 [..., dim * bits / 8].

    """
    if bits == 8:
        return codes
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        return torch.add(low, high, alpha=16)  # several times faster than shifts on the CPU
    if bits == 5:
        sections = (codes >> 4).unflatten(-1, (8, -1))
        highest = (sections << _section_index(codes.device)).sum(-2, dtype=torch.uint8)
        return torch.cat((pack_bits(codes & 15, 4), highest), dim=-1)
    if bits == 2:
        first, second, third, fourth = codes.chunk(4, dim=-1)
        return first | (second << 2) | (third << 4) | (fourth << 6)
    *pairs, seventh, eighth = codes.chunk(8, dim=-1)
    top = (seventh & 3, (seventh >> 2) | ((eighth & 1) << 1), eighth >> 1)
    low, middle = torch.cat(pairs[:3], dim=-1), torch.cat(pairs[3:], dim=-1)
    return low | (middle << 3) | (torch.cat(top, dim=-1) << 6)


def unpack_bits(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """Write the integers of `pack_bits` to a tensor of any dtype, [..., dim], and return it."""
    parts = unpack_parts(packed, bits)
    for part, integers in zip(out.split([x.shape[-1] for x in parts], dim=-1), parts, strict=True):
        part.copy_(integers)
    return out


def unpack_parts(packed: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Return the integers of `pack_bits` in parts that follow each other in the last dimension, uint8 [..., any]."""
    if bits == 8:
        return (packed,)
    if bits == 4:
        return packed & 15, packed >> 4
    if bits == 5:
        low, highest = packed.tensor_split((packed.shape[-1] * 4 // 5,), dim=-1)
        highest_bits = (highest[..., None, :] >> _section_index(packed.device)) & 1
        return (torch.cat((low & 15, low >> 4), dim=-1) | (highest_bits << 4).flatten(-2),)
    if bits == 2:
        return packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6
    first, second, third = (packed >> 6).chunk(3, dim=-1)
    seventh, eighth = first | ((second & 1) << 2), (second >> 1) | (third << 1)
    return packed & 7, (packed >> 3) & 7, seventh, eighth


def field_masks(bits: int) -> tuple[int, ...]:
    """Return the bits of a byte that hold each section of `pack_bits`; () if sections are not ranges of bits."""
    if 8 % bits:
        return ()
    return tuple((2**bits - 1) << shift for shift in range(0, 8, bits))


def _section_index(device: torch.device) -> Tensor:
    """Return the indices of eight sections, uint8 [8, 1]."""
    return torch.arange(8, dtype=torch.uint8, device=device)[:, None]
