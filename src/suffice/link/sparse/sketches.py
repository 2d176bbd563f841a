"""MinHash and HyperLogLog sketches of k-hop neighbourhoods, and what they say of pairs (Chamberlain et al. 2023).

The k-hop neighbourhood of a node, B_k, holds every node at a distance of up to k, itself too. MinHash estimates the
Jaccard index of two sets by the share of equal minima; HyperLogLog estimates a cardinality (the improved estimator of
Ertl 2017, arXiv 1702.01284, sec. 4, needs no table of biases). A register r is kept as 2^-r, an empty one as 1024, so
that unions are minima for both kinds, and one sum tells how many registers are empty and what the others add up to.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.gpu import can_use_kernels
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.neighbors import bags

_CHUNK = 2**16
_ROWS = 2**9  # of a table that stay in a processor's cache
_EMPTY = 1024.0  # above what all other registers can add up to
_ENTRIES = 2**12


@dataclass(frozen=True)
class Sketches:
    """Sketches of B_0 to B_k of every node.

    Args:
        minhash: by hop, whole numbers of 24 bits, float32 [nodes, permutations].
        registers: by hop, 2^-r, bfloat16 [nodes, 2^p].
        sizes: by hop, estimated cardinality, float32 [nodes].
        growth: by how much the bits of each number of hops 1 and 2, of both kinds, grow when the neighbour that gave it
            goes: 0 where another gives the same.

    """

    minhash: tuple[Tensor, ...]
    registers: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    growth: tuple[tuple[Tensor, Tensor], ...]

    @property
    def hops(self) -> int:
        """Largest k."""
        return len(self.minhash) - 1


def sketch(graph: Adjacency, hops: int = 2, *, permutations: int = 128, p: int = 8, seed: int = 0) -> Sketches:
    """Sketch the neighbourhoods of every node.

    Args:
        graph: with `keys` to hash.
        hops: k, at least 1.
        permutations: of MinHash; the error of a Jaccard index is √(J(1 - J) / permutations).
        p: 2^p registers of HyperLogLog; the relative error of a cardinality is 1.04 / √2^p.
        seed: of the hash functions.

    Raises:
        ValueError: a number is out of range.

    """
    for name, value, most in (("hops", hops, 3), ("permutations", permutations, 4096), ("p", p, 16)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; accepted: 1 to {most}")
    minhash = [_hashes(graph.keys, permutations, seed)]
    registers = [_registers(graph.keys, p, seed)]
    growth: list[tuple[Tensor, Tensor]] = []
    for hop in range(hops):
        both = (minhash, registers)
        found = [least(graph.csr.col, graph.csr.rowptr, tables[-1]) for tables in both]
        if hop < 2:
            grown = [_growth(graph, low, tables[-1], tables[0]) for low, tables in zip(found, both, strict=True)]
            growth.append((grown[0], grown[1]))
        for low, tables in zip(found, both, strict=True):
            tables.append(torch.minimum(tables[-1], low))
    sizes = tuple(estimate(totals(table), table.size(1)) for table in registers)
    return Sketches(tuple(minhash), tuple(registers), sizes, tuple(growth))


def bits(table: Tensor) -> Tensor:
    """Return numbers that are not negative as whole numbers of as many bits, which have the same order.

    A processor compares these several times as fast as halves of floats.
    """
    return table.view(torch.int32 if table.dtype == torch.float32 else torch.int16)


def same(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 where two tensors are equal and 0 elsewhere, in their own dtype: much faster than booleans."""
    return torch.eq(one, other, out=torch.empty_like(one))


def cardinality(registers: Tensor) -> Tensor:
    """Estimate the number of distinct elements: [sets].

    Args:
        registers: as `Sketches` holds them, [sets, m].

    """
    return estimate(totals(registers), registers.size(1))


