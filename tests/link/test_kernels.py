"""Triton kernels of suffice.link, run by Triton's interpreter, against plain torch and against sets."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.link.sparse import neighbors, sketches
from suffice.link.sparse.adjacency import Adjacency


@pytest.fixture
def graph():
    """A graph with a node of high degree, a node without edges, and a row that is longer than a block."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 99, (2, 400), generator=generator)
    star = torch.stack([torch.zeros(90, dtype=torch.long), torch.arange(1, 91)])
    return Adjacency(torch.cat([edges, star], dim=1), 100)


def use_kernels(monkeypatch):
    monkeypatch.setattr(neighbors, "can_use_kernels", lambda *tensors: True)
    monkeypatch.setattr(sketches, "can_use_kernels", lambda *tensors: True)


def test_neighbors_against_sets(monkeypatch, graph):
    pairs = torch.randint(0, 100, (2, 25), generator=torch.Generator().manual_seed(1))
    pairs[:, 0] = torch.tensor([0, 99])
    pairs[:, 1] = torch.tensor([5, 0])
    view = graph.without(pairs)
    rows = [set(view.edge_index[1][view.edge_index[0] == node].tolist()) for node in range(100)]
    use_kernels(monkeypatch)
    common = neighbors.common_neighbors(view, pairs)
    first, second = neighbors.residual_neighbors(view, pairs)
    for number, (i, j) in enumerate(pairs.T.tolist()):
        for found, expected in (
            (common, rows[i] & rows[j]),
            (first, rows[i] - rows[j] - {j}),
            (second, rows[j] - rows[i] - {i}),
        ):
            part = slice(found.offsets[number], found.offsets[number + 1])
            assert found.node[part].tolist() == sorted(expected)
            assert found.owner[part].eq(number).all()


def test_no_pairs_and_no_common_neighbors(monkeypatch, graph):
    use_kernels(monkeypatch)
    assert neighbors.common_neighbors(graph, torch.empty(2, 0, dtype=torch.long)).offsets.tolist() == [0]
    assert neighbors.common_neighbors(graph, torch.tensor([[99], [99]])).node.numel() == 0


def test_sketches_are_those_of_plain_torch(monkeypatch, graph):
    expected = sketches.sketch(graph, hops=1, permutations=20, p=4)
    use_kernels(monkeypatch)
    found = sketches.sketch(graph, hops=1, permutations=20, p=4)
    tables = zip((*expected.minhash, *expected.registers), (*found.minhash, *found.registers), strict=True)
    for plain, by_kernel in tables:
        assert plain.dtype == by_kernel.dtype
        assert plain.equal(by_kernel)
