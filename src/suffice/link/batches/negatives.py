"""Negative edges: pairs of nodes that no known edge joins, drawn by PyG and checked."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch_geometric.utils import negative_sampling


class TooFewNegativesError(ValueError):
    """The graph has fewer unconnected pairs than were asked for."""


def edge_keys(edges: Tensor, num_nodes: int) -> Tensor:
    """Return one number for each undirected pair, long [edges], the same for both directions."""
    low, high = edges.min(dim=0).values, edges.max(dim=0).values
    return low * num_nodes + high


class NegativeSampler:
    """Draws distinct unconnected pairs uniformly; what doesn't change from draw to draw is prepared once.

    Args:
        known: edges that must not be drawn, in either direction, long [2, edges].
        num_nodes: nodes of the graph.

    """

    def __init__(self, known: Tensor, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.keys = edge_keys(known[:, known[0] != known[1]], num_nodes).unique()  # ascending
        self.known = torch.stack([self.keys // num_nodes, self.keys % num_nodes])  # each edge once
        self.free = num_nodes * (num_nodes - 1) // 2 - self.keys.numel()

    def draw(self, count: int, seed: int) -> Tensor:
        """Return `count` pairs, the smaller id first, long [2, count]; no global generator is moved.

        Raises:
            TooFewNegativesError: there are fewer such pairs.

        """
        if count > self.free:
            raise TooFewNegativesError(
                f"count is {count} negatives; accepted: at most the {self.free} pairs of "
                f"{self.num_nodes} nodes without edge"
            )
        found = self.known.new_empty((2, 0))
        with _python_random(seed):
            while found.size(1) < count:
                # PyG gives up after three tries: on dense graphs what it found joins what must not be drawn.
                taken = torch.cat([self.known, found], dim=1)
                missing = count - found.size(1)
                # Undirected sampling looks at the smaller id first and counts both directions.
                more = negative_sampling(taken, self.num_nodes, 2 * missing, force_undirected=True)
                found = torch.cat([found, more[:, : more.size(1) // 2]], dim=1)
        self._verify(found)
        return found

    def _verify(self, pairs: Tensor) -> None:
        drawn = edge_keys(pairs, self.num_nodes).sort().values
        places = torch.searchsorted(self.keys, drawn).clamp(max=max(self.keys.numel() - 1, 0))
        again = bool((drawn[1:] == drawn[:-1]).any())
        if again or (self.keys.numel() > 0 and bool((self.keys[places] == drawn).any())):
            raise RuntimeError("negative_sampling returned a known edge or the same pair twice")


def draw_negatives(known: Tensor, num_nodes: int, count: int, seed: int) -> Tensor:
    """Draw distinct unconnected pairs uniformly.

    Args:
        known: edges that must not be drawn, in either direction, long [2, edges].
        num_nodes: nodes of the graph.
        count: pairs to draw.
        seed: the same seed gives the same pairs.

    Returns:
        long [2, count], the smaller id first, on the device of `known`.

    Raises:
        TooFewNegativesError: there are fewer such pairs.

    """
    return NegativeSampler(known, num_nodes).draw(count, seed)


@contextmanager
def _python_random(seed: int) -> Generator[None]:
    # PyG draws from Python's global generator.
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
