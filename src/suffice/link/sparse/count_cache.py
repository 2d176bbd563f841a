"""Counts by distance that are asked for again: of a graph's edges in every epoch, of validation pairs after each."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.distance_counts import pair_counts
from suffice.link.sparse.sketches import sketch

_MOST = 2**20  # pairs of sets, in all: 32 MiB of counts of two hops


class CountCache:
    """Sketches of a graph, and counts that don't depend on which end of a pair comes first.

    An edge's counts (without the edge itself) are kept once made, 64 bytes for two hops.

    Args:
        graph: not a view.
        hops: k.

    """

    def __init__(self, graph: Adjacency, hops: int) -> None:
        self.graph, self.hops = graph, hops
        self.sketches = sketch(graph, hops)
        # One row more, for pairs that are no edges.
        self.edges = torch.full((graph.csr.codes.numel() + 1, hops * (hops + 2)), torch.nan, device=graph.device)
        self.sets: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def counts(self, pairs: Tensor, *, reuse: bool = False) -> Tensor:
        """Return the counts of pairs [2, pairs], as `symmetric` gives them: [pairs, k(k + 2)].

        Args:
            pairs: long.
            reuse: the same pairs will be asked for again; of such sets the last million pairs are kept.

        """
        if not reuse:
            return self._counts(pairs)
        key = pairs.size(1), int((pairs[0] * self.graph.num_nodes + pairs[1]).sum())
        known = self.sets.get(key)
        if known is not None and torch.equal(known[0], pairs):
            return known[1]
        counts = self._counts(pairs)
        if pairs.size(1) <= _MOST:
            self.sets[key] = pairs.clone(), counts
        while sum(size for size, _ in self.sets) > _MOST:
            del self.sets[next(iter(self.sets))]
        return counts

    def _counts(self, pairs: Tensor) -> Tensor:
        # Which end comes first decides the last bit.
        pairs = torch.stack([pairs.min(dim=0).values, pairs.max(dim=0).values])
        places = self.graph.csr.find(pairs[0] * self.graph.num_nodes + pairs[1])
        counts = self.edges[places]
        missing = counts[:, 0].isnan().nonzero().flatten()
        if missing.numel():
            found = symmetric(pair_counts(self.graph, self.sketches, pairs[:, missing]), self.hops)
            counts[missing] = found
            edge = places[missing] >= 0
            self.edges[places[missing][edge]] = found[edge]
        return counts


def symmetric(counts: Tensor, hops: int) -> Tensor:
    """Return counts that don't depend on which end comes first: of mirrored ones the larger and the smaller.

    Args:
        counts: as `pair_counts` returns them, [edges, k(k + 2)].
        hops: k.

    """
    grid = counts[:, : hops * hops].reshape(-1, hops, hops)
    large, small = torch.maximum(grid, grid.mT), torch.minimum(grid, grid.mT)
    both = large.triu() + small.tril(-1)
    one, other = counts[:, hops * hops :].chunk(2, dim=1)
    return torch.cat([both.flatten(1), torch.maximum(one, other), torch.minimum(one, other)], dim=1)
