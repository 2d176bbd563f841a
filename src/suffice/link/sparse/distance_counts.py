"""How many nodes lie at which distances from both ends of a pair, from sketches (Chamberlain et al. 2023, sec. 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.sparse.adjacency import Adjacency, offsets_from_counts
from suffice.link.sparse.sketches import Sketches, bits, estimate, least

_PAIRS = 2**9  # whose sketches stay in a processor's cache


def pair_counts(graph: Adjacency, sketches: Sketches, pairs: Tensor) -> Tensor:
    """Return how many nodes are at which distances from both ends of each pair, [pairs, k(k + 2)].

    First A[a, b], nodes at distance a of one end and b of the other, for 1 ≤ a, b ≤ k, row after row; then for each
    a the nodes at distance a of the first end and more than k from the second, and the same for the second end.
    Distance 1 includes the end itself. A pair that is an edge of the graph is counted without this edge, exactly.

    Args:
        graph: that the sketches are of.
        sketches: `sketch(graph, k)`.
        pairs: long [2, pairs].

    """
    edge = graph.csr.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0
    counts = torch.empty(pairs.size(1), sketches.hops * (sketches.hops + 2), device=graph.device)
    for own, which in ((False, ~edge), (True, edge)):
        places = which.nonzero().flatten()
        # One end after another, whose sketches then stay in the cache.
        for part in places[pairs[0, places].argsort()].split(2**16):
            counts[part] = _counts(graph, sketches, pairs[:, part], own=own)
    return counts


def _counts(graph: Adjacency, sketches: Sketches, pairs: Tensor, *, own: bool) -> Tensor:
    """Count for pairs that all are edges (`own`), or none."""
    hops, n = sketches.hops, pairs.size(1)
    minhash, registers = (_Ends(graph, sketches, kind, own=own) for kind in (0, 1))
    equal, union = torch.zeros(hops, hops, n, device=graph.device), torch.ones(hops, hops, n, device=graph.device)
    for places in torch.arange(n, device=graph.device).split(_PAIRS):
        minhash.read(pairs[:, places])
        for a in range(hops):
            for b in range(hops):
                equal[a, b, places] = minhash.equal(a, b)
    # Without a shared minimum the union's size doesn't matter.
    asked = torch.arange(n, device=graph.device) if own else equal.sum(dim=(0, 1)).nonzero().flatten()
    size = torch.stack([torch.stack(sketches.sizes[1:])[:, end] for end in pairs])
    for places in asked.split(_PAIRS):
        registers.read(pairs[:, places])
        for a in range(hops):
            for b in range(hops):
                union[a, b, places] = registers.union(a, b)
            if own:
                size[0, a, places], size[1, a, places] = registers.total(0, a), registers.total(1, a)
    m = sketches.registers[0].size(1)
    if own:
        size = estimate(size, m)
    both = torch.zeros(hops + 1, hops + 1, n, device=graph.device)
    both[1:, 1:] = equal / sketches.minhash[0].size(1) * estimate(union, m)
    exact = both[1:, 1:] - both[:-1, 1:] - both[1:, :-1] + both[:-1, :-1]
    rest: list[Tensor] = []
    for one, within in zip(size, (both[:, hops], both[hops, :]), strict=True):
        rest.append(torch.diff(torch.cat([torch.zeros_like(one[:1]), one]) - within, dim=0))
    return torch.cat([exact.reshape(hops * hops, -1), *rest]).T


class _Ends:
    """Sketches of one kind of both ends of pairs, as bits, in memory that is used again and so stays in the cache.

    Args:
        graph: that the sketches are of.
        sketches: of it.
        kind: 0 for MinHash, 1 for HyperLogLog.
        own: the pairs are edges; each is seen in the graph without itself.

    """

    def __init__(self, graph: Adjacency, sketches: Sketches, kind: int, *, own: bool) -> None:
        self.graph, self.own, self.hops = graph, own, sketches.hops
        self.tables = sketches.minhash if kind == 0 else sketches.registers
        self.growth = [kinds[kind] for kinds in sketches.growth]
        self.whole = [bits(table) for table in self.tables]
        sides = 2 * self.hops + 4
        self.memory = self.whole[0].new_empty(sides, _PAIRS, self.whole[0].size(1))
        self.sums = torch.empty(_PAIRS, self.whole[0].size(1), device=graph.device)

    def read(self, pairs: Tensor) -> None:
        """Take the sketches of both ends of pairs.

        Up to two hops the neighbours' own sketches serve, without that of the other end: their shortest ways through
        the missing edge lead back to the end. At three hops ways that turn back at once are left out, which are all
        that could take the missing edge.
        """
        self.size = pairs.size(1)
        gone, more, *rows = self.memory[:, : self.size]
        self.room = gone
        self.rows = [rows[: self.hops + 1], rows[self.hops + 1 :]]
        for side, end in enumerate(pairs):
            for hop in range(0 if self.own else 1, self.hops + 1):
                torch.index_select(self.whole[hop], 0, end, out=self.rows[side][hop])
        if not self.own:
            return
        # From far to near: what goes from a hop is known by the other end's hop before.
        for hop in range(min(self.hops, 2), 0, -1):
            for side, end in enumerate(pairs):
                torch.eq(self.rows[side][hop], self.rows[1 - side][hop - 1], out=gone)
                self.rows[side][hop].addcmul_(gone, torch.index_select(self.growth[hop - 1], 0, end, out=more))
        if self.hops == 3:
            for side in (0, 1):
                self._third(pairs[side], pairs[1 - side], self.rows[side])

    def _third(self, ends: Tensor, others: Tensor, rows: list[Tensor]) -> None:
        node, owner = self.graph.csr.expand(ends)
        keep = (node != others[owner]).nonzero().flatten()
        node, owner = node[keep], owner[keep]
        second, place = self.graph.csr.expand(node)
        keep = (second != ends[owner[place]]).nonzero().flatten()
        starts = offsets_from_counts(torch.bincount(owner[place[keep]], minlength=ends.numel()))
        torch.minimum(rows[2], bits(least(second[keep], starts, self.tables[1])), out=rows[3])

    def equal(self, a: int, b: int) -> Tensor:
        """Return how many numbers the first ends' hop a + 1 shares with the second ends' hop b + 1."""
        one, other = (part.view(torch.float32) for part in (self.rows[0][a + 1], self.rows[1][b + 1]))
        return torch.eq(one, other, out=self.sums[: self.size]).sum(dim=1)

    def union(self, a: int, b: int) -> Tensor:
        """Return what the registers of both ends' neighbourhoods together add up to."""
        return self._sum(torch.minimum(self.rows[0][a + 1], self.rows[1][b + 1], out=self.room))

    def total(self, side: int, a: int) -> Tensor:
        """Return what the registers of one end's neighbourhood add up to."""
        return self._sum(self.rows[side][a + 1])

    def _sum(self, registers: Tensor) -> Tensor:
        return self.sums[: self.size].copy_(registers.view(torch.bfloat16)).sum(dim=1)
