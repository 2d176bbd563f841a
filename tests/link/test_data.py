"""Graphs, splits, files and checkpoints."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import to_undirected

from suffice.link.batches.negatives import edge_keys
from suffice.link.data.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from suffice.link.data.datasets import from_ogb, load_graph
from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.files import read_graph, read_saved_graph, save_graph
from suffice.link.data.graph import Graph, SplitConfig, prepare_graph, split_edges, with_enough_negatives
from suffice.link.data.synthetic import block_model, digits
from suffice.link.train.checkpoint import load_trained


@given(seed=st.integers(0, 50), negatives=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_parts_of_a_split_are_disjoint_and_complete(graph, seed, negatives):
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


@given(seed=st.integers(0, 50), validation=st.floats(0.01, 0.3), test=st.floats(0.01, 0.3))
def test_a_split_is_that_of_pyg(graph, seed, validation, test):
    shuffled = Graph("shuffled", graph.x, graph.edges[:, torch.randperm(graph.edges.size(1))])
    parts = split_edges(shuffled, SplitConfig(validation, test), seed)
    transform = RandomLinkSplit(
        validation, test, is_undirected=True, split_labels=True, add_negative_train_samples=False
    )
    torch.manual_seed(seed)
    of_pyg = transform(Data(edge_index=to_undirected(graph.edges), num_nodes=graph.num_nodes))
    for own, other in zip((parts.train, parts.validation, parts.test), of_pyg, strict=True):
        assert torch.equal(own, other.pos_edge_label_index)


def test_enough_negatives_are_drawn_for_hits(graph, parts):
    small = Graph("small", graph.x, graph.edges[:, ::8])
    config = SplitConfig()
    assert split_edges(small, config, 0).validation_negatives.size(1) < 100
    for k in (20, 100):
        found = split_edges(small, with_enough_negatives(config, small, k), 0)
        assert found.validation_negatives.size(1) == k
        assert found.test_negatives.size(1) >= k
    assert with_enough_negatives(SplitConfig(0.1, 0.2), graph, 100) == SplitConfig(0.1, 0.2)
    dense = Graph("dense", torch.ones(14, 1), torch.combinations(torch.arange(14)).T[:, 5:])
    assert with_enough_negatives(SplitConfig(0.2, 0.2), dense, 100) == SplitConfig(0.2, 0.2)


def test_message_edges_include_validation_edges_on_request(parts):
    assert parts.message_edges().size(1) == 2 * parts.train.size(1)
    assert parts.message_edges(validation=True).size(1) == 2 * (parts.train.size(1) + parts.validation.size(1))


def test_largest_component():
    edges = torch.tensor([[0, 1, 3], [1, 2, 4]])
    small = prepare_graph(Graph("g", torch.arange(5.0)[:, None], edges), SplitConfig(largest_component=True))
    assert small.x.flatten().tolist() == [0, 1, 2]
    assert small.edges.tolist() == [[0, 1], [1, 2]]


def test_a_block_model_has_the_requested_degree_and_signals():
    graph = block_model(1200, 4, 10, edge_signal=0.7, feature_signal=3.0, seed=3)
    y = graph.classes
    share = (y[graph.edges[0]] == y[graph.edges[1]]).float().mean()
    # p_in : p_out = 1 : 0.3, and a node has one class of its own and three others.
    assert float(share) == pytest.approx(1 / (1 + 3 * 0.3), abs=0.03)
    assert 2 * graph.edges.size(1) / 1200 == pytest.approx(10, rel=0.05)
    means = torch.stack([graph.x[y == c].mean(0) for c in range(4)])
    assert torch.allclose(means.norm(dim=1), torch.tensor(3.0), atol=0.3)
    assert torch.equal(graph.x, block_model(1200, 4, 10, edge_signal=0.7, feature_signal=3.0, seed=3).x)


@given(seed=st.integers(0, 30), nodes=st.integers(6, 40))
def test_a_block_model_of_the_largest_degree_has_complete_classes(seed, nodes):
    graph = block_model(nodes, 2, nodes / 2 - 1, edge_signal=1.0, seed=seed)
    assert all(graph.classes[u] == graph.classes[v] and u < v for u, v in graph.edges.T.tolist())
    if nodes % 2 == 0:
        half = nodes // 2
        assert graph.edges.size(1) == half * (half - 1)


def test_digits_are_joined_to_their_nearest_neighbors():
    graph = digits()
    assert graph.edges.size(1) == 7522
    distance = torch.cdist(graph.x[:1], graph.x)[0]
    nearest = set(distance.topk(7, largest=False).indices.tolist()) - {0}
    joined = set(graph.edges[:, (graph.edges == 0).any(0)].flatten().tolist())
    assert nearest <= joined


def test_planetoid_by_name(data_root):
    graph = load_graph("cora", data_root)
    assert (graph.num_nodes, graph.edges.size(1), graph.classes.unique().numel()) == (2708, 5278, 7)


def test_ogb_data_need_the_package_ogb(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogb.linkproppred", None)
    with pytest.raises(ImportError, match="pip install ogb"):
        load_graph("ogbl-collab")


def test_the_parts_of_an_ogb_split_are_made_disjoint():
    parts = {
        "train": {"edge": torch.tensor([[0, 1], [1, 0], [1, 2]])},
        "valid": {"edge": torch.tensor([[2, 1], [2, 3]]), "edge_neg": torch.tensor([[0, 4], [0, 1]])},
        "test": {"edge": torch.tensor([[3, 4]]), "edge_neg": torch.tensor([[4, 0], [1, 4]])},
    }

    class FakeDataset:
        def __getitem__(self, _):
            return SimpleNamespace(x=torch.ones(5, 2))

        def get_edge_split(self):
            return parts

    graph = from_ogb(FakeDataset(), "ogbl-test")
    official = split_edges(graph, SplitConfig(), 0)
    assert official.train.T.tolist() == [[0, 1], [1, 2]]
    assert official.validation.T.tolist() == [[2, 3]]
    assert official.test.T.tolist() == [[3, 4]]
    assert official.validation_negatives.T.tolist() == [[0, 4]]
    assert official.test_negatives.T.tolist() == [[1, 4]]


def test_csv_and_npz_files_give_the_same_graph(tmp_path):
    edges, x, y = [[0, 1], [2, 1], [0, 3]], np.eye(4), ["a", "b", "a", "b"]
    np.savez(tmp_path / "g.npz", edges=np.array(edges), x=x, y=np.array(y))
    (tmp_path / "e.csv").write_text("source,target\n" + "\n".join(f"{u},{v}" for u, v in edges))
    (tmp_path / "x.csv").write_text("\n".join(",".join(map(str, row)) for row in x))
    (tmp_path / "y.csv").write_text("class\n" + "\n".join(y))
    from_npz = read_graph(tmp_path / "g.npz")
    from_csv = read_graph(tmp_path / "e.csv", tmp_path / "x.csv", tmp_path / "y.csv")
    for graph in (from_npz, from_csv, load_graph(str(tmp_path / "g.npz"))):
        assert graph.edges.tolist() == [[0, 1, 0], [1, 2, 3]]
        assert torch.equal(graph.x, torch.eye(4))
        assert graph.classes.tolist() == [0, 1, 0, 1]


def test_csv_files_of_spreadsheets_are_read(tmp_path):
    """A byte-order mark, Windows line ends, quoted cells, and characters at which `splitlines` splits."""
    np.savetxt(tmp_path / "x.csv", np.eye(3), delimiter=",")
    (tmp_path / "e.csv").write_text('0,1\r\n"2","1"\r\n', encoding="utf-8-sig", newline="")
    (tmp_path / "y.csv").write_text('class\r\n"a,\u2028b"\r\na\x85\r\n"a,\u2028b"\r\n', encoding="utf-8", newline="")
    graph = read_graph(tmp_path / "e.csv", tmp_path / "x.csv", tmp_path / "y.csv", header=False)
    assert graph.edges.tolist() == [[0, 1], [1, 2]]
    assert graph.classes.tolist() == [1, 0, 1] or graph.classes.tolist() == [0, 1, 0]


def test_an_edge_list_may_hold_both_directions_of_every_edge(tmp_path):
    np.savez(tmp_path / "g.npz", edges=np.array([[0, 1], [1, 0], [1, 2], [2, 1]]), x=np.eye(3))
    assert read_graph(tmp_path / "g.npz").edges.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("edges", "y", "message"),
    [
        ([[0, 9]], [0, 1, 0], r"edges must have node ids from 0 to 2, got 1 out of range, the first is \(0, 9\)"),
        ([[0, 1], [2, 2]], [0, 1, 0], r"edges must join two different nodes, got 1 self-loops, the first is \(2, 2\)"),
        ([[0, 1], [1, 2], [1, 0]], [0, 1, 0], "edges must be listed once each, got 1 duplicates"),
        ([[0, 1]], [0, 1], "labels must have 3 rows, one for each node, got 2"),
        ([[0, 1]], [0.0, np.nan, 1.0], "labels must hold a class for each node, got none for 1 nodes, the first is 1"),
        ([[0, 1]], ["a", "", "b"], "labels must hold a class for each node, got none for 1 nodes"),
        ([[0, 1.5]], [0, 1, 0], "edges must hold integer node ids from 0 to 2, got fractions"),
        ([[0, 1, 2]], [0, 1, 0], r"edges must have shape \[edges, 2\], got \(1, 3\)"),
    ],
)
def test_files_with_wrong_content_are_refused(tmp_path, edges, y, message):
    np.savez(tmp_path / "g.npz", edges=np.array(edges), x=np.eye(3), y=np.array(y))
    with pytest.raises(ValueError, match=message):
        read_graph(tmp_path / "g.npz", rules=EdgeRules(duplicates="refuse", self_loops="refuse"))


def test_parquet_files(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pd.DataFrame({"u": [0, 2], "v": [1, 1]}).to_parquet(tmp_path / "e.parquet")
    pd.DataFrame(np.eye(3)).rename(columns=str).to_parquet(tmp_path / "x.parquet")
    pd.DataFrame({"class": ["a", "b", "a"]}).to_parquet(tmp_path / "y.parquet")
    graph = read_graph(tmp_path / "e.parquet", tmp_path / "x.parquet", tmp_path / "y.parquet")
    assert graph.edges.tolist() == [[0, 1], [1, 2]]
    assert graph.classes.tolist() == [0, 1, 0]


def test_parquet_files_need_pandas_and_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    (tmp_path / "e.parquet").touch()
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ImportError, match="pip install pandas pyarrow"):
        read_graph(tmp_path / "e.parquet", tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_graph("Kora"), "name must be one of block-model, .*, or the path of an NPZ file, got 'Kora'"),
        (lambda: SplitConfig(validation=0), "validation and test must be above 0 with a sum below 1, got 0 and 0.1"),
        (lambda: SplitConfig(negatives=0), "negatives must be above 0, got 0"),
        (lambda: block_model(edge_signal=2), "edge_signal must be from 0 to 1, got 2"),
        (lambda: block_model(feature_signal=-1), "feature_signal must be at least 0, got -1"),
        (lambda: block_model(5, 3), "classes must be at least 2 with at least 2 nodes each, got 3 with 5 nodes"),
        (
            lambda: block_model(degree=1e6),
            "degree must be above 0 and small enough for classes of 400 nodes, got 1000000",
        ),
        (lambda: digits(0), "neighbors must be from 1 to 1796, got 0"),
        (lambda: read_graph("x.doc"), "x.doc must be a file with one of the suffixes .csv, .*, .npz, got '.doc'"),
        (lambda: read_graph("x.csv"), "file must exist, got 'x.csv'"),
        (
            lambda: Graph("g", torch.ones(3, 1), torch.tensor([[0], [1]])).classes,
            "y must be the class of each node of g, got None",
        ),
        (
            lambda: Graph("g", torch.ones(3, 1), torch.tensor([[0], [1]]), torch.zeros(2)),
            r"y must have shape \(3,\), one class for each node, got \(2,\)",
        ),
        (
            lambda: Graph("g", torch.ones(3, 1), torch.tensor([[0], [1]]), torch.tensor([0, -1, 1])),
            "y must hold a class of at least 0 for each node, got 1 negative numbers",
        ),
        (
            lambda: Graph("g", torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.tensor([[0], [1]])),
            "x must be finite, got 1 NaN or infinite values, the first one is feature 1 of node 1",
        ),
        (
            lambda: Graph("g", torch.ones(3, 1), torch.zeros(2, 0, dtype=torch.long)),
            r"edges must have shape \[2, edges\] with at least one edge, got \(2, 0\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_part_and_too_few_negatives_are_refused():
    tiny = Graph("g", torch.ones(4, 1), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    with pytest.raises(
        ValueError, match=r"validation must be a fraction that contains at least one of the 3 edges, got 0\.05"
    ):
        split_edges(tiny, SplitConfig(), 0)
    with pytest.raises(ValueError, match=r"count must be at most 3, .*, got 18"):
        split_edges(tiny, SplitConfig(0.34, 0.34, negatives=9), 0)


@pytest.mark.parametrize("with_split", [False, True])
def test_a_saved_graph_is_read_as_it_was(tmp_path, graph, with_split):
    if with_split:
        graph = Graph("own", graph.x, graph.edges, None, split_edges(graph, SplitConfig(), 0))
    file = save_graph(graph, tmp_path)
    assert save_graph(graph, tmp_path) == file
    again = read_saved_graph(tmp_path / file)
    assert again.name == graph.name
    assert torch.equal(again.x, graph.x)
    assert torch.equal(again.edges, graph.edges)
    assert (again.y is None) == (graph.y is None)
    if with_split:
        for name in graph.official_split.__dataclass_fields__:
            assert torch.equal(getattr(again.official_split, name), getattr(graph.official_split, name))
    else:
        assert again.official_split is None


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    tensors, metadata = {"w": weight, "transposed": weight.T}, {"epochs": [1, 2.5], "name": None}
    path = save_checkpoint(tmp_path / "new folder" / "a.safetensors", tensors, metadata)
    read, also_read = load_checkpoint(path)
    assert also_read == metadata
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("read", [load_checkpoint, load_trained, read_saved_graph])
def test_files_of_earlier_versions_are_refused_with_what_to_do(tmp_path, read):
    """A safetensors file whose header has another key: that of another program, or of this one under another name."""
    header = {
        "__metadata__": {"former-name": json.dumps({"model": {"model": "ncn"}, "in": 4, "name": "g"})},
        "model/w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "old.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"old.safetensors must hold 'suffice' in its header, .* write it again"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_and_missing_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="must be a checkpoint in safetensors format"):
        load_checkpoint(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="must be a checkpoint in safetensors format"):
        load_checkpoint(path)
