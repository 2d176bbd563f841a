"""MinHash and HyperLogLog sketches of k-hop neighborhoods (Chamberlain et al. 2023, section 4.1).

The k-hop neighborhood B_k of a node holds every node at a distance of at most k, itself included.

* MinHash estimates the Jaccard index of two sets by the share of permutations for which their minima are equal.
* HyperLogLog estimates the cardinality of a set, here with the improved estimator of Ertl (2017, arXiv 1702.01284,
  section 4), which needs no table of biases. A register r is stored as 2^-r, an empty register as 1024. The union of
  two sets is then the minimum of their registers, as for MinHash, and the sum of the registers gives both the number
  of empty registers and the sum of the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_int
from suffice.gpu import can_use_kernels
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.neighbors import sum_segments

_EMPTY_REGISTER = 1024.0  # larger than any possible sum of the other registers
_CHUNK_SIZE = 2**16
_CACHED_ROWS = 2**9  # number of rows of a table that fit into a processor's cache
_CACHED_ENTRIES = 2**12  # number of neighbors whose rows fit into a processor's cache


@dataclass(frozen=True)
class Sketches:
    """Sketches of the neighborhoods B_0 to B_k of every node.

    Args:
        minhash: minima by hop, integers of 24 bits stored as float32 [nodes, permutations].
        registers: registers 2^-r by hop, bfloat16 [nodes, 2^p].
        sizes: estimated cardinality by hop, float32 [nodes].
        increases: for hops 1 and 2, a tensor of MinHash [nodes, permutations] and one of HyperLogLog [nodes, 2^p]: the
            increase of each minimum, read as an integer, when the neighbor that attains it is removed; 0 if several
            neighbors attain it.

    """

    minhash: tuple[Tensor, ...]
    registers: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    increases: tuple[tuple[Tensor, Tensor], ...]

    @property
    def hops(self) -> int:
        """Largest k."""
        return len(self.minhash) - 1


def sketch(graph: Adjacency, hops: int = 2, *, permutations: int = 128, p: int = 8, seed: int = 0) -> Sketches:
    """Sketch the neighborhoods of every node.

    Args:
        graph: graph whose `hash_keys` are hashed.
        hops: radius k of the largest neighborhood, from 1 to 3.
        permutations: number of permutations of MinHash; the error of a Jaccard index J is √(J(1 − J) / permutations).
        p: HyperLogLog has 2^p registers; the relative error of a cardinality is 1.04 / √2^p.
        seed: seed of the hash functions.

    Raises:
        ValueError: a number is out of range.

    """
    for name, value, maximum in (("hops", hops, 3), ("permutations", permutations, 4096), ("p", p, 16)):
        check_int(name, value, 1, maximum)
    minhash = [_hash_keys(graph.hash_keys, permutations, seed)]
    registers = [_registers_of_keys(graph.hash_keys, p, seed)]
    increases: list[tuple[Tensor, Tensor]] = []
    for hop in range(hops):
        both = (minhash, registers)
        minima = [segment_min(graph.csr.col, graph.csr.rowptr, tables[-1]) for tables in both]
        if hop < 2:
            first, second = (
                _increases(graph, minimum, tables[-1], tables[0]) for minimum, tables in zip(minima, both, strict=True)
            )
            increases.append((first, second))
        for minimum, tables in zip(minima, both, strict=True):
            tables.append(torch.minimum(tables[-1], minimum))
    sizes = tuple(estimate_cardinality(register_sums(table), table.size(1)) for table in registers)
    return Sketches(tuple(minhash), tuple(registers), sizes, tuple(increases))


def as_integers(table: Tensor) -> Tensor:
    """Return the bits of non-negative floats as integers, which have the same order.

    A processor compares integers several times as fast as bfloat16.
    """
    return table.view(torch.int32 if table.dtype == torch.float32 else torch.int16)


def register_sums(registers: Tensor) -> Tensor:
    """Return the sum of the registers [sets, 2^p] of each set, float32 [sets]."""
    sums = [part.float().sum(dim=1) for part in registers.split(_CACHED_ROWS)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def estimate_cardinality(register_sum: Tensor, num_registers: int) -> Tensor:
    """Estimate the number of distinct elements of sets from the sums of their registers.

    Args:
        register_sum: sum of the registers of each set, of any shape.
        num_registers: 2^p.

    Returns:
        In the shape of `register_sum`.

    """
    num_empty = torch.floor(register_sum / _EMPTY_REGISTER)
    sum_of_others = register_sum - _EMPTY_REGISTER * num_empty
    sigma = _sigma(torch.arange(num_registers + 1, device=register_sum.device) / num_registers)
    scale = num_registers * num_registers / (2 * math.log(2))
    return scale / (num_registers * sigma[num_empty.long()] + sum_of_others)


def _sigma(x: Tensor) -> Tensor:
    # Ertl (2017): σ(x) = x + Σ_k x^(2^k) 2^(k-1), which is infinite at x = 1, when all registers are empty.
    total, power, weight = x.clone(), x.clone(), 1.0
    for _ in range(20):
        power = power * power
        total += power * weight
        weight *= 2
    return torch.where(x == 1, torch.inf, total)


def _increases(graph: Adjacency, minimum: Tensor, table: Tensor, own: Tensor) -> Tensor:
    """Return the increase of min(own, minimum), read as an integer, when the neighbor that attains it is removed.

    Args:
        graph: the neighbors of each node.
        minimum: minimum of each column over the neighbors, [nodes, columns].
        table: values of the neighbors, [nodes, columns].
        own: value of the node itself, which does not depend on its neighbors, [nodes, columns].

    Returns:
        int32 or int16 [nodes, columns]; 0 where several neighbors attain the minimum.

    """
    csr = graph.csr
    result = torch.empty_like(as_integers(minimum))
    infinity = int(as_integers(torch.tensor(torch.inf, dtype=table.dtype)))
    rowptr = csr.rowptr.tolist()
    start = 0
    while start < graph.num_nodes:
        # The next nodes, with at most `_CACHED_ENTRIES` neighbors in total, but at least one node.
        end = min(max(bisect_right(rowptr, rowptr[start] + _CACHED_ENTRIES) - 1, start + 1), graph.num_nodes)
        first, last = rowptr[start], rowptr[end]
        values = table.index_select(0, csr.col[first:last])
        minimum_of_row = as_integers(minimum.index_select(0, csr.row[first:last]))
        # 1 where a neighbor attains the minimum: in the integers' own dtype, which is much faster than booleans.
        attains = torch.eq(as_integers(values), minimum_of_row, out=torch.empty_like(minimum_of_row))
        offsets = csr.rowptr[start : end + 1] - first
        index = torch.arange(last - first, device=graph.device)
        several = sum_segments(attains.to(torch.float32), index, offsets) > 1
        torch.maximum(as_integers(values), attains.mul_(infinity), out=as_integers(values))
        second_minimum = torch.where(several, minimum[start:end], segment_min(index, offsets, values))
        before, after = (
            torch.minimum(as_integers(part), as_integers(own[start:end]))
            for part in (minimum[start:end], second_minimum)
        )
        torch.sub(after, before, out=result[start:end])
        start = end
    return result


def segment_min(index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Return the minimum of each column over each segment of rows, infinite for an empty segment.

    Args:
        index: rows of the table, segment after segment, long [total].
        offsets: where each segment starts, followed by the total, long [segments + 1].
        table: [rows, columns].

    Returns:
        [segments, columns].

    """
    if can_use_kernels(table):
        from suffice.link.sparse.kernels import segment_min as kernel

        return kernel.segment_min(index, offsets, table)
    segments = offsets.numel() - 1
    is_empty = (offsets[1:] == offsets[:-1]).unsqueeze(-1)
    if table.is_cpu:
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta state.*")
            ones = torch.ones(index.numel(), dtype=table.dtype)
            matrix = torch.sparse_csr_tensor(offsets, index, ones, (segments, table.size(0)), check_invariants=False)
        # About twenty times as fast as a scatter, but available on the CPU only.
        result = torch.sparse.mm(matrix, table, "amin")
        return result.masked_fill_(is_empty, torch.inf)
    owner = torch.repeat_interleave(offsets.diff())
    result = torch.full((segments, table.size(1)), torch.inf, dtype=table.dtype, device=table.device)
    for owners, part in zip(owner.split(_CHUNK_SIZE), index.split(_CHUNK_SIZE), strict=True):
        result.index_reduce_(0, owners, table[part], "amin")
    return result


