"""Graphs without features, bipartite graphs, and graphs of other libraries."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data, HeteroData

from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Fixed
from suffice.link.batches.negatives import TooFewNegativesError, edge_keys, sample_negatives
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.convert import from_networkx, from_ogb_dict
from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.files import read_graph, read_saved_graph, save_graph
from suffice.link.data.graph import Graph, SplitConfig, order_sides, prepare_graph, split_edges
from suffice.link.models import build_model
from suffice.link.study.run_settings import DataSource
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.inputs import node_features
from suffice.link.train.trainer import fit

# ---- Bipartite graphs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bipartite() -> Graph:
    is_edge = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    return Graph("sides", torch.randn(70, 4), is_edge.nonzero().T + torch.tensor([[0], [30]]), num_left=30)


@given(left=st.integers(1, 9), right=st.integers(1, 9), seed=st.integers(0, 20))
def test_negatives_of_bipartite_graphs_join_both_sides(left, right, seed):
    pairs = torch.cartesian_prod(torch.arange(left), torch.arange(left, left + right)).T
    is_edge = torch.rand(pairs.size(1), generator=torch.Generator().manual_seed(seed)) < 0.3
    wanted = int((~is_edge).sum())
    found = sample_negatives(pairs[:, is_edge], (left, right), wanted, seed)
    keys = edge_keys(found, left + right).tolist()
    assert sorted(keys) == sorted(edge_keys(pairs[:, ~is_edge], left + right).tolist())  # all pairs without an edge
    with pytest.raises(TooFewNegativesError, match=f"count must be at most {wanted}"):
        sample_negatives(pairs[:, is_edge], (left, right), wanted + 1, seed)


def test_no_negative_of_a_split_or_batch_lies_on_one_side(bipartite):
    parts = split_edges(bipartite, SplitConfig(0.1, 0.2), 0)
    batches = EdgeBatches(parts.train, bipartite.sides, Fixed(), batch_size=32, known=parts.known)
    negatives = [parts.validation_negatives, parts.test_negatives, *(b.pairs[:, b.labels == 0] for b in batches)]
    for pairs in negatives:
        assert ((pairs < 30).sum(dim=0) == 1).all()
    model = build_model("encoder-decoder", 4, hidden=8)
    fit(model, bipartite, parts, TrainConfig(epochs=1, batch_size=32, metric="auc"))
    assert set(audit_trained(model, bipartite, parts, batch_size=32).parts) == {"heldout", "train"}


def test_sides_are_kept_by_files_and_components(bipartite, tmp_path):
    assert read_saved_graph(tmp_path / save_graph(bipartite, tmp_path)).num_left == 30
    edges = torch.tensor([[1, 0, 2], [3, 4, 3]])
    small = Graph("g", torch.arange(5.0)[:, None], edges, node_ids=np.array([*"abcde"]), num_left=3)
    kept = prepare_graph(small, SplitConfig(largest_component=True))
    assert (kept.num_left, kept.node_ids.tolist(), kept.x.flatten().tolist()) == (2, ["b", "c", "d"], [1, 2, 3])


def test_nodes_are_ordered_by_side():
    graph = Graph("g", torch.arange(4.0)[:, None], torch.tensor([[0, 1], [1, 2]]), torch.tensor([3, 4, 5, 6]))
    found = order_sides(graph, torch.tensor([False, True, False, False]))
    assert found.node_ids.tolist() == [1, 0, 2, 3]
    assert found.x.flatten().tolist() == [1, 0, 2, 3]
    assert found.classes.tolist() == [4, 3, 5, 6]
    assert (found.edges.T.tolist(), found.sides) == ([[0, 1], [0, 2]], (1, 3))
    with pytest.raises(ValueError, match=r"edges must join a node of each side, got 1 within one side, the first is"):
        order_sides(graph, torch.tensor([True, True, False, False]))


def test_bipartite_edge_lists(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("user,item\nu2,i1\nu1,i1\nu1,i2\n")
    graph = read_graph(path, "degree", bipartite=True)
    assert (graph.node_ids.tolist(), graph.num_left) == (["u1", "u2", "i1", "i2"], 2)
    assert graph.edges.T.tolist() == [[1, 2], [0, 2], [0, 3]]
    path.write_text("user,item\n1,2\n2,1\n")
    with pytest.raises(ValueError, match=r"e\.csv must have the ids of one side in its .* got 2 ids in both"):
        read_graph(path, "degree", bipartite=True)


# ---- Graphs without features -----------------------------------------------------------------------------------------


def test_degrees_count_training_edges_only(graph):
    bare = Graph.from_data(Data(edge_index=graph.edges, num_nodes=graph.num_nodes), "bare", features="degree")
    parts = split_edges(bare, SplitConfig(0.1, 0.2), 0)
    expected = torch.tensor([float((parts.train == node).sum()) for node in range(bare.num_nodes)])
    assert torch.allclose(node_features(bare, torch.nn.Identity(), parts)[:, 0].expm1(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "features"), [("encoder-decoder", "learned"), ("ncn", "learned"), ("buddy", "degree")]
)
def test_models_learn_without_features(graph, model, features):
    bare = replace(graph, x=torch.zeros(graph.num_nodes, 1), features=features)
    parts = split_edges(bare, SplitConfig(0.1, 0.2), 0)
    trained = build_model(model, bare.num_features, hidden=16)
    fit(trained, bare, parts, TrainConfig(epochs=4, batch_size=128, metric="auc"))
    assert evaluate(trained, bare, parts, SplitConfig(), 10)["auc"] > 0.6


def test_learned_features_are_embeddings_of_the_nodes(graph, parts):
    bare = replace(graph, x=torch.zeros(graph.num_nodes, 1), features="learned")
    model = build_model("encoder-decoder", bare.num_features, hidden=8, encoder="pure").eval()
    x = node_features(bare, model, parts)
    assert torch.equal(x.to_dense(), torch.eye(graph.num_nodes))
    with torch.no_grad():
        sparse, dense = (model(one, parts.message_edges(), parts.test) for one in (x, torch.eye(graph.num_nodes)))
    assert torch.allclose(sparse, dense, atol=1e-5)
    with pytest.raises(ValueError, match=r"features must be 'degree' or given for BUDDY, .* got 'learned'"):
        node_features(bare, build_model("buddy", bare.num_features), parts)


@pytest.mark.parametrize("features", ["degree", "learned"])
def test_edge_lists_without_features(tmp_path, features):
    path = tmp_path / "e.txt"
    path.write_text("# FromNodeId ToNodeId\n30\t1412\n3\t30\n5\t3\n")
    graph = read_graph(path, features)
    assert (graph.node_ids.tolist(), graph.features) == ([3, 5, 30, 1412], features)
    assert graph.edges.T.tolist() == [[2, 3], [0, 2], [0, 1]]
    again = read_saved_graph(tmp_path / save_graph(graph, tmp_path))
    assert (again.features, again.num_features) == (features, graph.num_features)
    source = DataSource(str(path), features)
    assert torch.equal(source.load(tmp_path, SplitConfig()).edges, graph.edges)
    assert source.digest()
    assert source.to_dict().keys() == {"name", "features", "labels", "root"}


# ---- Other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nx.Graph, nx.DiGraph, nx.MultiGraph])
def test_graphs_of_networkx(kind):
    graph = kind()
    for node, number in (("a", 1), ("b", 2), (("c", 1), 3)):
        graph.add_node(node, size=number, place=[number, 0.5], group="odd" if number % 2 else "even")
    graph.add_edges_from([("b", "a"), (("c", 1), "b"), ("b", ("c", 1)), ("a", "a")], weight=2.0)
    found = from_networkx(graph, "nx", features=["size", "place"], label="group")
    assert found.node_ids.tolist() == ["a", "b", ("c", 1)]
    assert found.edges.T.tolist() == [[0, 1], [1, 2]]
    assert found.x.tolist() == [[1, 1, 0.5], [2, 2, 0.5], [3, 3, 0.5]]
    assert found.classes.tolist() == [1, 0, 1]
    assert from_networkx(graph, "nx").features == "degree"
    with pytest.raises(ValueError, match="nodes must all have the attribute 'age', got none for node 'a'"):
        from_networkx(graph, "nx", features=["age"])
    with pytest.raises(ValueError, match="edges must have no weights or other values, got weight"):
        from_networkx(graph, "nx", rules=EdgeRules(weights="refuse"))


def test_dictionaries_of_ogb():
    graph = {"edge_index": np.array([[0, 1, 1], [1, 0, 2]]), "edge_feat": None, "node_feat": np.eye(3), "num_nodes": 3}
    found = from_ogb_dict(graph, "ogb")
    assert found.edges.T.tolist() == [[0, 1], [1, 2]]
    assert torch.equal(found.x, torch.eye(3))
    assert from_ogb_dict({**graph, "node_feat": None}, "ddi", features="learned").num_features == 3
    with pytest.raises(ValueError, match=r"data must have edge_index and x, .* Use features='degree' or 'learned'"):
        from_ogb_dict({**graph, "node_feat": None}, "ddi")
    with pytest.raises(ValueError, match="graph must hold edge_index and num_nodes, got"):
        from_ogb_dict({"edge_index_dict": {}}, "hetero")


def test_hetero_data_is_refused_by_name():
    with pytest.raises(TypeError, match=r"data must be a torch_geometric\.data\.Data with one .*, got HeteroData\. "):
        Graph.from_data(HeteroData(), "hetero")


def test_classes_in_a_column_are_read():
    data = Data(x=torch.ones(2, 1), edge_index=torch.tensor([[0], [1]]), y=torch.tensor([[1], [0]]))
    assert Graph.from_data(data, "column").classes.tolist() == [1, 0]
