"""Graphs by name: built-in graphs, data sets of PyG and OGB, or a user's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.datasets import Amazon, Coauthor, Planetoid

from suffice.link.data.files import read_graph
from suffice.link.data.graph import Graph, Split
from suffice.link.data.names import OGB_NAMES, check_dataset_name
from suffice.link.data.synthetic import block_model, digits
from suffice.link.sparse.adjacency import remove_edges

_BUILT_IN = {"block-model": block_model, "digits": digits}
_PYG = {  # class and folder of each data set
    "Cora": (Planetoid, "planetoid"),
    "CiteSeer": (Planetoid, "planetoid"),
    "PubMed": (Planetoid, "planetoid"),
    "CS": (Coauthor, "coauthor"),
    "Physics": (Coauthor, "coauthor"),
    "Computers": (Amazon, "amazon"),
    "Photo": (Amazon, "amazon"),
}


def load_graph(name: str, root: str | Path = "data") -> Graph:
    """Return a graph by name, or from a user's NPZ file.

    Args:
        name: one of `DATASET_NAMES` in any case, or the path of an NPZ file (see `suffice.link.data.files.read_graph`).
        root: folder of downloaded data sets, in PyG's layout; PyG downloads what is missing. Built-in graphs need none.

    Raises:
        ImportError: the package ogb is missing, which an OGB data set needs.
        ValueError: there is no such data set.

    """
    if Path(name).suffix == ".npz":
        return read_graph(name)
    key = check_dataset_name("name", name, "the path of an NPZ file")
    if key in _BUILT_IN:
        return _BUILT_IN[key]()
    if key in OGB_NAMES:
        return _load_ogb(key, root)
    dataset_class, folder = _PYG[key]
    dataset = dataset_class(str(Path(root) / folder), key)
    return Graph.from_data(dataset[0], key)  # pyright: ignore[reportArgumentType]


def _load_ogb(name: str, root: str | Path) -> Graph:
    try:
        from ogb.linkproppred import PygLinkPropPredDataset
    except ImportError as error:
        raise ImportError(f"{name} needs the package ogb: pip install ogb") from error
    return from_ogb(PygLinkPropPredDataset(name, root=str(root)), name)


def from_ogb(dataset: Any, name: str) -> Graph:
    """Make a graph from an OGB link data set, with its official split.

    Duplicate edges of a part are merged. An edge of an earlier part is removed from the later ones, so that no edge is
    used for message passing and also scored.

    Args:
        dataset: an `ogb.linkproppred.PygLinkPropPredDataset`.
        name: name of the graph, shown in tables.

    """
    data, parts = dataset[0], dataset.get_edge_split()
    num_nodes = data.x.size(0)

    def unique_pairs(part: str, kind: str) -> Tensor:
        edges = parts[part][kind].T
        edges = edges[:, edges[0] != edges[1]]
        return torch.unique(torch.stack([edges.min(dim=0).values, edges.max(dim=0).values]), dim=1)

    def without(pairs: Tensor, *others: Tensor) -> Tensor:
        remaining = remove_edges(pairs, torch.cat(others, dim=1), num_nodes)
        assert isinstance(remaining, Tensor)
        return remaining

    train = unique_pairs("train", "edge")
    validation = without(unique_pairs("valid", "edge"), train)
    test = without(unique_pairs("test", "edge"), train, validation)
    positives = torch.cat([train, validation, test], dim=1)
    validation_negatives = without(unique_pairs("valid", "edge_neg"), positives)
    test_negatives = without(unique_pairs("test", "edge_neg"), positives, validation_negatives)
    split = Split(train, validation, test, validation_negatives, test_negatives)
    return Graph(name, data.x.float(), positives, None, split)
