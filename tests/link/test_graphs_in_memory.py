"""Graphs of NetworkX, DGL, OGB and PyG in memory give the same graph, and what cannot be read is refused by name."""

from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import ToSparseTensor
from torch_geometric.utils import from_networkx as pyg_from_networkx

from suffice.link.data.convert import from_dgl, from_networkx, from_ogb_dict
from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.graph import Graph

EDGES = torch.tensor([[2, 1, 3, 1, 3, 2], [0, 2, 1, 1, 1, 1]])  # a self-loop, a duplicate, an edge in both directions
EXPECTED = [[0, 2], [1, 2], [1, 3]]
X = torch.tensor([[0.5, 1.0], [1.5, 0.0], [2.5, 3.0], [0.25, 1.0]])
Y = torch.tensor([1, 0, 1, 0])


class FakeDGL:
    """What `from_dgl` uses of a `dgl.DGLGraph`."""

    ntypes, etypes = ["_N"], ["_E"]

    def __init__(self, edges=EDGES, count=4, edata=None, **ndata):
        self._edges, self._count, self.edata = edges, count, edata or {}
        self.ndata = ndata or {"feat": X, "label": Y, "train_mask": Y > 0}

    def edges(self):
        return self._edges[0], self._edges[1]

    def num_nodes(self):
        return self._count


def make_networkx(**attributes):
    graph = nx.MultiDiGraph()
    for node in range(4):
        graph.add_node(node, x=X[node].tolist(), y=int(Y[node]))
    graph.add_edges_from(EDGES.T.tolist(), **attributes)
    return graph


def ogb(**changed):
    return {"edge_index": EDGES.numpy(), "node_feat": X.numpy(), "edge_feat": None, "num_nodes": 4, **changed}


