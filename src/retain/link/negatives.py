"""Negative edges: pairs of nodes that no known edge joins, drawn by PyG and checked."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch_geometric.utils import negative_sampling, to_undirected


class TooFewNegativesError(ValueError):
    """The graph has fewer unconnected pairs than were asked for."""


def edge_keys(edges: Tensor, num_nodes: int) -> Tensor:
    """Return one number for each undirected pair, long [edges], the same for both directions."""
    low, high = edges.min(dim=0).values, edges.max(dim=0).values
    return low * num_nodes + high


def count_free(known: Tensor, num_nodes: int) -> int:
    """Return how many pairs of distinct nodes no known edge joins."""
    joined = edge_keys(known[:, known[0] != known[1]], num_nodes).unique().numel()
    return num_nodes * (num_nodes - 1) // 2 - joined


def draw_negatives(known: Tensor, num_nodes: int, count: int, seed: int) -> Tensor:
    """Draw distinct unconnected pairs uniformly.

    Args:
        known: edges that must not be drawn, in either direction, long [2, edges].
        num_nodes: nodes of the graph.
        count: pairs to draw.
        seed: the same seed gives the same pairs; no global generator is moved.

    Returns:
        long [2, count], the smaller id first, on the device of `known`.

    Raises:
        TooFewNegativesError: there are fewer such pairs.

    """
    keys = edge_keys(known[:, known[0] != known[1]], num_nodes).unique()
    free = num_nodes * (num_nodes - 1) // 2 - keys.numel()
    if count > free:
        raise TooFewNegativesError(
            f"count is {count} negatives; accepted: at most the {free} pairs of {num_nodes} nodes without edge"
        )
    both = to_undirected(known, num_nodes=num_nodes)
    found = known.new_empty((2, 0))
    attempt = 0
    with _python_random(seed):
        while found.size(1) < count:
            # PyG gives up after three tries: on dense graphs what it found joins what must not be drawn.
            taken = torch.cat([both, found], dim=1) if attempt else both
            more = negative_sampling(
                taken, num_nodes, 2 * (count - found.size(1)), force_undirected=True, method="sparse"
            )
            found = torch.cat([found, more[:, more[0] < more[1]]], dim=1)
            attempt += 1
    found = found[:, :count]
    drawn = edge_keys(found, num_nodes)
    if bool(torch.isin(drawn, keys).any()) or drawn.unique().numel() != count:
        raise RuntimeError("negative_sampling returned a known edge or the same pair twice")
    return found


@contextmanager
def _python_random(seed: int) -> Generator[None]:
    # PyG draws from Python's global generator.
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
