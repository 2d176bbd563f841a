"""Graphs in files: a user's own tables, and graphs that a study saves in its folder."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suffice.link.data.checkpoint import load_checkpoint, save_checkpoint, select_prefix
from suffice.link.data.edge_rules import EdgeRules, check_range
from suffice.link.data.edge_tables import EdgeList, as_ids, read_edge_list
from suffice.link.data.graph import Graph, Split, order_sides
from suffice.link.data.node_tables import NodeTable, read_classes, read_features
from suffice.link.data.tables import TABLE_SUFFIXES, check_suffix, plain_suffix

MADE_FEATURES = ("degree", "learned")
"""Words for the features of a graph without features."""
GRAPH_SUFFIXES = (*(suffix for suffix in TABLE_SUFFIXES if suffix != ".npy"), ".npz")
"""Suffixes of the files that `read_graph` accepts as edges."""


def read_graph(
    edges: str | Path,
    features: str | Path | None = None,
    labels: str | Path | None = None,
    *,
    name: str | None = None,
    header: bool | None = None,
    ids: bool | None = None,
    rules: EdgeRules | None = None,
    bipartite: bool = False,
) -> Graph:
    """Read a graph from a user's files.

    An edge list is a text file (comma, semicolon, tab or space between cells) or a Parquet file. The nodes of an edge
    are its first two columns, or those with usual names such as `source` and `target`. Text files may have comments, a
    header, the index column of pandas, a byte-order mark and gzip compression. An adjacency matrix in Matrix Market
    format is accepted as well. A rectangular matrix is a bipartite graph: the nodes of its rows come first, then those
    of its columns.

    Nodes have the numbers from 0 to nodes - 1, in the order of the rows of `features`. Or they have other numbers or
    texts as ids, which are then the first column of `features`, and are kept in `Graph.node_ids`. `labels` holds one
    column of classes in the order of the nodes, or ids and classes.

    An NPZ file holds everything in arrays `edges` [edges, 2], `x` [nodes, features] and, optionally, `y` [nodes].

    Args:
        edges: edge list, adjacency matrix, or an NPZ file with everything.
        features: file with the features of each node; needed unless `edges` is an NPZ file. `degree` or `learned` for a
            graph without features (see `Graph`), whose nodes are those of the edges, in the order of their ids.
        labels: file with the class of each node; without it, the alignment with classes cannot be measured.
        name: name of the graph, shown in tables; by default the name of the edge list without its suffix.
        header: whether the first line is a header if it may be one. `0,1` may be an edge, or the header that pandas
            writes by default. None refuses such a file.
        ids: whether the first column of features and labels holds the ids of nodes. None finds out by its name, or
            because its cells are texts, and refuses a file in which neither tells.
        rules: what becomes of duplicate edges, self-loops and weights; by default, `EdgeRules()`.
        bipartite: whether the first nodes of all edges are one side of a bipartite graph, and the second nodes the
            other. Negatives then join a node of each side. A rectangular matrix is bipartite anyway.

    Raises:
        ImportError: the packages pandas and pyarrow are missing, which a Parquet file needs.
        ValueError: a file has another suffix, wrong content or an unclear header; ids do not fit; an edge is refused by
            the rules; features are not finite; or classes are missing.

    """
    path, rules = Path(edges), rules or EdgeRules()
    if check_suffix(path, GRAPH_SUFFIXES) == ".npz":
        pairs, nodes, y = _read_npz(path)
        edge_list, classes = EdgeList(as_ids(pairs, path)), None if y is None else NodeTable(y)
    else:
        if features is None:
            raise ValueError(
                f"features must be a file with a row for each node of {path}, or 'degree' or 'learned' for a graph "
                f"without features, got None"
            )
        if features in MADE_FEATURES:
            edge_list = read_edge_list(path, header=header)
            nodes = _nodes_of_edges(edge_list)
        else:
            nodes = read_features(Path(features), header=header, ids=ids)
            edge_list = read_edge_list(path, header=header, known_ids=nodes.ids)
        classes = None if labels is None else read_classes(Path(labels), len(nodes.values), ids=ids)
    x = _check_features(nodes.values)
    rules.check_weights(edge_list.values)
    if edge_list.num_nodes not in (None, len(x)):
        raise ValueError(f"features must have {edge_list.num_nodes} rows, one for each node, got {len(x)}")
    if edge_list.num_nodes is not None:
        _check_order(nodes.ids, path)
    numbered = edge_list.pairs
    if nodes.ids is not None and edge_list.num_nodes is None:
        numbered = _find_rows(edge_list.pairs, nodes.ids, path)
    if numbered.dtype.kind == "U":
        raise ValueError(
            f"features must have the ids of the nodes as their first column if {path} holds texts, got no ids"
        )
    edge_tensor = torch.from_numpy(numbered).T.contiguous()
    check_range(edge_tensor, len(x))
    graph = Graph(
        name or path.name.removesuffix(".gz").removesuffix(plain_suffix(path)),
        torch.from_numpy(x),
        rules.apply(edge_tensor, len(x)),
        None if classes is None else _number_classes(classes, nodes.ids, len(x)),
        node_ids=nodes.ids,
        features=str(features) if features in MADE_FEATURES else "given",
        num_left=edge_list.num_left,
    )
    if edge_list.num_left is not None:
        return graph
    if not bipartite:
        return graph
    remedy = (
        "Put a letter before the ids of one side"
        if edge_list.num_nodes is None
        else "A square matrix joins its own nodes; write a matrix of two sides as an edge list with two kinds of ids"
    )
    return order_sides(graph, _find_left(edge_tensor, len(x), nodes.ids, path, remedy))


def save_graph(graph: Graph, folder: str | Path) -> str:
    """Write a graph to a file that is named by a digest of its content; an existing file is kept.

    Worker processes of a study read graphs from these files.

    Args:
        graph: the graph.
        folder: folder of the study.

    Returns:
        The path of the file, relative to the folder.

    """
    tensors: dict[str, Tensor] = {"x": graph.x, "edges": graph.edges}
    if graph.y is not None:
        tensors["y"] = graph.y
    if graph.official_split is not None:
        tensors |= {f"official/{name}": getattr(graph.official_split, name) for name in Split.__dataclass_fields__}
    about = {"name": graph.name}
    if graph.features != "given" or graph.num_left is not None:
        about |= {"features": graph.features, "num_left": graph.num_left}
    digest = hashlib.sha256("".join(map(str, about.values())).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    stem = "".join(c if c.isalnum() else "-" for c in graph.name)
    file = f"inputs/{stem}-{digest.hexdigest()[:12]}.safetensors"
    if not (Path(folder) / file).exists():
        save_checkpoint(Path(folder) / file, tensors, about)
    return file


@lru_cache(maxsize=2)
def read_saved_graph(path: Path) -> Graph:
    """Read a graph that `save_graph` wrote; the last graphs are cached, because the runs of a study share them.

    Raises:
        CheckpointError: the file is missing or damaged, or another program or an earlier version wrote it.

    """
    tensors, metadata = load_checkpoint(path)
    split = select_prefix(tensors, "official")
    official_split = Split(**split) if split else None
    made = {name: metadata[name] for name in ("features", "num_left") if name in metadata}
    return Graph(str(metadata["name"]), tensors["x"], tensors["edges"], tensors.get("y"), official_split, **made)


def _read_npz(path: Path) -> tuple[NDArray[Any], NodeTable, NDArray[Any] | None]:
    with np.load(path, allow_pickle=False) as arrays:
        if missing := {"edges", "x"} - set(arrays.files):
            raise ValueError(
                f"{path} must hold arrays edges, x and, optionally, y, got {arrays.files} without {sorted(missing)}"
            )
        pairs, x = arrays["edges"], arrays["x"]
        y = arrays["y"] if "y" in arrays.files else None
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"edges must have shape [edges, 2], got {pairs.shape}")
    if x.ndim != 2:
        raise ValueError(f"features must have shape [nodes, features], got {x.shape}")
    if pairs.dtype.kind == "f" and not np.equal(np.mod(pairs, 1), 0).all():
        raise ValueError(f"edges must hold integer node ids from 0 to {len(x) - 1}, got fractions")
    return pairs, NodeTable(x), y


def _nodes_of_edges(edges: EdgeList) -> NodeTable:
    """Return the nodes of a graph without features, with a column of zeros."""
    if edges.num_nodes is not None:
        return NodeTable(np.zeros((edges.num_nodes, 1)))
    ids = np.unique(edges.pairs)
    is_count = ids.dtype.kind == "i" and np.array_equal(ids, np.arange(len(ids)))
    return NodeTable(np.zeros((len(ids), 1)), None if is_count else ids)


def _check_order(ids: NDArray[Any] | None, path: Path) -> None:
    """Raise if the ids of features may not be in the order of the rows of a matrix."""
    if ids is not None and ids.dtype.kind == "i" and (ids[1:] <= ids[:-1]).any():
        first = int((ids[1:] <= ids[:-1]).argmax())
        raise ValueError(
            f"features must be in the order of the rows of {path}, got id {ids[first + 1]} behind id {ids[first]}. "
            f"Sort the features, or write the matrix as an edge list of ids"
        )


def _find_left(edges: Tensor, num_nodes: int, ids: NDArray[Any] | None, path: Path, remedy: str) -> Tensor:
    """Return which nodes are on the first side, bool [nodes]; nodes without an edge are on the second side."""
    is_first, is_second = torch.zeros(2, num_nodes, dtype=torch.bool)
    is_first[edges[0]] = True
    is_second[edges[1]] = True
    if bool((is_first & is_second).any()):
        node = int((is_first & is_second).nonzero()[0])
        shown = node if ids is None else ids[node]
        raise ValueError(
            f"{path} must have the ids of one side in its first column and those of the other side in its second if "
            f"bipartite is True, got {int((is_first & is_second).sum())} ids in both, the first is {shown}. {remedy}"
        )
    return is_first


def _check_features(x: NDArray[Any]) -> NDArray[np.float32]:
    is_wrong = ~np.isfinite(x.astype(np.float64))
    if is_wrong.any():
        row, column = (int(index) for index in np.argwhere(is_wrong)[0])
        raise ValueError(
            f"features must be finite, got {int(is_wrong.sum())} NaN or infinite values, the first one is feature "
            f"{column} of node {row}"
        )
    return x.astype(np.float32)


def _find_rows(wanted: NDArray[Any], ids: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Return the position of each wanted id within ids, in the shape of `wanted`."""
    if wanted.dtype.kind != ids.dtype.kind:
        wanted, ids = wanted.astype(str), ids.astype(str)
    order = ids.argsort(kind="stable")
    index = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    is_unknown = ids[index] != wanted
    if is_unknown.any():
        raise ValueError(
            f"{path} must hold ids that the features have too, got {len(np.unique(wanted[is_unknown]))} other ids, the "
            f"first is {wanted[is_unknown][0]}"
        )
    return index.astype(np.int64)