MAKERS = {
    "networkx": lambda rules: from_networkx(make_networkx(), "g", features=["x"], label="y", rules=rules),
    "dgl": lambda rules: from_dgl(FakeDGL(), "g", label="label", rules=rules),
    "dgl int32": lambda rules: from_dgl(FakeDGL(EDGES.int()), "g", label="label", rules=rules),
    "ogb": lambda rules: from_ogb_dict(ogb(), "g", labels=Y[:, None].numpy(), rules=rules),
    "data": lambda rules: Graph.from_data(Data(x=X, edge_index=EDGES, y=Y), "g", rules=rules),
    "data int32": lambda rules: Graph.from_data(Data(x=X, edge_index=EDGES.int(), y=Y), "g", rules=rules),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_all_libraries_give_the_same_graph_under_the_same_rules(maker):
    graph = MAKERS[maker](None)
    assert graph.edges.T.tolist() == EXPECTED
    assert graph.edges.dtype == torch.long
    assert torch.equal(graph.x, X)
    assert torch.equal(graph.classes, Y)
    with pytest.raises(ValueError, match="edges must be listed once each, got 2 duplicates"):
        MAKERS[maker](EdgeRules(duplicates="refuse"))
    with pytest.raises(ValueError, match="edges must join two different nodes, got 1 self-loops"):
        MAKERS[maker](EdgeRules(self_loops="refuse"))


WEIGHTED = {
    "networkx": (lambda rules: from_networkx(make_networkx(w=2.0), "g", rules=rules), "got w"),
    "dgl": (lambda rules: from_dgl(FakeDGL(edata={"w": Y, "_ID": Y}), "g", rules=rules), "got w"),
    "ogb": (lambda rules: from_ogb_dict(ogb(edge_weight=np.ones(6)), "g", rules=rules), "got edge_weight"),
    "data": (lambda rules: Graph.from_data(Data(X, EDGES, edge_attr=torch.ones(6)), "g", rules=rules), "got edge_attr"),
}


@pytest.mark.parametrize("maker", WEIGHTED)
def test_weights_are_dropped_or_refused(maker):
    make, found = WEIGHTED[maker]
    assert make(None).edges.T.tolist() == EXPECTED
    with pytest.raises(ValueError, match=f"edges must have no weights or other values, {found}\\. "):
        make(EdgeRules(weights="refuse"))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_edges_are_those_of_an_undirected_graph_of_networkx(pairs):
    directed = nx.MultiDiGraph(pairs)
    nodes = list(directed)
    expected = nx.Graph(directed)
    expected.remove_edges_from(list(nx.selfloop_edges(expected)))
    data = pyg_from_networkx(directed)
    makers = (
        lambda: from_networkx(directed, "g"),
        lambda: from_dgl(FakeDGL(data.edge_index, len(nodes)), "g", features="degree"),
        lambda: from_ogb_dict({"edge_index": data.edge_index.numpy(), "num_nodes": len(nodes)}, "g", features="degree"),
        lambda: Graph.from_data(data, "g", features="degree"),
    )
    for make in makers:
        if not expected.number_of_edges():
            with pytest.raises(ValueError, match="edges must hold at least one edge between two different nodes"):
                make()
            continue
        found = nx.Graph([(nodes[u], nodes[v]) for u, v in make().edges.T.tolist()])
        assert nx.utils.edges_equal(found.edges, expected.edges)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # of Torch, about PyG's use of it
def test_data_with_a_sparse_adjacency():
    sparse = ToSparseTensor()(Data(x=X, edge_index=EDGES, y=Y))
    assert sparse.edge_index is None
    graph = Graph.from_data(sparse, "g", rules=EdgeRules(weights="refuse"))
    assert graph.edges.T.tolist() == EXPECTED
    weighted = Data(x=X, adj_t=(torch.ones(4, 4) * 2).to_sparse_csr())
    with pytest.raises(ValueError, match="edges must have no weights or other values, got values of adj_t"):
        Graph.from_data(weighted, "g", rules=EdgeRules(weights="refuse"))


def test_features_of_dgl():
    names = FakeDGL(feat=X, age=torch.arange(4))
    assert torch.equal(from_dgl(names, "g", features=["age", "feat"]).x, torch.cat([torch.arange(4.0)[:, None], X], 1))
    assert from_dgl(names, "g", features="learned").num_features == 4


class Hetero(FakeDGL):
    ntypes, etypes = ["user", "item"], ["buys", "likes"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: from_networkx(EDGES, "g"), TypeError, "graph must be a graph of NetworkX, got Tensor"),
        (
            lambda: from_networkx(make_networkx(), "g", features="x"),
            ValueError,
            "features must be degree, learned or a list of names, got 'x'",
        ),
        (lambda: from_networkx(make_networkx(), "g", features=[]), ValueError, r"a list of names, got \[\]"),
        (
            lambda: from_networkx(nx.Graph({0: [1]}), "g", features=["x"]),
            ValueError,
            "nodes must all have the attribute 'x', got none for node 0",
        ),
        (lambda: from_dgl(make_networkx(), "g"), TypeError, "graph must be a graph of DGL, .*, got MultiDiGraph"),
        (lambda: from_dgl(Hetero(), "g"), ValueError, "got user, item with buys, likes. dgl.to_homogeneous"),
        (
            lambda: from_dgl(FakeDGL(), "g", features=["x"]),
            ValueError,
            r"among the data of the nodes \(feat, label, train_mask\), got 'x'",
        ),
        (lambda: from_dgl(FakeDGL(), "g", label="y"), ValueError, r"label must be among .*, got 'y'"),
        (lambda: from_dgl(FakeDGL(feat=X * 1j), "g"), ValueError, "'feat' must hold real numbers, got complex64"),
        (lambda: from_dgl(FakeDGL(EDGES / 2), "g"), TypeError, "edges must hold integer node ids, got torch.float32"),
        (lambda: from_dgl(FakeDGL(EDGES + 9), "g"), ValueError, "edges must have node ids from 0 to 3, got 6 out of"),
        (lambda: from_dgl(FakeDGL(feat=X, label=Y - 1), "g", label="label"), ValueError, "got 2 negative numbers"),
        (lambda: from_dgl(FakeDGL(feat=X, label=Y / 2), "g", label="label"), ValueError, "got NaN or fractions"),
        (lambda: from_dgl(FakeDGL(feat=X, label=X), "g", label="label"), ValueError, "one class for each of 4 nodes"),
        (lambda: from_ogb_dict((ogb(), Y), "g"), TypeError, "graph must be a dictionary, got tuple. Of a pair of OGB"),
        (lambda: from_ogb_dict(ogb(num_nodes=5), "g"), ValueError, "'node_feat' must have 5 rows, one for each node"),
        (lambda: from_ogb_dict(ogb(node_feat=np.array(list("abcd"))), "g"), ValueError, "real numbers, got <U1 such"),
        (
            lambda: from_ogb_dict(ogb(edge_index=EDGES.numpy() + 0.5), "g"),
            TypeError,
            "integer node ids, got torch.float",
        ),
        (lambda: from_ogb_dict(ogb(edge_index=EDGES.T.numpy()), "g"), ValueError, r"shape \[2, edges\]"),
        (lambda: from_ogb_dict(ogb(), "g", labels=Y[:3]), ValueError, "'labels' must have 4 rows"),
        (lambda: from_ogb_dict(ogb(), "g", labels=[None] * 4), ValueError, "'labels' must hold numbers or texts"),
        (lambda: from_ogb_dict(ogb(edge_index=None), "g"), TypeError, r"graph\['edge_index'\] must .*, got object"),
        (lambda: from_ogb_dict(ogb(num_nodes=4.5), "g"), TypeError, r"graph\['num_nodes'\] must be an int, .*4.5"),
        (lambda: from_ogb_dict(ogb(), "g", rules="drop"), TypeError, "rules must be an EdgeRules, .*, got 'drop'"),
        (lambda: from_dgl(FakeDGL(), "g", features=3), ValueError, "features must be degree, .*, got 3"),
        (
            lambda: from_dgl(FakeDGL([EDGES[0], EDGES[1, :2]]), "g"),
            ValueError,
            r"a target for each source in edges\(\), got shapes \(6,\) and \(2,\)",
        ),
        (
            lambda: Graph.from_data(Data(X, EDGES.numpy()), "g"),
            TypeError,
            "edge_index of g must be a tensor, got ndarray",
        ),
        (lambda: Graph.from_data(Data(X.numpy(), EDGES), "g"), TypeError, "x of g must be a tensor, got ndarray"),
        (lambda: Graph.from_data(Data(X, EDGES / 2), "g"), TypeError, "integer node ids, got torch.float32"),
        (
            lambda: Graph.from_data(Data(X, EDGES, num_nodes=9), "g"),
            ValueError,
            "x must have num_nodes=9 rows, .*, got 4",
        ),
        (
            lambda: Graph.from_data(Data(X, EDGES, y=Y / 2), "g"),
            ValueError,
            "y must hold the class of each node, got frac",
        ),
        (lambda: Graph.from_data(SimpleNamespace(x=X), "g"), TypeError, "data must be a torch_geometric.data.Data"),
    ],
)
def test_wrong_graphs_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("convert", [Tensor.bfloat16, Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.double])
def test_features_of_any_type_and_layout_are_read(convert):
    found = from_dgl(FakeDGL(feat=convert(X)), "g")
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, X)  # these numbers are exact in bfloat16
