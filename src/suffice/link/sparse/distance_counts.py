"""Counts of nodes by distance from both nodes of a pair, by sketches (Chamberlain et al. 2023, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.sparse.adjacency import Adjacency, offsets_from_counts
from suffice.link.sparse.sketches import Sketches, as_integers, estimate_cardinality, segment_min

_CACHED_PAIRS = 2**9  # number of pairs whose sketches fit into a processor's cache
_CHUNK_SIZE = 2**16


def count_by_distance(graph: Adjacency, sketches: Sketches, pairs: Tensor) -> Tensor:
    """Estimate the number of nodes by their distances from both nodes of each pair.

    A pair that is an edge of the graph is counted in the graph without this edge. This differs from `remove_edges`,
    which removes all pairs from one graph.

    Args:
        graph: the graph that was sketched.
        sketches: `sketch(graph, k)`.
        pairs: long [2, pairs].

    Returns:
        Float [pairs, k(k + 2)]. First the number of nodes at distance a of the first node and b of the second, for
        1 ≤ a, b ≤ k, row by row. Then, for each a, the number of nodes at distance a of the first node and more than k
        of the second; then the same for the second node. Distance 1 includes the node itself.

    """
    is_edge = graph.csr.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0
    counts = torch.empty(pairs.size(1), sketches.hops * (sketches.hops + 2), device=graph.device)
    for are_edges, selected in ((False, ~is_edge), (True, is_edge)):
        positions = selected.nonzero().flatten()
        # Pairs with the same first node follow each other, so that its sketches stay in the processor's cache.
        for part in positions[pairs[0, positions].argsort()].split(_CHUNK_SIZE):
            counts[part] = _count(graph, sketches, pairs[:, part], are_edges=are_edges)
    return counts


def _count(graph: Adjacency, sketches: Sketches, pairs: Tensor, *, are_edges: bool) -> Tensor:
    """Return the counts of pairs, which are either all edges or all not edges."""
    hops, n = sketches.hops, pairs.size(1)
    minhash, registers = (
        _PairSketches(graph, tables, [increases[kind] for increases in sketches.increases], are_edges=are_edges)
        for kind, tables in enumerate((sketches.minhash, sketches.registers))
    )
    num_equal = torch.zeros(hops, hops, n, device=graph.device)
    union_sum = torch.ones(hops, hops, n, device=graph.device)
    for part in torch.arange(n, device=graph.device).split(_CACHED_PAIRS):
        minhash.read(pairs[:, part])
        for a in range(hops):
            for b in range(hops):
                num_equal[a, b, part] = minhash.count_equal(a, b)
    # The size of the union is not needed where no minimum is equal.
    needed = torch.arange(n, device=graph.device) if are_edges else num_equal.sum(dim=(0, 1)).nonzero().flatten()
    size = torch.stack([torch.stack(sketches.sizes[1:])[:, node] for node in pairs])
    for part in needed.split(_CACHED_PAIRS):
        registers.read(pairs[:, part])
        for a in range(hops):
            for b in range(hops):
                union_sum[a, b, part] = registers.sum_of_union(a, b)
            if are_edges:
                size[0, a, part], size[1, a, part] = registers.sum_of_one(0, a), registers.sum_of_one(1, a)
    num_registers = sketches.registers[0].size(1)
    if are_edges:
        size = estimate_cardinality(size, num_registers)
    # within[a, b]: |B_a(i) ∩ B_b(j)|, the Jaccard index times the size of the union.
    within = torch.zeros(hops + 1, hops + 1, n, device=graph.device)
    jaccard = num_equal / sketches.minhash[0].size(1)
    within[1:, 1:] = jaccard * estimate_cardinality(union_sum, num_registers)
    at_distances = within[1:, 1:] - within[:-1, 1:] - within[1:, :-1] + within[:-1, :-1]
    only_one: list[Tensor] = []
    for one, shared in zip(size, (within[:, hops], within[hops, :]), strict=True):
        only_one.append(torch.diff(torch.cat([torch.zeros_like(one[:1]), one]) - shared, dim=0))
    return torch.cat([at_distances.reshape(hops * hops, -1), *only_one]).T


class _PairSketches:
    """MinHash or HyperLogLog sketches of both nodes of pairs, as integers in buffers that fit into a processor's cache.

    Args:
        graph: the graph that was sketched.
        tables: sketches by hop, [nodes, columns].
        increases: `Sketches.increases` of these sketches, by hop.
        are_edges: whether the pairs are edges; the sketches of each pair are then those without its edge.

    """

    def __init__(
        self, graph: Adjacency, tables: tuple[Tensor, ...], increases: list[Tensor], *, are_edges: bool
    ) -> None:
        self.graph, self.tables, self.increases, self.are_edges = graph, tables, increases, are_edges
        self.hops = len(tables) - 1
        self.integers = [as_integers(table) for table in tables]
        columns = tables[0].size(1)
        # Rows of both nodes for each hop from 0 to k, and two buffers.
        self._memory = self.integers[0].new_empty(2 * (self.hops + 1) + 2, _CACHED_PAIRS, columns)
        self._floats = torch.empty(_CACHED_PAIRS, columns, device=graph.device)

    def read(self, pairs: Tensor) -> None:
        """Read the sketches of both nodes of at most `_CACHED_PAIRS` pairs [2, pairs].

        For one and two hops, the sketch without the edge is the minimum over the sketches of the other neighbors,
        because no walk of two steps through another neighbor uses the edge. For three hops, walks that return to the
        node in the second step are left out, because only they could use the edge in the third.
        """
        self._num_pairs = pairs.size(1)
        self._buffer, other_buffer, *rows = self._memory[:, : self._num_pairs]
        self._rows = [rows[: self.hops + 1], rows[self.hops + 1 :]]
        for side, nodes in enumerate(pairs):
            for hop in range(0 if self.are_edges else 1, self.hops + 1):
                torch.index_select(self.integers[hop], 0, nodes, out=self._rows[side][hop])
        if not self.are_edges:
            return
        # From the last hop to the first, because a hop is compared with the unchanged previous hop of the other node.
        for hop in range(min(self.hops, 2), 0, -1):
            for side, nodes in enumerate(pairs):
                is_from_other = torch.eq(self._rows[side][hop], self._rows[1 - side][hop - 1], out=self._buffer)
                increase = torch.index_select(self.increases[hop - 1], 0, nodes, out=other_buffer)
                self._rows[side][hop].addcmul_(is_from_other, increase)
        if self.hops == 3:
            for side in (0, 1):
                self._read_third_hop(pairs[side], pairs[1 - side], self._rows[side])

    def _read_third_hop(self, nodes: Tensor, others: Tensor, rows: list[Tensor]) -> None:
        neighbor, owner = self.graph.csr.expand(nodes)
        keep = (neighbor != others[owner]).nonzero().flatten()
        neighbor, owner = neighbor[keep], owner[keep]
        second, walk = self.graph.csr.expand(neighbor)
        keep = (second != nodes[owner[walk]]).nonzero().flatten()
        offsets = offsets_from_counts(torch.bincount(owner[walk[keep]], minlength=nodes.numel()))
        torch.minimum(rows[2], as_integers(segment_min(second[keep], offsets, self.tables[1])), out=rows[3])

    def count_equal(self, a: int, b: int) -> Tensor:
        """Return in how many columns hop a + 1 of the first node equals hop b + 1 of the second, [pairs]."""
        first, second = (part.view(torch.float32) for part in (self._rows[0][a + 1], self._rows[1][b + 1]))
        return torch.eq(first, second, out=self._floats[: self._num_pairs]).sum(dim=1)

    def sum_of_union(self, a: int, b: int) -> Tensor:
        """Return the register sum of the union of hop a + 1 of the first node and hop b + 1 of the second, [pairs]."""
        return self._sum(torch.minimum(self._rows[0][a + 1], self._rows[1][b + 1], out=self._buffer))

    def sum_of_one(self, side: int, a: int) -> Tensor:
        """Return the register sum of hop a + 1 of the first (0) or second (1) node, [pairs]."""
        return self._sum(self._rows[side][a + 1])

    def _sum(self, registers: Tensor) -> Tensor:
        return self._floats[: self._num_pairs].copy_(registers.view(torch.bfloat16)).sum(dim=1)
