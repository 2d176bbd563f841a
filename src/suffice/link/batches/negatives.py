"""Sampling of negative edges: pairs of nodes without an edge, sampled with PyG and verified.

PyG draws pairs one by one in Python. More than half a million pairs are drawn with torch.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch_geometric.utils import negative_sampling

from suffice.arguments import check_int, shown

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MAX_NODES = 2**31 - 1  # so that the key of a pair is a 64-bit integer
_MANY = 2**19  # number of pairs from which PyG's sampler, which draws with Python's `random`, takes too long


class TooFewNegativesError(ValueError):
    """The graph has fewer pairs without an edge than requested."""


def edge_keys(edges: Tensor, num_nodes: int) -> Tensor:
    """Return a key for each undirected edge, long [edges]; both directions of an edge have the same key."""
    low, high = edges.min(dim=0).values, edges.max(dim=0).values
    return low * num_nodes + high


def check_num_nodes(num_nodes: object) -> int | tuple[int, int]:
    """Return a number of nodes, or the numbers of both sides of a bipartite graph.

    Raises:
        TypeError: it is neither an integer nor a pair of integers.
        ValueError: a number is below 1.

    """
    if not isinstance(num_nodes, (tuple, list)):
        return check_int("num_nodes", num_nodes, 1, _MAX_NODES)
    sides = cast(Sequence[object], num_nodes)
    if len(sides) != 2:
        raise ValueError(f"num_nodes must be a number or the numbers of both sides, got {shown(num_nodes)}")
    first, second = (check_int(f"num_nodes[{side}]", count, 1, _MAX_NODES) for side, count in enumerate(sides))
    return first, second


def check_pairs(name: str, pairs: object, num_nodes: int | tuple[int, int]) -> Tensor:
    """Return pairs of nodes as a tensor, long [2, pairs].

    Raises:
        TypeError: `pairs` is not a tensor of integers.
        ValueError: it has another shape, a node id is out of range, or a pair of a bipartite graph joins nodes of one
            side.

    """
    if not isinstance(pairs, Tensor) or pairs.dtype not in INTEGERS:
        found = f"numbers of type {pairs.dtype}" if isinstance(pairs, Tensor) else shown(pairs)
        raise TypeError(f"{name} must be a tensor of integers [2, edges], got {found}")
    if pairs.ndim != 2 or pairs.size(0) != 2:
        raise ValueError(f"{name} must have shape [2, edges], got {tuple(pairs.shape)}")
    total = num_nodes if isinstance(num_nodes, int) else sum(num_nodes)
    pairs = pairs.long()
    is_wrong = ((pairs < 0) | (pairs >= total)).any(dim=0)
    accepted = f"node ids from 0 to {total - 1}"
    if not isinstance(num_nodes, int):
        is_wrong |= (pairs < num_nodes[0]).sum(dim=0) != 1
        accepted += f", one below {num_nodes[0]} and one from there in each pair"
    if bool(is_wrong.any()):
        first = tuple(pairs[:, int(is_wrong.nonzero()[0])].tolist())
        raise ValueError(f"{name} must hold {accepted}, got {int(is_wrong.sum())} other pairs, the first is {first}")
    return pairs


class NegativeSampler:
    """Sample distinct pairs of nodes without an edge, uniformly.

    Args:
        known: edges that must not be sampled, in either direction, long [2, edges].
        num_nodes: number of nodes; of a bipartite graph, the numbers of nodes of both sides, as in PyG. The nodes of
            the second side then follow those of the first, and pairs join a node of each side.

    Raises:
        TypeError: a number is not an integer, or `known` is not a tensor of integers.
        ValueError: a number is out of range, or `known` has another shape or node ids out of range.

    """

    def __init__(self, known: Tensor, num_nodes: int | tuple[int, int]) -> None:
        num_nodes = check_num_nodes(num_nodes)
        known = check_pairs("known", known, num_nodes)
        self._sides = None if isinstance(num_nodes, int) else num_nodes
        num_nodes = num_nodes if isinstance(num_nodes, int) else sum(num_nodes)
        self.num_nodes = num_nodes
        is_loop = known[0] == known[1]
        if bool(is_loop.any()):  # a copy of many edges takes much memory
            known = known[:, ~is_loop]
        self._known_keys = edge_keys(known, num_nodes).unique()  # sorted, each edge once
        num_pairs = num_nodes * (num_nodes - 1) // 2 if self._sides is None else self._sides[0] * self._sides[1]
        self._num_pairs = num_pairs
        self.num_available = num_pairs - self._known_keys.numel()

    def sample(self, count: int, seed: int) -> Tensor:
        """Return `count` pairs with the smaller node id first, long [2, count].

        The state of the global random generators does not change.

        Raises:
            TypeError: a number is not an integer.
            ValueError: `count` is negative.
            TooFewNegativesError: fewer pairs are available.

        """
        count, seed = check_int("count", count, 0), check_int("seed", seed)
        if count > self.num_available:
            raise TooFewNegativesError(
                f"count must be at most {self.num_available}, the number of pairs of {self.num_nodes} nodes without "
                f"an edge, got {count}"
            )
        if count >= _MANY:
            return self._sample_many(count, seed)
        known = torch.stack([self._known_keys // self.num_nodes, self._known_keys % self.num_nodes])
        sampled = known.new_empty((2, 0))
        with _seeded_python_random(seed):
            while sampled.size(1) < count:
                # On dense graphs PyG gives up early and returns fewer pairs. Exclude those as well and sample again.
                excluded = torch.cat([known, sampled], dim=1)
                missing = count - sampled.size(1)
                sampled = torch.cat([sampled, self._propose(excluded, missing)], dim=1)
        self._verify(sampled)
        return sampled

    def _sample_many(self, count: int, seed: int) -> Tensor:
        """Return `count` pairs as `sample` does, drawn with torch: the first distinct pairs without an edge."""
        generator = torch.Generator().manual_seed(seed)
        known, device = self._known_keys.cpu(), self._known_keys.device
        keys = known.new_empty(0)
        while keys.numel() < count:
            missing = count - keys.numel()
            drawn = self._draw_keys(int(1.05 * missing * self._num_pairs / self.num_available) + 1, generator)
            # Pairs that were drawn before come first, so that the stable sort marks the later copies.
            keys = torch.cat([keys, drawn])
            in_order, position = keys.sort(stable=True)
            is_new = torch.ones_like(in_order, dtype=torch.bool)
            torch.ne(in_order[1:], in_order[:-1], out=is_new[1:])
            if known.numel():
                index = torch.searchsorted(known, in_order).clamp_(max=known.numel() - 1)
                is_new &= known[index] != in_order
            keys = keys[torch.empty_like(is_new).scatter_(0, position, is_new)]
        keys = keys[:count].to(device)
        low = torch.div(keys, self.num_nodes, rounding_mode="floor")
        return torch.stack([low, keys - low * self.num_nodes])

    def _draw_keys(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the keys of up to `count` random pairs of two different nodes, with repeats, long [pairs]."""
        if self._sides is not None:
            first, second = (torch.randint(side, (count,), generator=generator) for side in self._sides)
            return first * self.num_nodes + second + self._sides[0]
        first, second = torch.randint(self.num_nodes, (2, count), generator=generator)
        keys = torch.minimum(first, second) * self.num_nodes + torch.maximum(first, second)
        return keys[first != second]

    def _propose(self, excluded: Tensor, count: int) -> Tensor:
        """Return at most `count` pairs that are not excluded, the smaller node id first."""
        if self._sides is not None:
            offset = excluded.new_tensor([[0], [self._sides[0]]])
            return negative_sampling(excluded - offset, self._sides, count) + offset
        # Undirected sampling counts both directions of a pair and returns the smaller node id first.
        pairs = negative_sampling(excluded, self.num_nodes, 2 * count, force_undirected=True)
        return pairs[:, : pairs.size(1) // 2]

    def _verify(self, pairs: Tensor) -> None:
        keys = edge_keys(pairs, self.num_nodes).sort().values
        index = torch.searchsorted(self._known_keys, keys).clamp(max=max(self._known_keys.numel() - 1, 0))
        has_duplicates = bool((keys[1:] == keys[:-1]).any())
        has_known = self._known_keys.numel() > 0 and bool((self._known_keys[index] == keys).any())
        if has_duplicates or has_known:
            raise RuntimeError("torch_geometric.utils.negative_sampling returned a known edge or a pair twice")


def sample_negatives(known: Tensor, num_nodes: int | tuple[int, int], count: int, seed: int) -> Tensor:
    """Sample distinct pairs of nodes without an edge, uniformly.

    Args:
        known: edges that must not be sampled, in either direction, long [2, edges].
        num_nodes: number of nodes, or the numbers of both sides of a bipartite graph (see `NegativeSampler`).
        count: number of pairs.
        seed: the same seed gives the same pairs.

    Returns:
        pairs with the smaller node id first, long [2, count], on the device of `known`.

    Raises:
        TypeError: a number is not an integer, or `known` is not a tensor of integers.
        ValueError: a number is out of range, or `known` has another shape or node ids out of range.
        TooFewNegativesError: fewer pairs are available.

    """
    return NegativeSampler(known, num_nodes).sample(count, seed)


@contextmanager
def _seeded_python_random(seed: int) -> Generator[None]:
    """Seed Python's global generator, from which PyG samples, and restore its state on exit."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
