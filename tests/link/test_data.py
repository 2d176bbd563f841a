import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suffice.link.batches.negatives import edge_keys
from suffice.link.data.datasets import from_ogb, load_graph
from suffice.link.data.files import read_graph
from suffice.link.data.graph import Graph, SplitConfig, prepare_graph, split_edges
from suffice.link.data.synthetic import block_model, digits


@given(seed=st.integers(0, 50), negatives=st.sampled_from([0.5, 1.0, 3.0]))
def test_a_split_shares_nothing_between_its_parts(graph, seed, negatives):
    parts = split_edges(graph, SplitConfig(0.1, 0.2, negatives=negatives), seed)
    sets = [set(edge_keys(edges, graph.num_nodes).tolist()) for edges in (parts.train, parts.validation, parts.test)]
    assert set.union(*sets) == set(edge_keys(graph.edges, graph.num_nodes).tolist())
    assert sum(map(len, sets)) == graph.edges.size(1)
    false = [
        set(edge_keys(edges, graph.num_nodes).tolist()) for edges in (parts.validation_negatives, parts.test_negatives)
    ]
    assert not false[0] & false[1]
    assert not (false[0] | false[1]) & set.union(*sets)
    assert len(false[1]) == round(parts.test.size(1) * negatives)


def test_messages_hold_validation_edges_only_where_the_protocol_says(parts):
    assert parts.message_edges().size(1) == 2 * parts.train.size(1)
    assert parts.message_edges(validation=True).size(1) == 2 * (parts.train.size(1) + parts.validation.size(1))


def test_largest_component():
    edges = torch.tensor([[0, 1, 3], [1, 2, 4]])
    small = prepare_graph(Graph("g", torch.arange(5.0)[:, None], edges), SplitConfig(largest_component=True))
    assert small.x.flatten().tolist() == [0, 1, 2]
    assert small.edges.tolist() == [[0, 1], [1, 2]]


def test_block_model_keeps_its_dials():
    graph = block_model(1200, 4, 10, edge_signal=0.7, feature_signal=3.0, seed=3)
    y = graph.classes
    same = (y[graph.edges[0]] == y[graph.edges[1]]).float().mean()
    # Expected shares: p_in : p_out = 1 : 0.3, one class of own nodes against three others.
    assert float(same) == pytest.approx(1 / (1 + 3 * 0.3), abs=0.03)
    assert 2 * graph.edges.size(1) / 1200 == pytest.approx(10, rel=0.05)
    means = torch.stack([graph.x[y == c].mean(0) for c in range(4)])
    assert torch.allclose(means.norm(dim=1), torch.tensor(3.0), atol=0.3)
    assert torch.equal(graph.x, block_model(1200, 4, 10, edge_signal=0.7, feature_signal=3.0, seed=3).x)


@given(seed=st.integers(0, 30), nodes=st.integers(6, 40))
def test_block_models_of_highest_degree_are_complete_classes(seed, nodes):
    graph = block_model(nodes, 2, nodes / 2 - 1, edge_signal=1.0, seed=seed)
    assert all(graph.classes[u] == graph.classes[v] and u < v for u, v in graph.edges.T.tolist())
    if nodes % 2 == 0:
        half = nodes // 2
        assert graph.edges.size(1) == half * (half - 1)


def test_digits_are_joined_to_their_neighbours():
    graph = digits()
    assert graph.edges.size(1) == 7522
    distance = torch.cdist(graph.x[:1], graph.x)[0]
    nearest = set(distance.topk(7, largest=False).indices.tolist()) - {0}
    joined = set(graph.edges[:, (graph.edges == 0).any(0)].flatten().tolist())
    assert nearest <= joined


def test_planetoid_by_name(data_root):
    graph = load_graph("cora", data_root)
    assert (graph.num_nodes, graph.edges.size(1), graph.classes.unique().numel()) == (2708, 5278, 7)


def test_ogb_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogb.linkproppred", None)
    with pytest.raises(ImportError, match="pip install ogb"):
        load_graph("ogbl-collab")


def test_ogb_parts_are_made_disjoint():
    parts = {
        "train": {"edge": torch.tensor([[0, 1], [1, 0], [1, 2]])},
        "valid": {"edge": torch.tensor([[2, 1], [2, 3]]), "edge_neg": torch.tensor([[0, 4], [0, 1]])},
        "test": {"edge": torch.tensor([[3, 4]]), "edge_neg": torch.tensor([[4, 0], [1, 4]])},
    }

    class Fake:
        def __getitem__(self, _):
            return SimpleNamespace(x=torch.ones(5, 2))

        def get_edge_split(self):
            return parts

    graph = from_ogb(Fake(), "ogbl-test")
    own = split_edges(graph, SplitConfig(), 0)
    assert own.train.T.tolist() == [[0, 1], [1, 2]]
    assert own.validation.T.tolist() == [[2, 3]]
    assert own.validation_negatives.T.tolist() == [[0, 4]]
    assert own.test_negatives.T.tolist() == [[1, 4]]


