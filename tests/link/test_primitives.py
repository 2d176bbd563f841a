"""Structural primitives against sets and dense matrices, on random graphs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.nn import GCNConv

from suffice.link.data.synthetic import block_model
from suffice.link.models.buddy import propagated_features
from suffice.link.sparse import adjacency as messages
from suffice.link.sparse import overlap
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.distance_counts import pair_counts
from suffice.link.sparse.neighbors import common_neighbors, pool, residual_neighbors, square_rows
from suffice.link.sparse.overlap import square_dense
from suffice.link.sparse.propagation import is_mostly_zero, propagate, propagate_sparse, propagate_without_own_edge
from suffice.link.sparse.sketches import cardinality, sketch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@st.composite
def cases(draw):
    """A graph as a dense matrix, its edges, pairs to ask for (some are edges), and the graph without those."""
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


def lists(neighbors):
    bounds = neighbors.offsets.tolist()
    return [set(neighbors.node[start:end].tolist()) for start, end in pairwise(bounds)]


@pytest.mark.parametrize("small", [2**26, 0], ids=["bitmap", "search"])
@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_neighbours_of_masked_pairs_against_sets(case, device, small):
    edges, pairs, dense, masked = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "SMALL", small)
        graph = Adjacency(edges.to(device), len(dense))
        view = graph.without(pairs.to(device))
        near = [set(row.nonzero().flatten().tolist()) for row in masked]
        common = common_neighbors(view, pairs.to(device))
        assert lists(common) == [near[i] & near[j] for i, j in pairs.T.tolist()]
        left, right = residual_neighbors(view, pairs.to(device))
        assert lists(left) == [near[i] - near[j] for i, j in pairs.T.tolist()]
        assert lists(right) == [near[j] - near[i] for i, j in pairs.T.tolist()]
        again = graph.without(pairs[:, :1].to(device)).without(pairs[:, 1:].to(device))
        assert lists(common_neighbors(again, pairs.to(device))) == lists(common)
        assert torch.equal(again.edge_index.cpu(), masked.nonzero().T)
        every = torch.cartesian_prod(torch.arange(len(dense)), torch.arange(len(dense))).T.to(device)
        assert torch.equal(view.contains(*every).cpu(), masked.bool().flatten())
    residual_of_edges = residual_neighbors(graph, pairs.to(device))[0]
    full = [set(row.nonzero().flatten().tolist()) for row in dense]
    assert lists(residual_of_edges) == [full[i] - full[j] - {j} for i, j in pairs.T.tolist()]


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), seed=st.integers(0, 99))
def test_pooled_features_and_their_gradients_against_a_dense_product(case, seed, device):
    edges, pairs, dense, masked = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(dense), 3, generator=generator, dtype=torch.float64)
    graph = Adjacency(edges.to(device), len(dense)).without(pairs.to(device))
    found = common_neighbors(graph, pairs.to(device))
    weight = torch.rand(found.node.numel(), generator=generator, dtype=torch.float64).to(device)
    for weights in (None, weight):
        matrix = torch.zeros(pairs.size(1), len(dense), dtype=torch.float64)
        matrix[found.owner.cpu(), found.node.cpu()] = 1.0 if weights is None else weights.cpu()
        if weights is None:
            assert torch.equal(matrix.float(), masked[pairs[0]] * masked[pairs[1]])
        one = x.clone().to(device).requires_grad_()
        two = x.clone().requires_grad_()
        pooled, expected = pool(one, found, weights), matrix @ two
        assert torch.allclose(pooled.cpu(), expected)
        if pairs.numel():
            (pooled**2).sum().backward()
            (expected**2).sum().backward()
            assert torch.allclose(one.grad.cpu(), two.grad)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), beta=st.sampled_from([0.0, 0.1, 0.7]))
def test_powers_and_overlap_against_dense_matrices(case, beta, device):
    edges, pairs, dense, masked = case
    view = Adjacency(edges.to(device), len(dense)).without(pairs.to(device))
    nodes = torch.arange(len(dense)).flip(0).repeat(2)
    rows, count = square_rows(view, nodes.to(device))
    found = torch.zeros(len(nodes), len(dense))
    found[rows.owner.cpu(), rows.node.cpu()] = count.cpu()
    assert torch.equal(found, (masked @ masked)[nodes])
    assert torch.equal(square_dense(view, nodes.to(device)).cpu(), (masked @ masked)[nodes])
    reach = masked + beta * masked @ masked
    weight = torch.linspace(-1, 2, len(dense))
    expected = (reach[pairs[0]] * reach[pairs[1]]) @ weight
    for small in (2**26, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap, "SMALL", small)
            own = weight.clone().to(device).requires_grad_()
            got = overlap.overlap(view, pairs.to(device), own, beta)
        assert torch.allclose(got.cpu(), expected, atol=1e-5)
        got.sum().backward()
        assert torch.allclose(own.grad.cpu(), (reach[pairs[0]] * reach[pairs[1]]).sum(dim=0), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_propagation_is_pygs_and_forgets_a_pairs_own_edge(case, device):
    edges, loose, dense, _ = case
    x = torch.randn(len(dense), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = GCNConv(4, 4, bias=False).double()
    with torch.no_grad():
        layer.lin.weight.copy_(torch.eye(4))
    graph = Adjacency(edges.to(device), len(dense))
    one, two = x.clone().to(device).requires_grad_(), x.clone().requires_grad_()
    ours, theirs = propagate(graph, one), layer(two, dense.nonzero().T)
    assert torch.allclose(ours.cpu(), theirs)
    (ours**2).sum().backward()
    (theirs**2).sum().backward()
    assert torch.allclose(one.grad.cpu(), two.grad)
    for targets in (dense.nonzero().T, torch.cat([dense.nonzero().T, loose], dim=1), loose):
        ends = propagate_without_own_edge(graph, torch.cat([ours.detach(), x.to(device)]), targets.to(device))
        assert ends.shape == (2 * targets.size(1), 4)
        for number, (i, j) in enumerate(targets.T.tolist()):
            alone = propagate(graph.without(targets[:, number : number + 1].to(device)), x.to(device))
            assert torch.allclose(ends[number], alone[i])
            assert torch.allclose(ends[targets.size(1) + number], alone[j])


@given(case=cases(), seed=st.integers(0, 99))
def test_sparse_features_are_propagated_as_dense_ones(case, seed):
    edges, _, dense, _ = case
    x = torch.rand(len(dense), 60, generator=torch.Generator().manual_seed(seed))
    x = x * (x > 0.97)
    graph = Adjacency(edges, len(dense))
    out = torch.full_like(x, torch.nan)
    propagate_sparse(graph, x, out)
    assert torch.allclose(out, propagate(graph, x), atol=1e-6)
    both = propagated_features(graph, x)
    assert torch.equal(both, torch.cat([out if is_mostly_zero(x) else propagate(graph, x), x]))


@pytest.mark.parametrize(("x", "is_sparse"), [(torch.eye(40), True), (torch.ones(3, 3), False)])
def test_only_features_that_are_mostly_zero_take_sparse_products(x, is_sparse):
    assert is_mostly_zero(x) == is_sparse
    assert not is_mostly_zero(x.half())  # scipy has no half precision
    assert not is_mostly_zero(x.to("meta"))
    assert not is_mostly_zero(x.clone().requires_grad_())


def balls(dense, hops):
    reach, found = torch.eye(len(dense)), []
    for _ in range(hops):
        reach = ((reach + reach @ dense) > 0).float()
        found.append(reach)
    return found


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), hops=st.integers(1, 3))
def test_sketches_of_edges_are_those_of_the_graph_without_each(case, hops, device):
    edges, pairs, dense, _ = case
    if edges.numel() == 0:
        return
    graph = Adjacency(edges.to(device), len(dense))
    found = pair_counts(graph, sketch(graph, hops), edges.to(device))
    for number in range(edges.size(1)):
        own = edges[:, number : number + 1].to(device)
        alone = graph.without(own)
        assert torch.allclose(found[number], pair_counts(alone, sketch(alone, hops), own)[0], atol=1e-4)
    loose = pair_counts(graph, sketch(graph, hops), pairs.to(device))
    assert loose.shape == (pairs.size(1), hops * (hops + 2))


@pytest.mark.parametrize("device", DEVICES)
def test_sketched_counts_lie_within_the_bound_of_theory(device):
    data = block_model(nodes=400, classes=4, degree=12, features=4, seed=3)
    graph = Adjacency(data.edges.to(device), 400)
    dense = torch.zeros(400, 400)
    dense[graph.edge_index[0].cpu(), graph.edge_index[1].cpu()] = 1
    reach = balls(dense, 2)
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(400, (2, 300), generator=generator)
    pairs = pairs[:, (pairs[0] != pairs[1]) & (dense[pairs[0], pairs[1]] == 0)]
    normalised, registers = [], sketch(graph, 2).registers
    for seed in range(12):
        made = sketch(graph, 2, seed=seed)
        for a in (0, 1):
            for b in (0, 1):
                one, two = reach[a][pairs[0]], reach[b][pairs[1]]
                exact, union = (one * two).sum(1), ((one + two) > 0).float().sum(1)
                jaccard = exact / union
                same = (made.minhash[a + 1][pairs[0]] == made.minhash[b + 1][pairs[1]]).float().mean(1).cpu()
                merged = torch.minimum(made.registers[a + 1][pairs[0]], made.registers[b + 1][pairs[1]])
                estimate = same * cardinality(merged).cpu()
                # Independent errors of J and of the union: the standard error of their product.
                spread = ((union**2 * jaccard * (1 - jaccard) / 128) + (1.04 / 16 * exact) ** 2).sqrt().clamp(min=0.05)
                normalised.append((estimate - exact) / spread)
    errors = torch.cat(normalised)
    assert abs(float(errors.mean())) < 0.1
    assert 0.8 < float(errors.std()) < 1.1
    assert float((errors.abs() > 3).float().mean()) < 0.01
    sizes = torch.tensor([0.0, 1, 5, 50, 300, 1000, 5000, 100_000])
    many = Adjacency(torch.empty(2, 0, dtype=torch.long), 100_000)
    base = sketch(many, 1, permutations=1).registers[0]
    for size in sizes.int().tolist():
        merged = base[:size].min(dim=0, keepdim=True).values if size else torch.full_like(base[:1], 1024)
        assert abs(float(cardinality(merged)) - size) <= 4 * 1.04 / 16 * size + 0.01
    assert registers[1].dtype == torch.bfloat16


def test_counts_by_distance_of_a_graph_small_enough_to_count_by_hand():
    # A path 0-1-2-3-4 and a triangle 4-5-6.
    graph = Adjacency(torch.tensor([[0, 1, 2, 3, 4, 4, 5], [1, 2, 3, 4, 5, 6, 6]]), 7)
    found = pair_counts(graph, sketch(graph, 2, permutations=4096, p=16), torch.tensor([[1], [3]]))[0]
    # B1(1) = 012, B1(3) = 234, B2(1) = 0123, B2(3) = 123456
    expected = [1, 1, 1, 0, 1, 0, 1, 2]
    assert torch.allclose(found, torch.tensor(expected).float(), atol=0.15)


@given(st.integers(0, 5))
def test_nothing_to_ask_for_is_no_error(nodes):
    graph = Adjacency(torch.empty(2, 0, dtype=torch.long), nodes)
    none = torch.empty(2, 0, dtype=torch.long)
    assert lists(common_neighbors(graph, none)) == []
    assert pool(torch.ones(nodes, 2), common_neighbors(graph, none)).shape == (0, 2)
    assert overlap.overlap(graph, none, torch.ones(nodes), 0.1).shape == (0,)
    assert pair_counts(graph, sketch(graph), none).shape == (0, 8)
    assert propagate(graph, torch.ones(nodes, 2)).shape == (nodes, 2)


def test_bad_graphs_are_named():
    with pytest.raises(ValueError, match=r"edge_index has shape \(3, 1\); accepted"):
        Adjacency(torch.zeros(3, 1).long(), 3)
    with pytest.raises(ValueError, match=r"edge_index holds ids 0 to 7; accepted: 0 to 3"):
        Adjacency(torch.tensor([[0], [7]]), 4)
    with pytest.raises(ValueError, match="keys has shape"):
        Adjacency(torch.tensor([[0], [1]]), 4, keys=torch.zeros(2))
    with pytest.raises(ValueError, match="hops is 4; accepted: 1 to 3"):
        sketch(Adjacency(torch.tensor([[0], [1]]), 4), 4)
    graph = as_adjacency(torch.tensor([[0, 1, 2, 2], [1, 0, 2, 1]]), 3)
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert as_adjacency(graph, 3) is graph
    assert math.isclose(float(cardinality(torch.full((1, 256), 1024.0))), 0.0)