def _number_classes(table: NodeTable, ids: NDArray[Any] | None, num_nodes: int) -> Tensor:
    """Return the number of the class of each node, long [nodes], in the order of the nodes."""
    y = table.values
    if len(y) != num_nodes:
        raise ValueError(f"labels must have {num_nodes} rows, one for each node, got {len(y)}")
    if table.ids is not None:
        known = np.arange(num_nodes) if ids is None else ids
        ordered = np.empty_like(y)
        ordered[_find_rows(table.ids, known, Path("labels"))] = y
        y = ordered
    is_missing = _is_missing(y)
    if is_missing.any():
        raise ValueError(
            f"labels must hold a class for each node, got none for {int(is_missing.sum())} nodes, "
            f"the first is {int(is_missing.argmax())}. A negative number, an empty cell and NaN stand for no class"
        )
    if y.dtype.kind == "f" and (y % 1 != 0).any():
        raise ValueError(f"labels must be classes, got a fraction for node {int((y % 1 != 0).argmax())}")
    return torch.from_numpy(np.unique(y, return_inverse=True)[1]).long()


def _is_missing(y: NDArray[Any]) -> NDArray[np.bool_]:
    if y.dtype.kind == "f":
        return np.isnan(y) | (y < 0)
    if y.dtype.kind in "iu":
        return y < 0
    return np.array([str(value) in ("", "nan", "NaN", "None") for value in y.tolist()], dtype=bool)
