"""Graphs by name: built in, through PyG, through OGB, or from a user's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch_geometric.datasets import Amazon, Coauthor, Planetoid

from suffice.link.data.files import read_graph
from suffice.link.data.graph import Graph, Split
from suffice.link.data.synthetic import block_model, digits

_BUILT_IN = {"block-model": block_model, "digits": digits}
_PYG = {
    "Cora": (Planetoid, "planetoid"),
    "CiteSeer": (Planetoid, "planetoid"),
    "PubMed": (Planetoid, "planetoid"),
    "CS": (Coauthor, "coauthor"),
    "Physics": (Coauthor, "coauthor"),
    "Computers": (Amazon, "amazon"),
    "Photo": (Amazon, "amazon"),
}
_OGB = ("ogbl-collab", "ogbl-ppa")
NAMES = (*_BUILT_IN, *_PYG, *_OGB)


def load_graph(name: str, root: str | Path = "data") -> Graph:
    """Return a graph by its name, or from a user's CSV, Parquet or NPZ file.

    Args:
        name: one of `NAMES`, or the path of an NPZ file (see `suffice.link.data.files.read_graph`).
        root: folder of downloaded data sets, in PyG's layout; nothing is read there for built-in graphs.

    Raises:
        ImportError: an OGB data set is asked for without ogb.
        ValueError: there is no such data set.

    """
    known = {key.lower(): key for key in NAMES}
    if name.lower() not in known:
        if Path(name).suffix == ".npz":
            return read_graph(name)
        raise ValueError(f"name is {name!r}; accepted: {', '.join(NAMES)}, or the path of an NPZ file")
    key = known[name.lower()]
    if key in _BUILT_IN:
        return _BUILT_IN[key]()
    if key in _OGB:
        return _load_ogb(key, root)
    kind, folder = _PYG[key]
    return Graph.from_data(kind(str(Path(root) / folder), key)[0], key)  # pyright: ignore[reportArgumentType]


def _load_ogb(name: str, root: str | Path) -> Graph:
    try:
        from ogb.linkproppred import PygLinkPropPredDataset
    except ImportError as error:
        raise ImportError(f"{name} needs the package ogb: pip install ogb") from error
    return from_ogb(PygLinkPropPredDataset(name, root=str(root)), name)


def from_ogb(dataset: Any, name: str) -> Graph:
    """Make a graph of an OGB link data set, with its official split.

    Repeated edges of a part count once, and an edge of an earlier part is left out of the later ones: the
    same pair can't be both a message and a target.

    Args:
        dataset: what `ogb.linkproppred.PygLinkPropPredDataset` returns.
        name: name in tables.

    """
    data, parts = dataset[0], dataset.get_edge_split()

    def pairs(part: str, kind: str) -> torch.Tensor:
        edges = parts[part][kind].T
        edges = edges[:, edges[0] != edges[1]]
        ends = torch.stack([edges.min(dim=0).values, edges.max(dim=0).values])
        return torch.unique(ends, dim=1)

    train = pairs("train", "edge")
    validation = _without(pairs("valid", "edge"), train)
    test = _without(pairs("test", "edge"), torch.cat([train, validation], dim=1))
    positives = torch.cat([train, validation, test], dim=1)
    validation_negatives = _without(pairs("valid", "edge_neg"), positives)
    test_negatives = _without(pairs("test", "edge_neg"), torch.cat([positives, validation_negatives], dim=1))
    split = Split(train, validation, test, validation_negatives, test_negatives)
    return Graph(name, data.x.float(), positives, None, split)


def _without(edges: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    base = int(max(edges.max(), taken.max())) + 1
    return edges[:, ~torch.isin(edges[0] * base + edges[1], taken[0] * base + taken[1])]