def totals(registers: Tensor) -> Tensor:
    """Return what the registers of each set add up to, float32 [sets]."""
    parts = [part.float().sum(dim=1) for part in registers.split(_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def estimate(total: Tensor, m: int) -> Tensor:
    """Estimate the number of distinct elements from the sum of m registers, for sums of any shape."""
    empty = torch.floor(total / _EMPTY)
    filled = total - _EMPTY * empty
    table = _sigma(torch.arange(m + 1, device=total.device) / m)
    return m * m / (2 * math.log(2)) / (m * table[empty.long()] + filled)


def _sigma(x: Tensor) -> Tensor:
    # σ(x) = x + Σ_k x^(2^k) 2^(k-1), infinite at 1: nothing was counted.
    total, power, weight = x.clone(), x.clone(), 1.0
    for _ in range(20):
        power = power * power
        total += power * weight
        weight *= 2
    return torch.where(x == 1, torch.inf, total)


def _growth(graph: Adjacency, low: Tensor, table: Tensor, own: Tensor) -> Tensor:
    """By how much the bits of min(own, least of neighbours) grow without the one neighbour that gives it.

    Args:
        graph: whose neighbours.
        low: least of each column over neighbours, [nodes, columns].
        table: of the neighbours, [nodes, columns].
        own: what stays whoever goes, [nodes, columns].

    """
    rows = graph.csr
    found = torch.empty_like(bits(low))
    infinite = int(bits(torch.tensor(torch.inf, dtype=table.dtype)))
    bounds = rows.rowptr.tolist()
    start = 0
    while start < graph.num_nodes:
        # As many nodes as have some thousand neighbours together, at least one.
        end = min(max(bisect_right(bounds, bounds[start] + _ENTRIES) - 1, start + 1), graph.num_nodes)
        first, after = bounds[start], bounds[end]
        values = table.index_select(0, rows.col[first:after])
        equal = same(bits(values), bits(low.index_select(0, rows.row[first:after])))
        starts = rows.rowptr[start : end + 1] - first
        order = torch.arange(after - first, device=graph.device)
        shared = bags(equal.to(torch.float32), order, starts) > 1
        torch.maximum(bits(values), equal.mul_(infinite), out=bits(values))
        second = torch.where(shared, low[start:end], least(order, starts, values))
        one, other = (torch.minimum(bits(part), bits(own[start:end])) for part in (low[start:end], second))
        torch.sub(other, one, out=found[start:end])
        start = end
    return found


def least(index: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Least of each column over lists of rows, infinite where a list is empty, [lists, columns]."""
    if can_use_kernels(table):
        from suffice.link.sparse.kernels.segment_min import segment_min

        return segment_min(index, starts, table)
    lists = starts.numel() - 1
    empty = (starts[1:] == starts[:-1]).unsqueeze(-1)
    if table.is_cpu:
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta state.*")
            ones = torch.ones(index.numel(), dtype=table.dtype)
            matrix = torch.sparse_csr_tensor(starts, index, ones, (lists, table.size(0)), check_invariants=False)
        # Twenty times as fast as a scatter; on the CPU only.
        found = torch.sparse.mm(matrix, table, "amin")
        return found.masked_fill_(empty, torch.inf)
    owner = torch.repeat_interleave(starts.diff())
    found = torch.full((lists, table.size(1)), torch.inf, dtype=table.dtype, device=table.device)
    for rows, part in zip(owner.split(_CHUNK), index.split(_CHUNK), strict=True):
        found.index_reduce_(0, rows, table[part], "amin")
    return found


def _hashes(keys: Tensor, permutations: int, seed: int) -> Tensor:
    salts = _mix(torch.arange(permutations, device=keys.device) + seed * 1_000_003)
    parts = [(_mix(part.unsqueeze(-1) ^ salts) >> 40 & 0xFFFFFF).float() for part in keys.split(_CHUNK)]
    return torch.cat(parts) if parts else keys.new_zeros(0, permutations, dtype=torch.float32)


def _registers(keys: Tensor, p: int, seed: int) -> Tensor:
    mixed = _mix(keys ^ _mix(torch.full_like(keys, -1 - seed)))
    place = mixed & (2**p - 1)
    # The next 48 bits: rank r is the place of the first one among them, exact in float64.
    bits = (mixed >> p & (2**48 - 1)).double()
    rank = 49 - torch.frexp(bits).exponent
    registers = torch.full((keys.numel(), 2**p), _EMPTY, dtype=torch.bfloat16, device=keys.device)
    registers.scatter_(1, place.unsqueeze(-1), torch.exp2(-rank.float()).to(registers.dtype).unsqueeze(-1))
    return registers


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit numbers (the finaliser of SplitMix64)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (2 ** (64 - bits) - 1)  # without the sign
