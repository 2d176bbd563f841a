"""Node features and message-passing edges in the format that a model processes fastest."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from suffice.link.data.graph import Graph, Split
from suffice.link.models.base import LinkPredictor
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.propagation import is_mostly_zero

_LARGE_GRAPH_EDGES = 50_000  # both directions counted


def node_features(graph: Graph, model: nn.Module, split: Split) -> Tensor:
    """Return the features that a model gets, [nodes, features]: sparse (CSR) if its first layer is then faster.

    Args:
        graph: graph with features, or with the way to make them (see `Graph.features`).
        model: model that gets them.
        split: edges of the graph. Degrees count its training edges only, so that they tell nothing about the others.

    Raises:
        ValueError: the features are learned, and the model has no encoder with embeddings of single nodes.

    """
    accepts_sparse = getattr(getattr(model, "encoder", None), "accepts_sparse_features", False)
    if graph.features == "degree":
        return split.train.flatten().bincount(minlength=graph.num_nodes).float().log1p()[:, None]
    if graph.features == "learned":
        if not accepts_sparse:
            raise ValueError(
                f"features must be 'degree' or given for {type(model).__name__}, whose first layer does not embed "
                f"single nodes, got 'learned'"
            )
        return _sparse_identity(graph.num_nodes)
    if accepts_sparse and is_mostly_zero(graph.x):
        with _without_beta_warning():
            return graph.x.to_sparse_csr()
    return graph.x


def _sparse_identity(size: int) -> Tensor:
    """Return the unit matrix (CSR). Its product with the weights of a first layer is an embedding of each node."""
    with _without_beta_warning():
        rows, columns = torch.arange(size + 1), torch.arange(size)
        return torch.sparse_csr_tensor(rows, columns, torch.ones(size), (size, size), check_invariants=True)


@contextmanager
def _without_beta_warning() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta state.*")
        yield


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
