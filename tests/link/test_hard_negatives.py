"""Hard negatives have the degrees, and the ranks by heuristics, that brute force finds."""

import collections
import itertools

import numpy as np
import pytest
import torch

from suffice.link import EdgeSet
from suffice.link.batches.hard_negatives import hard_negatives, sample_negatives_by_degree
from suffice.link.batches.negatives import TooFewNegativesError, sample_negatives
from tests.wrong_arguments import each_wrong_argument, expect_error

PATH = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])


def _pairs(edges):
    return {tuple(sorted(pair)) for pair in edges.flatten(1).T.tolist()}


def test_degrees_of_negatives_are_those_of_edges(graph):
    known = graph.edges
    degree = known.flatten().bincount(minlength=graph.num_nodes).double()
    drawn = sample_negatives_by_degree(known, graph.num_nodes, 500, seed=0)
    assert drawn.shape == (2, 500)
    assert len(_pairs(drawn)) == 500
    assert not _pairs(drawn) & _pairs(known)
    assert bool((drawn[0] < drawn[1]).all())
    of_edges, of_drawn = degree[known].mean(), degree[drawn].mean()
    of_uniform = degree[sample_negatives(known, graph.num_nodes, 500, seed=0)].mean()
    assert abs(of_drawn - of_edges) < 0.25 * (of_edges - of_uniform)
    assert torch.equal(drawn, sample_negatives_by_degree(known, graph.num_nodes, 500, seed=0))
    assert not torch.equal(drawn, sample_negatives_by_degree(known, graph.num_nodes, 500, seed=1))


def test_pairs_are_drawn_in_proportion_to_the_product_of_their_degrees():
    counts = collections.Counter(
        pair for seed in range(3000) for pair in _pairs(sample_negatives_by_degree(PATH, 6, 1, seed))
    )
    degree = [1, 2, 2, 2, 2, 1]
    free = set(itertools.combinations(range(6), 2)) - _pairs(PATH)
    weights = {pair: degree[pair[0]] * degree[pair[1]] for pair in free}
    assert counts.keys() == free
    for pair in free:
        expected = weights[pair] / sum(weights.values())
        assert abs(counts[pair] / 3000 - expected) < 4 * (expected / 3000) ** 0.5


def test_all_pairs_of_nodes_with_edges_can_be_drawn_and_no_more():
    assert len(_pairs(sample_negatives_by_degree(PATH, 100, 10, seed=0))) == 10  # nodes 6 to 99 have no edges
    with pytest.raises(TooFewNegativesError, match=r"count must be at most 10, .*, got 11"):
        sample_negatives_by_degree(PATH, 100, 11, seed=0)


def test_pairs_of_bipartite_graphs_join_both_sides():
    known = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])  # 3 and 4 nodes
    drawn = sample_negatives_by_degree(known, (3, 4), 8, seed=0)
    assert _pairs(drawn) == set(itertools.product(range(3), range(3, 7))) - _pairs(known)
    hard = hard_negatives(known[:, :1], known, known, (3, 4), 4, seed=0)
    assert bool((hard[0] < 3).all())
    assert bool((hard[1] >= 3).all())


def _heuristics(edges, num_nodes):
    """Return resource allocation and PageRank of all pairs from their definitions, [nodes, nodes] each."""
    matrix = np.zeros((num_nodes, num_nodes))
    for source, target in edges.T.tolist():
        matrix[source, target] = matrix[target, source] = 1
    degree = matrix.sum(0)
    neighbors = [set(np.flatnonzero(row)) for row in matrix]
    allocation = np.array(
        [[sum(1 / degree[k] for k in neighbors[a] & neighbors[b]) for b in range(num_nodes)] for a in range(num_nodes)]
    )
    pagerank = np.eye(num_nodes)
    for _ in range(20):
        pagerank = 0.85 * pagerank @ (matrix / np.maximum(degree, 1)[:, None]) + 0.15 * np.eye(num_nodes)
    return allocation.round(12), pagerank.round(12)


