"""Negatives that are harder than uniform ones: with the degrees of edges, or close to the nodes of a positive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from suffice.arguments import check_int, check_seed
from suffice.link.batches.negatives import TooFewNegativesError, check_num_nodes, check_pairs, edge_keys

_PROPOSALS = 2**14  # pairs that are drawn at once, at least
_MAX_ROUNDS = 1000
_RESTART = 0.15  # probability that the random walk of PageRank returns to its start
_STEPS = 20  # of PageRank
_MAX_ENTRIES = 2**22  # of the dense matrix of candidates that is ranked at once
_DECIMALS = 12  # candidates with equal heuristics up to rounding are equally good


def sample_negatives_by_degree(known: Tensor, num_nodes: int | tuple[int, int], count: int, seed: int) -> Tensor:
    """Sample distinct pairs of nodes without an edge, each node in proportion to its degree (arXiv 2405.14985).

    Uniform negatives have small degrees, and edges have large ones, so that degrees alone tell them apart. Here, both
    nodes of a pair are ends of edges that are drawn at random.

    Args:
        known: edges that must not be sampled, in either direction, long [2, edges]. They define the degrees.
        num_nodes: number of nodes; of a bipartite graph, the numbers of both sides (see `NegativeSampler`).
        count: number of pairs.
        seed: the same seed gives the same pairs.

    Returns:
        pairs with the smaller node id first, long [2, count], on the device of `known`.

    Raises:
        TypeError: `count`, `seed` or `num_nodes` is not an integer, or `known` is not a tensor of integers.
        ValueError: `known` has another shape or node ids out of range, or a number is out of range.
        TooFewNegativesError: fewer pairs of nodes with edges are available, or too few were found.

    """
    num_nodes, count, seed = check_num_nodes(num_nodes), check_int("count", count, 0), check_seed(seed)
    known = check_pairs("known", known, num_nodes)
    total = num_nodes if isinstance(num_nodes, int) else sum(num_nodes)
    edges = known.sort(dim=0).values.cpu()
    edges = edges[:, edges[0] != edges[1]]
    known_keys = edge_keys(edges, total).unique()
    ends = torch.stack([known_keys // total, known_keys % total])  # each edge once
    if isinstance(num_nodes, int):
        ends = ends.flatten().expand(2, -1)
    nodes = [side.unique().numel() for side in ends]
    num_pairs = nodes[0] * (nodes[0] - 1) // 2 if isinstance(num_nodes, int) else nodes[0] * nodes[1]
    available = num_pairs - known_keys.numel()
    if count > available:
        raise TooFewNegativesError(
            f"count must be at most {available}, the number of pairs of nodes with edges that have none between them, "
            f"got {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    keys = known_keys.new_empty(0)
    for _ in range(_MAX_ROUNDS):
        if keys.numel() >= count:
            break
        size = max(_PROPOSALS, 2 * (count - keys.numel()))
        pairs = torch.stack([side[torch.randint(side.numel(), (size,), generator=generator)] for side in ends])
        proposed = edge_keys(pairs[:, pairs[0] != pairs[1]], total)
        keys = _without_repetition(torch.cat([keys, proposed[~torch.isin(proposed, known_keys)]]))
    if keys.numel() < count:
        raise TooFewNegativesError(
            f"count must be smaller: pairs of nodes with small degrees are rarely drawn, and only {keys.numel()} of "
            f"{available} pairs were found, got {count}"
        )
    keys = keys[:count]
    return torch.stack([keys // total, keys % total]).to(known.device)


def _without_repetition(keys: Tensor) -> Tensor:
    """Return each key once, in the order in which they come first."""
    unique, inverse = keys.unique(return_inverse=True)
    first = torch.full_like(unique, keys.numel()).scatter_reduce(0, inverse, torch.arange(keys.numel()), "amin")
    return keys[first.sort().values]


def hard_negatives(
    positives: Tensor,
    known: Tensor,
    graph: Tensor,
    num_nodes: int | tuple[int, int],
    count: int,
    seed: int,
) -> Tensor:
    """Return negatives of each positive that heuristics rank best, as the HeaRT benchmark does (arXiv 2306.10453).

    A negative of a positive (a, b) is (a, x) or (x, b). The nodes x are ranked by their resource allocation index with
    the node that stays, and by personalized PageRank from that node. The better of both ranks counts; equal ones are
    ordered at random. The benchmark also uses the similarity of features, which is left out here.

    Args:
        positives: long [2, positives].
        known: edges that must not be returned, in either direction, long [2, edges]: those of all parts of a split.
        graph: edges on which the heuristics are computed, such as the training edges, in either or both directions,
            long [2, edges].
        num_nodes: number of nodes; of a bipartite graph, the numbers of both sides (see `NegativeSampler`).
        count: number of negatives of each positive, even.
        seed: seed of the order of equally good negatives.

    Returns:
        long [2, positives, count], on the device of `positives`: first the pairs (a, x), then as many pairs (x, b).
        `flatten(1)` gives pairs for an `EdgeSet`. For the benchmark's MRR, compare each positive with its own negatives
        (`mean_reciprocal_rank` with scores [positives, count]).

    Raises:
        TypeError: `count`, `seed` or `num_nodes` is not an integer, or edges are not a tensor of integers.
        ValueError: `count` is odd or below 2, another number is out of range, or edges have another shape or node ids
            out of range.
        TooFewNegativesError: a positive has fewer negatives.

    """
    num_nodes, count, seed = check_num_nodes(num_nodes), check_int("count", count, 2), check_seed(seed)
    if count % 2:
        raise ValueError(f"count must be even, half of it for each node of a positive, got {count}")
    positives = check_pairs("positives", positives, num_nodes)
    known, graph = check_pairs("known", known, num_nodes), check_pairs("graph", graph, num_nodes)
    if positives.size(1) == 0:
        return positives.new_empty(2, 0, count)
    total = num_nodes if isinstance(num_nodes, int) else sum(num_nodes)
    generator = torch.Generator().manual_seed(seed)
    own = positives.cpu()
    keys = edge_keys(torch.cat([known.cpu(), own], dim=1), total).unique()
    pieces = [
        torch.cat([*_best_partners(fixed, other, keys, graph.cpu(), num_nodes, count // 2, generator)])
        for fixed, other in ((own[0], own[1]), (own[1], own[0]))
    ]
    kept = [side[:, None].expand(-1, count // 2) for side in own]
    sources = torch.cat([kept[0], pieces[1]], dim=1)
    targets = torch.cat([pieces[0], kept[1]], dim=1)
    return torch.stack([sources, targets]).to(positives.device)


def _best_partners(
    fixed: Tensor,
    replaced: Tensor,
    known_keys: Tensor,
    graph: Tensor,
    num_nodes: int | tuple[int, int],
    count: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield the `count` best nodes in place of each of the `replaced` nodes, long [some of the pairs, count]."""
    total = num_nodes if isinstance(num_nodes, int) else sum(num_nodes)
    adjacency, inverse_degree = _adjacency(graph, total)
    nodes = torch.arange(total)
    chunk = max(1, _MAX_ENTRIES // total)
    for stays, goes in zip(fixed.split(chunk), replaced.split(chunk), strict=True):
        pairs = torch.stack([stays.repeat_interleave(total), nodes.repeat(stays.numel())])
        is_candidate = ~torch.isin(edge_keys(pairs, total), known_keys).view(-1, total)
        is_candidate &= nodes != stays[:, None]
        if not isinstance(num_nodes, int):
            is_candidate &= (nodes < num_nodes[0]) == (goes < num_nodes[0])[:, None]
        if (fewest := int(is_candidate.sum(1).min())) < count:
            raise TooFewNegativesError(
                f"count must be at most {2 * fewest}, because a positive has only {fewest} negatives with one of its "
                f"nodes, got {2 * count}"
            )
        start = torch.zeros(total, stays.numel(), dtype=torch.float64)
        start[stays, torch.arange(stays.numel())] = 1.0
        allocation = adjacency @ (inverse_degree * (adjacency @ start))
        pagerank = start
        for _ in range(_STEPS):
            pagerank = (1 - _RESTART) * (adjacency @ (inverse_degree * pagerank)) + _RESTART * start
        ranks = torch.minimum(*(_ranks(values.T, is_candidate) for values in (allocation, pagerank)))
        order = ranks + torch.rand(ranks.shape, generator=generator, dtype=torch.float64)
        yield order.masked_fill(~is_candidate, torch.inf).topk(count, dim=1, largest=False).indices


def _adjacency(graph: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return the adjacency matrix of a graph, sparse [nodes, nodes], and 1 / degree, [nodes, 1], 0 without edges."""
    keys = edge_keys(graph[:, graph[0] != graph[1]], num_nodes).unique()
    edges = torch.stack([keys // num_nodes, keys % num_nodes])
    both = torch.cat([edges, edges.flip(0)], dim=1)
    ones = torch.ones(both.size(1), dtype=torch.float64)
    degree = both[0].bincount(minlength=num_nodes).double()[:, None]
    matrix = torch.sparse_coo_tensor(both, ones, (num_nodes, num_nodes), check_invariants=False).coalesce()
    return matrix, torch.where(degree > 0, 1 / degree.clamp(min=1), 0.0)


def _ranks(values: Tensor, is_candidate: Tensor) -> Tensor:
    """Return the number of candidates in the same row with a larger value, [rows, nodes]."""
    losses = -values.round(decimals=_DECIMALS).masked_fill(~is_candidate, -torch.inf)
    return torch.searchsorted(losses.sort(dim=1).values.contiguous(), losses.contiguous())