def test_the_same_graph_from_csv_and_npz(tmp_path):
    edges, x, y = [[0, 1], [2, 1], [0, 3]], np.eye(4), ["a", "b", "a", "b"]
    np.savez(tmp_path / "g.npz", edges=np.array(edges), x=x, y=np.array(y))
    (tmp_path / "e.csv").write_text("source,target\n" + "\n".join(f"{u},{v}" for u, v in edges))
    (tmp_path / "x.csv").write_text("\n".join(",".join(map(str, row)) for row in x))
    (tmp_path / "y.csv").write_text("class\n" + "\n".join(y))
    one = read_graph(tmp_path / "g.npz")
    two = read_graph(tmp_path / "e.csv", tmp_path / "x.csv", tmp_path / "y.csv")
    for graph in (one, two, load_graph(str(tmp_path / "g.npz"))):
        assert graph.edges.tolist() == [[0, 1, 0], [1, 2, 3]]
        assert torch.equal(graph.x, torch.eye(4))
        assert graph.classes.tolist() == [0, 1, 0, 1]


def test_both_directions_of_every_edge_count_once(tmp_path):
    np.savez(tmp_path / "g.npz", edges=np.array([[0, 1], [1, 0], [1, 2], [2, 1]]), x=np.eye(3))
    assert read_graph(tmp_path / "g.npz").edges.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("edges", "y", "message"),
    [
        ([[0, 9]], [0, 1, 0], "1 with ids out of range; accepted: 0 to 2"),
        ([[0, 1], [2, 2]], [0, 1, 0], r"1 self-loops.*\(2, 2\)"),
        ([[0, 1], [1, 2], [1, 0]], [0, 1, 0], "1 duplicates"),
        ([[0, 1]], [0, 1], "labels hold 2 rows, 1 missing"),
        ([[0, 1]], [0.0, np.nan, 1.0], "missing for 1 nodes"),
        ([[0, 1]], ["a", "", "b"], "missing for 1 nodes"),
        ([[0, 1.5]], [0, 1, 0], "no whole numbers"),
        ([[0, 1, 2]], [0, 1, 0], r"edges has shape \(1, 3\)"),
    ],
)
def test_bad_files_are_named(tmp_path, edges, y, message):
    np.savez(tmp_path / "g.npz", edges=np.array(edges), x=np.eye(3), y=np.array(y))
    with pytest.raises(ValueError, match=message):
        read_graph(tmp_path / "g.npz")


def test_the_same_graph_from_parquet(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pd.DataFrame({"u": [0, 2], "v": [1, 1]}).to_parquet(tmp_path / "e.parquet")
    pd.DataFrame(np.eye(3)).rename(columns=str).to_parquet(tmp_path / "x.parquet")
    pd.DataFrame({"class": ["a", "b", "a"]}).to_parquet(tmp_path / "y.parquet")
    graph = read_graph(tmp_path / "e.parquet", tmp_path / "x.parquet", tmp_path / "y.parquet")
    assert graph.edges.tolist() == [[0, 1], [1, 2]]
    assert graph.classes.tolist() == [0, 1, 0]


def test_parquet_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    (tmp_path / "e.parquet").touch()
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ImportError, match="pip install pandas pyarrow"):
        read_graph(tmp_path / "e.parquet", tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_graph("Kora"), "name is 'Kora'; accepted: block-model"),
        (lambda: SplitConfig(validation=0), "validation, test are 0, 0.1"),
        (lambda: SplitConfig(negatives=0), "negatives is 0"),
        (lambda: block_model(edge_signal=2), "edge_signal is 2"),
        (lambda: block_model(degree=1e6), "degree is 1000000"),
        (lambda: digits(0), "neighbours is 0"),
        (lambda: read_graph("x.txt"), "ends in '.txt'"),
        (lambda: read_graph("x.csv"), "x.csv does not exist"),
        (lambda: Graph("g", torch.ones(3, 1), torch.tensor([[0], [1]])).classes, "y of g is missing"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_split_and_too_few_negatives_are_named():
    tiny = Graph("g", torch.ones(4, 1), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    with pytest.raises(ValueError, match="an empty split"):
        split_edges(tiny, SplitConfig(), 0)
    with pytest.raises(ValueError, match=r"count is .* negatives; accepted: at most the 3 pairs"):
        split_edges(tiny, SplitConfig(0.34, 0.34, negatives=9), 0)
