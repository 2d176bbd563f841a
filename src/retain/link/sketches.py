"""MinHash and HyperLogLog sketches of k-hop neighbourhoods, and what they say of pairs (Chamberlain et al. 2023).

The k-hop neighbourhood of a node, B_k, holds every node at a distance of up to k, itself too. MinHash estimates the
Jaccard index of two sets by the share of equal minima; HyperLogLog estimates a cardinality (the improved estimator of
Ertl 2017, arXiv 1702.01284, sec. 4, needs no table of biases). A register r is kept as 2^-r, an empty one as 1024, so
that unions are minima for both kinds, and one sum tells how many registers are empty and what the others add up to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retain.gpu import on_gpu
from retain.link.messages import MessageGraph, pointers
from retain.link.neighbors import bags

_CHUNK = 2**16
_PAIRS = 2**10  # whose sketches stay in a processor's cache
_EMPTY = 1024.0  # above what all other registers can add up to
_ENTRIES = 2**13


@dataclass(frozen=True)
class Sketches:
    """Sketches of B_0 to B_k of every node.

    Args:
        minhash: by hop, whole numbers of 24 bits, float32 [nodes, permutations].
        registers: by hop, 2^-r, bfloat16 [nodes, 2^p].
        sizes: by hop, estimated cardinality, float32 [nodes].
        least: least and second least of the neighbours' sketches of hops 0 and 1, of both kinds: what a neighbour
            leaves when it goes.

    """

    minhash: tuple[Tensor, ...]
    registers: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    least: tuple[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], ...]

    @property
    def hops(self) -> int:
        """Largest k."""
        return len(self.minhash) - 1


def sketch(graph: MessageGraph, hops: int = 2, *, permutations: int = 128, p: int = 8, seed: int = 0) -> Sketches:
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
    least: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    for hop in range(hops):
        found = [_least(graph.rows.col, graph.rows.pointers, tables[-1]) for tables in (minhash, registers)]
        if hop < 2:
            one, other = (
                (low, _second(graph, low, tables[-1])) for low, tables in zip(found, (minhash, registers), strict=True)
            )
            least.append((one, other))
        for low, tables in zip(found, (minhash, registers), strict=True):
            tables.append(torch.minimum(tables[-1], low))
    sizes = tuple(torch.cat([cardinality(part) for part in table.split(_PAIRS)]) for table in registers)
    return Sketches(tuple(minhash), tuple(registers), sizes, tuple(least))


def pair_counts(graph: MessageGraph, sketches: Sketches, pairs: Tensor) -> Tensor:
    """Return how many nodes are at which distances from both ends of each pair, [pairs, k(k + 2)].

    First A[a, b], nodes at distance a of one end and b of the other, for 1 ≤ a, b ≤ k, row after row; then for each
    a the nodes at distance a of the first end and more than k from the second, and the same for the second end.
    Distance 1 includes the end itself. A pair that is an edge of the graph is counted without this edge, exactly.

    Args:
        graph: that the sketches are of.
        sketches: `sketch(graph, k)`.
        pairs: long [2, pairs].

    """
    parts = [_pair_counts(graph, sketches, part) for part in pairs.split(_PAIRS, dim=1)]
    return torch.cat(parts)


def _pair_counts(graph: MessageGraph, sketches: Sketches, pairs: Tensor) -> Tensor:
    hops = sketches.hops
    known = (graph.rows.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0).nonzero().flatten()
    ends = [_rows(graph, sketches, pairs, known, side) for side in (0, 1)]
    both = torch.zeros(hops + 1, hops + 1, pairs.size(1), device=graph.device)
    for a in range(1, hops + 1):
        for b in range(1, hops + 1):
            one, other = ends[0][a - 1], ends[1][b - 1]
            same = torch.eq(one.hashes, other.hashes, out=torch.empty_like(one.hashes)).sum(dim=1)
            union = cardinality(torch.minimum(one.registers, other.registers))
            both[a, b] = same / one.hashes.size(1) * union
    exact = both[1:, 1:] - both[:-1, 1:] - both[1:, :-1] + both[:-1, :-1]
    rest: list[Tensor] = []
    for end, within in zip(ends, (both[:, hops], both[hops, :]), strict=True):
        size = torch.stack([torch.zeros_like(within[0]), *(row.size for row in end)])
        rest.append(torch.diff(size - within, dim=0))
    return torch.cat([exact.reshape(hops * hops, -1), *rest]).T


def cardinality(registers: Tensor) -> Tensor:
    """Estimate the number of distinct elements: [sets].

    Args:
        registers: as `Sketches` holds them, [sets, m].

    """
    m = registers.size(1)
    total = registers.sum(dim=1, dtype=torch.float32)
    empty = torch.floor(total / _EMPTY)
    filled = total - _EMPTY * empty
    return m * m / (2 * math.log(2)) / (m * _sigma(empty / m) + filled)


def _sigma(x: Tensor) -> Tensor:
    # σ(x) = x + Σ_k x^(2^k) 2^(k-1), infinite at 1: nothing was counted.
    total, power, weight = x.clone(), x.clone(), 1.0
    for _ in range(20):
        power = power * power
        total += power * weight
        weight *= 2
    return torch.where(x == 1, torch.inf, total)


class _Rows(NamedTuple):
    """Sketches of one end of each pair, of one hop."""

    hashes: Tensor
    registers: Tensor
    size: Tensor


def _rows(graph: MessageGraph, sketches: Sketches, pairs: Tensor, known: Tensor, side: int) -> list[_Rows]:
    """Sketches of one end for hops 1 to k; where the pair is an edge, of the graph without it."""
    these, those = pairs[side], pairs[1 - side]
    tables = zip(sketches.minhash[1:], sketches.registers[1:], sketches.sizes[1:], strict=True)
    rows = [_Rows(*(table.index_select(0, these) for table in kinds)) for kinds in tables]
    if known.numel():
        found = _without_edge(graph, sketches, these[known], those[known])
        for row, (hashes, registers) in zip(rows, found, strict=True):
            row.hashes[known], row.registers[known], row.size[known] = hashes, registers, cardinality(registers)
    return rows


def _without_edge(graph: MessageGraph, sketches: Sketches, ends: Tensor, others: Tensor) -> list[list[Tensor]]:
    """Sketches of `ends` for hops 1 to k in the graph without the edges (ends, others), each without its own.

    Up to two hops the neighbours' own sketches serve, without that of the other end: their shortest ways through the
    missing edge lead back to the end. At three hops ways that turn back at once are left out, which are all that
    could take the missing edge.
    """
    tables = (sketches.minhash, sketches.registers)
    found: list[list[Tensor]] = []
    for hop, kinds in enumerate(sketches.least):
        rows: list[Tensor] = []
        for (least, second), table in zip(kinds, tables, strict=True):
            low = least.index_select(0, ends)
            gone = table[hop].index_select(0, others) == low
            low = torch.where(gone, second.index_select(0, ends), low)
            rows.append(torch.minimum(low, table[0].index_select(0, ends)))
        found.append(rows)
    if sketches.hops == 3:
        node, owner = graph.rows.expand(ends)
        keep = (node != others[owner]).nonzero().flatten()
        node, owner = node[keep], owner[keep]
        second, place = graph.rows.expand(node)
        keep = (second != ends[owner[place]]).nonzero().flatten()
        starts = pointers(torch.bincount(owner[place[keep]], minlength=ends.numel()))
        last = zip(found[1], tables, strict=True)
        found.append([torch.minimum(near, _least(second[keep], starts, table[1])) for near, table in last])
    return found


def _second(graph: MessageGraph, least: Tensor, table: Tensor) -> Tensor:
    """Second least of each column over neighbours, equal to the least where two share it, [nodes, columns]."""
    rows = graph.rows
    found = torch.empty_like(least)
    start = 0
    while start < graph.num_nodes:
        # As many nodes as have some thousand neighbours together, at least one.
        last = int(torch.searchsorted(rows.pointers, rows.pointers[start] + _ENTRIES, right=True)) - 1
        end = min(max(last, start + 1), graph.num_nodes)
        first, after = int(rows.pointers[start]), int(rows.pointers[end])
        values = table.index_select(0, rows.col[first:after])
        equal = values == least.index_select(0, rows.row[first:after])
        starts = rows.pointers[start : end + 1] - first
        order = torch.arange(after - first, device=graph.device)
        second = _least(order, starts, values.masked_fill_(equal, torch.inf))
        shared = bags(equal.to(torch.float32), order, starts) > 1
        found[start:end] = torch.where(shared, least[start:end], second)
        start = end
    return found


def _least(index: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Least of each column over lists of rows, infinite where a list is empty, [lists, columns]."""
    if on_gpu(table):
        from retain.link.kernels.least import least

        return least(index, starts, table)
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
