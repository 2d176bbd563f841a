"""Operations on sparse graphs against sets and dense matrices, on random graphs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.nn import GCNConv

from suffice.link.data.synthetic import block_model
from suffice.link.models.buddy import propagated_features
from suffice.link.sparse import adjacency as adjacency_module
from suffice.link.sparse import overlap as overlap_module
from suffice.link.sparse.adjacency import Adjacency, as_adjacency, remove_edges
from suffice.link.sparse.distance_counts import count_by_distance
from suffice.link.sparse.neighbors import common_neighbors, pool, residual_neighbors, squared_rows
from suffice.link.sparse.overlap import EDGE_UNIT, dense_walks, overlap
from suffice.link.sparse.propagation import is_mostly_zero, propagate, propagate_sparse, propagate_without_own_edge
from suffice.link.sparse.sketches import estimate_cardinality, register_sums, sketch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@st.composite
def cases(draw):
    """Edges, pairs (some of them edges), the dense matrix of the graph, and that of the graph without the pairs."""
    nodes = draw(st.integers(3, 14))
    ids = st.integers(0, nodes - 1)
    edge = st.tuples(ids, ids).filter(lambda e: e[0] != e[1])
    edges = torch.tensor(draw(st.lists(edge, max_size=40)), dtype=torch.long).reshape(-1, 2).T
    pairs = torch.tensor(draw(st.lists(edge, max_size=12)), dtype=torch.long).reshape(-1, 2).T
    if edges.numel() and draw(st.booleans()):
        pairs = torch.cat([pairs, edges[:, :3], edges[:, :2].flip(0)], dim=1)
    dense = torch.zeros(nodes, nodes)
    dense[edges[0], edges[1]] = dense[edges[1], edges[0]] = 1
    masked = dense.clone()
    masked[pairs[0], pairs[1]] = masked[pairs[1], pairs[0]] = 0
    return edges, pairs, dense, masked


def cardinality(registers):
    return estimate_cardinality(register_sums(registers), registers.size(1))


def as_sets(neighbors):
    return [set(neighbors.node[start:end].tolist()) for start, end in pairwise(neighbors.offsets.tolist())]


@given(case=cases(), seed=st.integers(0, 9))
def test_remove_edges_keeps_the_other_edges_in_their_order(case, seed):
    _, pairs, dense, masked = case
    edge_index = dense.nonzero().T
    edge_index = edge_index[:, torch.randperm(edge_index.size(1), generator=torch.Generator().manual_seed(seed))]
    expected = [edge for edge in edge_index.T.tolist() if masked[edge[0], edge[1]]]
    assert remove_edges(edge_index, pairs, len(dense)).T.tolist() == expected
    view = remove_edges(Adjacency(edge_index, len(dense)), pairs, len(dense))
    assert torch.equal(view.edge_index, masked.nonzero().T)


@pytest.mark.parametrize("limit", [2**26, 0], ids=["dense", "search"])
@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_neighbors_in_a_view_without_the_pairs_against_sets(case, device, limit):
    edges, pairs, dense, masked = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjacency_module, "MAX_DENSE_ENTRIES", limit)
        graph = Adjacency(edges.to(device), len(dense))
        view = graph.without(pairs.to(device))
        neighbors = [set(row.nonzero().flatten().tolist()) for row in masked]
        common = common_neighbors(view, pairs.to(device))
        assert as_sets(common) == [neighbors[i] & neighbors[j] for i, j in pairs.T.tolist()]
        left, right = residual_neighbors(view, pairs.to(device))
        assert as_sets(left) == [neighbors[i] - neighbors[j] for i, j in pairs.T.tolist()]
        assert as_sets(right) == [neighbors[j] - neighbors[i] for i, j in pairs.T.tolist()]
        view_of_view = graph.without(pairs[:, :1].to(device)).without(pairs[:, 1:].to(device))
        assert as_sets(common_neighbors(view_of_view, pairs.to(device))) == as_sets(common)
        assert torch.equal(view_of_view.edge_index.cpu(), masked.nonzero().T)
        all_pairs = torch.cartesian_prod(torch.arange(len(dense)), torch.arange(len(dense))).T.to(device)
        assert torch.equal(view.contains(*all_pairs).cpu(), masked.bool().flatten())
    residual_of_edges = residual_neighbors(graph, pairs.to(device))[0]
    neighbors = [set(row.nonzero().flatten().tolist()) for row in dense]
    assert as_sets(residual_of_edges) == [neighbors[i] - neighbors[j] - {j} for i, j in pairs.T.tolist()]


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), seed=st.integers(0, 99))
def test_pool_and_its_gradient_against_a_dense_product(case, seed, device):
    edges, pairs, dense, masked = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(dense), 3, generator=generator, dtype=torch.float64)
    view = Adjacency(edges.to(device), len(dense)).without(pairs.to(device))
    neighbors = common_neighbors(view, pairs.to(device))
    random_weight = torch.rand(neighbors.node.numel(), generator=generator, dtype=torch.float64).to(device)
    for weight in (None, random_weight):
        matrix = torch.zeros(pairs.size(1), len(dense), dtype=torch.float64)
        matrix[neighbors.owner.cpu(), neighbors.node.cpu()] = 1.0 if weight is None else weight.cpu()
        if weight is None:
            assert torch.equal(matrix.float(), masked[pairs[0]] * masked[pairs[1]])
        ours, dense_x = x.clone().to(device).requires_grad_(), x.clone().requires_grad_()
        pooled, expected = pool(ours, neighbors, weight), matrix @ dense_x
        assert torch.allclose(pooled.cpu(), expected)
        if pairs.numel():
            (pooled**2).sum().backward()
            (expected**2).sum().backward()
            assert torch.allclose(ours.grad.cpu(), dense_x.grad)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), beta=st.sampled_from([0.0, 0.1, 0.7]))
def test_squared_adjacency_and_overlap_against_dense_matrices(case, beta, device):
    edges, pairs, dense, masked = case
    view = Adjacency(edges.to(device), len(dense)).without(pairs.to(device))
    nodes = torch.arange(len(dense)).flip(0).repeat(2)
    rows, count = squared_rows(view, nodes.to(device))
    found = torch.zeros(len(nodes), len(dense))
    found[rows.owner.cpu(), rows.node.cpu()] = count.cpu()
    assert torch.equal(found, (masked @ masked)[nodes])
    with dense_walks(view.base).rows_of_view(view, nodes.unique().to(device)) as table:
        table = table.cpu()[nodes]
    assert torch.equal((table & (EDGE_UNIT - 1)).float(), (masked @ masked)[nodes])
    assert torch.equal((table >> 14).float(), masked[nodes])
    reach = masked + beta * masked @ masked
    weight = torch.linspace(-1, 2, len(dense))
    expected = (reach[pairs[0]] * reach[pairs[1]]) @ weight
    for limit in (2**26, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap_module, "MAX_DENSE_ENTRIES", limit)
            ours = weight.clone().to(device).requires_grad_()
            found = overlap(view, pairs.to(device), ours, beta)
        assert torch.allclose(found.cpu(), expected, atol=1e-5)
        found.sum().backward()
        assert torch.allclose(ours.grad.cpu(), (reach[pairs[0]] * reach[pairs[1]]).sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_propagation_against_pyg_and_in_the_graph_without_each_edge(case, device):
    edges, loose, dense, _ = case
    x = torch.randn(len(dense), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = GCNConv(4, 4, bias=False).double()
    with torch.no_grad():
        layer.lin.weight.copy_(torch.eye(4))
    graph = Adjacency(edges.to(device), len(dense))
    our_x, pyg_x = x.clone().to(device).requires_grad_(), x.clone().requires_grad_()
    ours, expected = propagate(graph, our_x), layer(pyg_x, dense.nonzero().T)
    assert torch.allclose(ours.cpu(), expected)
    (ours**2).sum().backward()
    (expected**2).sum().backward()
    assert torch.allclose(our_x.grad.cpu(), pyg_x.grad)
    for targets in (dense.nonzero().T, torch.cat([dense.nonzero().T, loose], dim=1), loose):
        stacked = torch.cat([ours.detach(), x.to(device)])
        found = propagate_without_own_edge(graph, stacked, targets.to(device))
        assert found.shape == (2 * targets.size(1), 4)
        for number, (i, j) in enumerate(targets.T.tolist()):
            without = propagate(graph.without(targets[:, number : number + 1].to(device)), x.to(device))
            assert torch.allclose(found[number], without[i])
            assert torch.allclose(found[targets.size(1) + number], without[j])


@given(case=cases(), seed=st.integers(0, 99))
def test_sparse_features_are_propagated_like_dense_ones(case, seed):
    edges, _, dense, _ = case
    x = torch.rand(len(dense), 60, generator=torch.Generator().manual_seed(seed))
    x = x * (x > 0.97)
    graph = Adjacency(edges, len(dense))
    out = torch.full_like(x, torch.nan)
    propagate_sparse(graph, x, out)
    assert torch.allclose(out, propagate(graph, x), atol=1e-6)
    stacked = propagated_features(graph, x)
    assert torch.equal(stacked, torch.cat([out if is_mostly_zero(x) else propagate(graph, x), x]))


@pytest.mark.parametrize(("x", "expected"), [(torch.eye(40), True), (torch.ones(3, 3), False)])
def test_only_sparse_features_that_scipy_can_multiply_are_mostly_zero(x, expected):
    assert is_mostly_zero(x) == expected
    assert not is_mostly_zero(x.half())  # scipy has no half precision
    assert not is_mostly_zero(x.to("meta"))
    assert not is_mostly_zero(x.clone().requires_grad_())


def neighborhoods(dense, hops):
    """B_1 to B_k of every node as dense matrices of 0 and 1."""
    reach, found = torch.eye(len(dense)), []
    for _ in range(hops):
        reach = ((reach + reach @ dense) > 0).float()
        found.append(reach)
    return found


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), hops=st.integers(1, 3))
def test_counts_of_an_edge_are_those_of_the_graph_without_it(case, hops, device):
    edges, pairs, dense, _ = case
    if edges.numel() == 0:
        return
    graph = Adjacency(edges.to(device), len(dense))
    found = count_by_distance(graph, sketch(graph, hops), edges.to(device))
    for number in range(edges.size(1)):
        edge = edges[:, number : number + 1].to(device)
        without = graph.without(edge)
        expected = count_by_distance(without, sketch(without, hops), edge)[0]
        assert torch.allclose(found[number], expected, atol=1e-4)
    other = count_by_distance(graph, sketch(graph, hops), pairs.to(device))
    assert other.shape == (pairs.size(1), hops * (hops + 2))


@pytest.mark.parametrize("device", DEVICES)
def test_estimates_from_sketches_have_the_standard_error_of_theory(device):
    data = block_model(nodes=400, classes=4, degree=12, features=4, seed=3)
    graph = Adjacency(data.edges.to(device), 400)
    dense = torch.zeros(400, 400)
    dense[graph.edge_index[0].cpu(), graph.edge_index[1].cpu()] = 1
    reach = neighborhoods(dense, 2)
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(400, (2, 300), generator=generator)
    pairs = pairs[:, (pairs[0] != pairs[1]) & (dense[pairs[0], pairs[1]] == 0)]
    normalized, registers = [], sketch(graph, 2).registers
    for seed in range(12):
        made = sketch(graph, 2, seed=seed)
        for a in (0, 1):
            for b in (0, 1):
                first, second = reach[a][pairs[0]], reach[b][pairs[1]]
                exact, union = (first * second).sum(1), ((first + second) > 0).float().sum(1)
                jaccard = exact / union
                share = (made.minhash[a + 1][pairs[0]] == made.minhash[b + 1][pairs[1]]).float().mean(1).cpu()
                merged = torch.minimum(made.registers[a + 1][pairs[0]], made.registers[b + 1][pairs[1]])
                estimate = share * cardinality(merged).cpu()
                # The errors of J and of the union are independent: the standard error of their product.
                spread = ((union**2 * jaccard * (1 - jaccard) / 128) + (1.04 / 16 * exact) ** 2).sqrt().clamp(min=0.05)
                normalized.append((estimate - exact) / spread)
    errors = torch.cat(normalized)
    assert abs(float(errors.mean())) < 0.1
    assert 0.8 < float(errors.std()) < 1.1
    assert float((errors.abs() > 3).float().mean()) < 0.01
    sizes = torch.tensor([0.0, 1, 5, 50, 300, 1000, 5000, 100_000])
    many = Adjacency(torch.empty(2, 0, dtype=torch.long), 100_000)
    single = sketch(many, 1, permutations=1).registers[0]
    for size in sizes.int().tolist():
        merged = single[:size].min(dim=0, keepdim=True).values if size else torch.full_like(single[:1], 1024)
        assert abs(float(cardinality(merged)) - size) <= 4 * 1.04 / 16 * size + 0.01
    assert registers[1].dtype == torch.bfloat16


def test_counts_by_distance_of_a_graph_that_is_counted_by_hand():
    # The path 0-1-2-3-4 and the triangle 4-5-6.
    graph = Adjacency(torch.tensor([[0, 1, 2, 3, 4, 4, 5], [1, 2, 3, 4, 5, 6, 6]]), 7)
    found = count_by_distance(graph, sketch(graph, 2, permutations=4096, p=16), torch.tensor([[1], [3]]))[0]
    # B1(1) = 012, B1(3) = 234, B2(1) = 0123, B2(3) = 123456
    expected = [1, 1, 1, 0, 1, 0, 1, 2]
    assert torch.allclose(found, torch.tensor(expected).float(), atol=0.15)


@given(st.integers(0, 5))
def test_no_pairs_give_empty_results(nodes):
    graph = Adjacency(torch.empty(2, 0, dtype=torch.long), nodes)
    none = torch.empty(2, 0, dtype=torch.long)
    assert as_sets(common_neighbors(graph, none)) == []
    assert pool(torch.ones(nodes, 2), common_neighbors(graph, none)).shape == (0, 2)
    assert overlap(graph, none, torch.ones(nodes), 0.1).shape == (0,)
    assert count_by_distance(graph, sketch(graph), none).shape == (0, 8)
    assert propagate(graph, torch.ones(nodes, 2)).shape == (nodes, 2)
    assert remove_edges(none, none, nodes).shape == (2, 0)


def test_an_adjacency_is_symmetric_sorted_and_without_self_loops():
    graph = as_adjacency(torch.tensor([[0, 1, 2, 2], [1, 0, 2, 1]]), 3)
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert as_adjacency(graph, 3) is graph


def test_results_are_memoized_for_the_same_inputs_only():
    graph = Adjacency(torch.tensor([[0], [1]]), 2)
    first, second = torch.zeros(1), torch.zeros(1)
    result = graph.memoize("name", lambda: [1], first)
    assert graph.memoize("name", lambda: [2], first) is result
    assert graph.memoize("name", lambda: [3], second) == [3]


def test_the_cardinality_of_an_empty_set_is_zero():
    assert math.isclose(float(cardinality(torch.full((1, 256), 1024.0))), 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adjacency(torch.zeros(3, 1).long(), 3), r"edge_index must have shape \[2, edges\], got \(3, 1\)"),
        (
            lambda: Adjacency(torch.tensor([[0], [7]]), 4),
            "edge_index must hold node ids from 0 to 3, got 0 to 7",
        ),
        (
            lambda: Adjacency(torch.tensor([[0], [1]]), 4, hash_keys=torch.zeros(2)),
            r"hash_keys must have shape \(4,\), one for each node, got \(2,\)",
        ),
        (lambda: sketch(Adjacency(torch.tensor([[0], [1]]), 4), 4), "hops must be from 1 to 3, got 4"),
    ],
)
def test_wrong_graphs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(nodes=st.integers(1, 30), edges=st.integers(0, 80), seed=st.integers(0, 20))
def test_an_adjacency_has_both_directions_of_every_edge_once(nodes, edges, seed):
    edge_index = torch.randint(nodes, (2, edges), generator=torch.Generator().manual_seed(seed))
    pairs = {(i, j) for i, j in edge_index.T.tolist() if i != j}
    expected = sorted(pairs | {(j, i) for i, j in pairs})
    assert list(map(tuple, Adjacency(edge_index, nodes).edge_index.T.tolist())) == expected
