"""A cache of counts by distance, of the edges of a graph and of the validation pairs, which every epoch needs."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.distance_counts import count_by_distance
from suffice.link.sparse.sketches import sketch

_MAX_CACHED_PAIRS = 2**20  # over all sets of pairs: 32 MiB of counts of two hops


class CountCache:
    """Sketches of a graph, and symmetric counts by distance of pairs of its nodes.

    The counts of each edge in the graph without this edge are cached, which takes 64 bytes per edge for two hops.

    Args:
        graph: graph that is not a view.
        hops: radius k of the neighborhoods.

    """

    def __init__(self, graph: Adjacency, hops: int) -> None:
        self.graph, self.hops = graph, hops
        self.sketches = sketch(graph, hops)
        # The last row belongs to the pairs that are not edges, which `find` gives the position -1. It stays NaN.
        self._edges = torch.full((graph.csr.codes.numel() + 1, hops * (hops + 2)), torch.nan, device=graph.device)
        self._sets: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def counts(self, pairs: Tensor, *, reuse: bool = False) -> Tensor:
        """Return the counts of pairs as `symmetrize` returns them, [pairs, k(k + 2)].

        Args:
            pairs: long [2, pairs].
            reuse: whether to cache the counts of these pairs; about a million pairs are cached in total.

        """
        if not reuse:
            return self._counts(pairs)
        key = pairs.size(1), int((pairs[0] * self.graph.num_nodes + pairs[1]).sum())
        known = self._sets.get(key)
        if known is not None and torch.equal(known[0], pairs):
            return known[1]
        counts = self._counts(pairs)
        if pairs.size(1) <= _MAX_CACHED_PAIRS:
            self._sets[key] = pairs.clone(), counts
        while sum(size for size, _ in self._sets) > _MAX_CACHED_PAIRS:
            del self._sets[next(iter(self._sets))]
        return counts

    def _counts(self, pairs: Tensor) -> Tensor:
        # The last bit of a count depends on the order of the two nodes, so the smaller id always comes first.
        pairs = torch.stack([pairs.min(dim=0).values, pairs.max(dim=0).values])
        positions = self.graph.csr.find(pairs[0] * self.graph.num_nodes + pairs[1])
        counts = self._edges[positions]
        missing = counts[:, 0].isnan().nonzero().flatten()
        if missing.numel():
            new = symmetrize(count_by_distance(self.graph, self.sketches, pairs[:, missing]), self.hops)
            counts[missing] = new
            is_edge = positions[missing] >= 0
            self._edges[positions[missing][is_edge]] = new[is_edge]
        return counts


def symmetrize(counts: Tensor, hops: int) -> Tensor:
    """Return counts that do not depend on the order of the two nodes.

    Two counts that trade places when the nodes are swapped are replaced by their maximum and their minimum.

    Args:
        counts: as `count_by_distance` returns them, [pairs, k(k + 2)].
        hops: radius k of the neighborhoods.

    Returns:
        [pairs, k(k + 2)].

    """
    grid = counts[:, : hops * hops].reshape(-1, hops, hops)
    larger, smaller = torch.maximum(grid, grid.mT), torch.minimum(grid, grid.mT)
    mirrored = larger.triu() + smaller.tril(-1)
    first, second = counts[:, hops * hops :].chunk(2, dim=1)
    return torch.cat([mirrored.flatten(1), torch.maximum(first, second), torch.minimum(first, second)], dim=1)
