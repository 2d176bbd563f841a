"""Node features and message-passing edges in the format that a model processes fastest."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from suffice.link.data.graph import Graph, Split
from suffice.link.models.base import LinkPredictor
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.propagation import is_mostly_zero

_LARGE_GRAPH_EDGES = 50_000  # both directions counted


def node_features(graph: Graph, model: nn.Module) -> Tensor:
    """Return the node features, [nodes, features]: sparse (CSR) if the first layer of the model is then faster."""
    if getattr(getattr(model, "encoder", None), "accepts_sparse_features", False) and is_mostly_zero(graph.x):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta state.*")
            return graph.x.to_sparse_csr()
    return graph.x


def message_edges(model: nn.Module, split: Split, num_nodes: int, *, validation: bool = False) -> Tensor | Adjacency:
    """Return the edges over which a model passes messages.

    An `Adjacency` (compressed sparse rows) is returned for models that compare neighborhoods. On large graphs it is
    returned for all models of this package, because propagation over it takes a fraction of the time of PyG's.

    Args:
        model: the model that uses the edges.
        split: edges of the graph.
        num_nodes: number of nodes.
        validation: whether to include the validation edges.

    """
    edge_index = split.message_edges(validation=validation)
    is_large = isinstance(model, LinkPredictor) and edge_index.size(1) > _LARGE_GRAPH_EDGES
    if is_large or getattr(model, "uses_adjacency", False):
        return Adjacency(edge_index, num_nodes)
    return edge_index