def test_negatives_are_the_best_ranked_of_all_candidates(graph):
    nodes = 80
    edges = graph.edges[:, (graph.edges < nodes).all(0)]
    positives, train = edges[:, ::5], edges[:, torch.arange(edges.size(1)) % 5 > 0]
    found = hard_negatives(positives, edges, train, nodes, 12, seed=0)
    assert found.shape == (2, positives.size(1), 12)
    known = _pairs(edges)
    heuristics = _heuristics(train, nodes)
    for index, (a, b) in enumerate(positives.T.tolist()):
        negatives = found[:, index].T.tolist()
        assert len({tuple(pair) for pair in negatives}) == 12
        assert {source for source, _ in negatives[:6]} == {a}
        assert {target for _, target in negatives[6:]} == {b}
        for stays, chosen in ((a, {x for _, x in negatives[:6]}), (b, {x for x, _ in negatives[6:]})):
            candidates = {x for x in range(nodes) if x != stays and tuple(sorted((stays, x))) not in known}
            assert chosen < candidates
            ranks = {
                x: min(sum(values[stays, y] > values[stays, x] for y in candidates) for values in heuristics)
                for x in candidates
            }
            assert max(ranks[x] for x in chosen) <= min(ranks[x] for x in candidates - chosen)
    assert EdgeSet(positives, found.flatten(1)).negatives.size(1) == 12 * positives.size(1)
    assert torch.equal(found, hard_negatives(positives, edges, train.flip(0), nodes, 12, seed=0))


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        (3, ValueError, "count must be even, .*, got 3"),
        (0, ValueError, "count must be at least 2, got 0"),
        (2.5, TypeError, "count must be an int, at least 2, got 2.5"),
        (8, TooFewNegativesError, "count must be at most 6, .*, got 8"),
    ],
)
def test_impossible_numbers_of_hard_negatives_are_refused(count, kind, message):
    with pytest.raises(kind, match=message):
        hard_negatives(PATH[:, 1:2], PATH, PATH, 6, count, seed=0)


def test_no_positives_have_no_negatives():
    assert hard_negatives(PATH[:, :0], PATH, PATH, 6, 4, seed=0).shape == (2, 0, 4)


def test_any_integers_are_node_ids():
    by_degree, hard = (sample_negatives_by_degree(PATH, 6, 3, 0), hard_negatives(PATH[:, :1], PATH, PATH, 6, 2, 0))
    small = PATH.int()
    assert torch.equal(sample_negatives_by_degree(small, 6, 3, 0), by_degree)
    assert torch.equal(hard_negatives(small[:, :1], small, small, 6, 2, 0), hard)


WRONG = [
    ("known", PATH.numpy(), TypeError, r"known must be a tensor of integers \[2, edges\], got a value of type ndarray"),
    ("known", PATH / 2, TypeError, "known must be a tensor of integers .*, got numbers of type torch.float32"),
    ("known", PATH.T, ValueError, r"known must have shape \[2, edges\], got \(5, 2\)"),
    ("known", PATH - 1, ValueError, r"known must hold node ids from 0 to 5, got 1 other pairs, the first is \(-1, 0\)"),
    ("known", PATH + 1, ValueError, r"known must hold node ids from 0 to 5, got 1 other pairs, the first is \(5, 6\)"),
    (
        "num_nodes",
        (3, 3),
        ValueError,
        r"(known|positives) must hold node ids from 0 to 5, one below 3 and one from there",
    ),
    ("num_nodes", None, TypeError, "num_nodes must be an int, from 1 to .*, got None"),
    ("num_nodes", 0, ValueError, "num_nodes must be from 1 to .*, got 0"),
    ("num_nodes", (3,), ValueError, r"num_nodes must be a number or the numbers of both sides, got \(3,\)"),
    ("num_nodes", (3, 1.5), TypeError, r"num_nodes\[1\] must be an int, .*, got 1.5"),
    ("seed", None, TypeError, "seed must be an int.*, got None"),
    ("count", 1.5, TypeError, "count must be an int, at least [02], got 1.5"),
    ("count", -1, ValueError, "count must be at least [02], got -1"),
]


@pytest.mark.parametrize("function", [sample_negatives, sample_negatives_by_degree, hard_negatives])
@each_wrong_argument([("function", *case) for case in WRONG])
def test_a_wrong_argument_is_named(function, call, argument, value, error, words):
    given = {"known": PATH, "num_nodes": 6, "count": 2, "seed": 0}
    if function is hard_negatives:
        given |= {"positives": PATH[:, :1], "graph": PATH}
    expect_error(lambda **own: function(**{**given, **own}), argument, value, error, words)


@pytest.mark.parametrize("function", [sample_negatives_by_degree, hard_negatives])
def test_negative_seeds_are_refused(function):
    edges = [PATH] * (3 if function is hard_negatives else 1)
    with pytest.raises(ValueError, match=r"seed must be from 0 to .*, got -1"):
        function(*edges, 6, 2, seed=-1)


@pytest.mark.parametrize("argument", ["positives", "graph"])
def test_wrong_edges_of_hard_negatives_are_named(argument):
    given = {"positives": PATH, "known": PATH, "graph": PATH, argument: PATH + 1}
    with pytest.raises(ValueError, match=f"{argument} must hold node ids from 0 to 5, got 1 other pairs"):
        hard_negatives(**given, num_nodes=6, count=2, seed=0)