def _hash_keys(keys: Tensor, permutations: int, seed: int) -> Tensor:
    """Return one hash of 24 bits for each key and permutation, float32 [keys, permutations]."""
    salts = _mix_bits(torch.arange(permutations, device=keys.device) + seed * 1_000_003)
    parts = [(_mix_bits(part.unsqueeze(-1) ^ salts) >> 40 & 0xFFFFFF).float() for part in keys.split(_CHUNK_SIZE)]
    return torch.cat(parts) if parts else keys.new_zeros(0, permutations, dtype=torch.float32)


def _registers_of_keys(keys: Tensor, p: int, seed: int) -> Tensor:
    """Return the registers of the sets of one key each, bfloat16 [keys, 2^p]."""
    hashes = _mix_bits(keys ^ _mix_bits(torch.full_like(keys, -1 - seed)))
    register = hashes & (2**p - 1)
    # The rank is the position of the first 1 among the next 48 bits, which float64 holds exactly.
    next_bits = (hashes >> p & (2**48 - 1)).double()
    rank = 49 - torch.frexp(next_bits).exponent
    result = torch.full((keys.numel(), 2**p), _EMPTY_REGISTER, dtype=torch.bfloat16, device=keys.device)
    result.scatter_(1, register.unsqueeze(-1), torch.exp2(-rank.float()).to(result.dtype).unsqueeze(-1))
    return result


def _mix_bits(x: Tensor) -> Tensor:
    """Scramble integers of 64 bits (the finalizer of SplitMix64)."""
    x = x + -7046029254386353131
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (2 ** (64 - bits) - 1)  # the sign bit is not repeated
