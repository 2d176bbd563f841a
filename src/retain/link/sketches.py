"""MinHash and HyperLogLog sketches of k-hop neighbourhoods, and what they say of pairs (Chamberlain et al. 2023).

The k-hop neighbourhood of a node, B_k, holds every node at a distance of up to k, itself too. MinHash estimates the
Jaccard index of two sets by the share of equal minima; HyperLogLog estimates a cardinality (the improved estimator of
Ertl 2017, arXiv 1702.01284, sec. 4, needs no table of biases). A register r is kept as 2^-r, so that unions are minima
for both and a harmonic mean is a plain sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retain.link.messages import MessageGraph, pointers

_CHUNK = 2**16


@dataclass(frozen=True)
class Sketches:
    """Sketches of B_0 to B_k of every node.

    Args:
        minhash: by hop, whole numbers of 24 bits, float32 [nodes, permutations].
        registers: by hop, 2^-r, bfloat16 [nodes, 2^p].

    """

    minhash: tuple[Tensor, ...]
    registers: tuple[Tensor, ...]

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
    for _ in range(hops):
        for tables in (minhash, registers):
            tables.append(torch.minimum(tables[-1], _least(graph.rows.col, graph.rows.pointers, tables[-1])))
    return Sketches(tuple(minhash), tuple(registers))


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
    hops = sketches.hops
    known = (graph.rows.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0).nonzero().flatten()
    ends = [_rows(graph, sketches, pairs, known, side) for side in (0, 1)]
    size = [torch.stack([cardinality(registers) for _, registers in end]) for end in ends]  # [2][k, pairs]
    both = pairs.new_zeros(hops + 1, hops + 1, pairs.size(1), dtype=torch.float32)
    for a in range(1, hops + 1):
        for b in range(1, hops + 1):
            (hash_a, registers_a), (hash_b, registers_b) = ends[0][a - 1], ends[1][b - 1]
            jaccard = (hash_a == hash_b).sum(dim=1) / hash_a.size(1)
            both[a, b] = jaccard * cardinality(torch.minimum(registers_a, registers_b))
    exact = both[1:, 1:] - both[:-1, 1:] - both[1:, :-1] + both[:-1, :-1]
    zero = torch.zeros_like(size[0][:1])
    rest = [
        torch.diff(torch.cat([zero, counted]), dim=0) - torch.diff(within, dim=0)
        for counted, within in ((size[0], both[:, hops]), (size[1], both[hops, :]))
    ]
    return torch.cat([exact.reshape(hops * hops, -1), *rest]).T


def cardinality(registers: Tensor) -> Tensor:
    """Estimate the number of distinct elements from registers 2^-r: [sets].

    Args:
        registers: [sets, m].

    """
    m = registers.size(1)
    empty = (registers == 1).sum(dim=1)
    filled = registers.sum(dim=1, dtype=torch.float32) - empty
    return m * m / (2 * math.log(2)) / (m * _sigma(empty / m) + filled)


def _sigma(x: Tensor) -> Tensor:
    # σ(x) = x + Σ_k x^(2^k) 2^(k-1), infinite at 1: nothing was counted.
    total, power, weight = x.clone(), x.clone(), 1.0
    for _ in range(20):
        power = power * power
        total += power * weight
        weight *= 2
    return torch.where(x == 1, torch.inf, total)


def _rows(
    graph: MessageGraph, sketches: Sketches, pairs: Tensor, known: Tensor, side: int
) -> list[tuple[Tensor, Tensor]]:
    """Sketches of one end of each pair for hops 1 to k; where the pair is an edge, of the graph without it."""
    these, those = pairs[side], pairs[1 - side]
    rows = [(sketches.minhash[k][these], sketches.registers[k][these]) for k in range(1, sketches.hops + 1)]
    if known.numel():
        for chunk in known.split(1024):
            found = _without_edge(graph, sketches, these[chunk], those[chunk])
            for (hashes, registers), (new_hashes, new_registers) in zip(rows, found, strict=True):
                hashes[chunk], registers[chunk] = new_hashes, new_registers
    return rows


def _without_edge(graph: MessageGraph, sketches: Sketches, ends: Tensor, others: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sketches of `ends` for hops 1 to k in the graph without the edges (ends, others), each without its own.

    Up to two hops a neighbour's own sketch serves: its shortest ways through the missing edge lead back to the end.
    At three hops ways that turn back at once are left out, which are all that could take the missing edge.
    """
    node, owner = graph.rows.expand(ends)
    keep = (node != others[owner]).nonzero().flatten()
    node, owner = node[keep], owner[keep]
    starts = pointers(torch.bincount(owner, minlength=ends.numel()))
    tables = (sketches.minhash, sketches.registers)
    own = [table[0][ends] for table in tables]
    found = [
        [torch.minimum(mine, _least(node, starts, table[k])) for mine, table in zip(own, tables, strict=True)]
        for k in range(min(sketches.hops, 2))
    ]
    if sketches.hops == 3:
        second, place = graph.rows.expand(node)
        keep = (second != ends[owner[place]]).nonzero().flatten()
        starts = pointers(torch.bincount(owner[place[keep]], minlength=ends.numel()))
        last = zip(found[1], tables, strict=True)
        found.append([torch.minimum(near, _least(second[keep], starts, table[1])) for near, table in last])
    return [(hashes, registers) for hashes, registers in found]


def _least(index: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Least of each column over lists of rows, infinite where a list is empty, [lists, columns]."""
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
    registers = torch.ones(keys.numel(), 2**p, dtype=torch.bfloat16, device=keys.device)
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
