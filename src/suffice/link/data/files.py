"""Graphs in files: a user's own tables, and graphs that a study saves in its folder."""

from __future__ import annotations

import csv
import hashlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suffice.files import read_text
from suffice.link.data.checkpoint import load_checkpoint, save_checkpoint, select_prefix
from suffice.link.data.graph import Graph, Split, check_edges

_SUFFIXES = (".csv", ".parquet", ".npz")


def read_graph(
    edges: str | Path,
    features: str | Path | None = None,
    labels: str | Path | None = None,
    *,
    name: str | None = None,
) -> Graph:
    """Read a graph from a user's files.

    In CSV and Parquet files, the first two columns of `edges` are the node ids of each edge, from 0 to nodes - 1;
    `features` has a row for each node, and `labels` has one column with the class of each node, both in the order of
    the node ids. An NPZ file holds everything in arrays `edges` [edges, 2], `x` [nodes, features] and, optionally,
    `y` [nodes]. The edges are listed once each, or all of them in both directions.

    Args:
        edges: edge list, or an NPZ file with everything.
        features: features; needed unless `edges` is an NPZ file.
        labels: classes; without them, the alignment with classes cannot be measured.
        name: name of the graph, shown in tables; by default the name of the edge list without its suffix.

    Raises:
        ImportError: the packages pandas and pyarrow are missing, which a Parquet file needs.
        ValueError: a file has another suffix or wrong content, node ids are out of range, there are self-loops or
            duplicates, or classes are missing.

    """
    path = Path(edges)
    if _check_suffix(path) == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if missing := {"edges", "x"} - set(arrays.files):
                raise ValueError(
                    f"{path} must hold arrays edges, x and, optionally, y, got {arrays.files} without {sorted(missing)}"
                )
            pairs, x = arrays["edges"], arrays["x"]
            y = arrays["y"] if "y" in arrays.files else None
    else:
        if features is None:
            raise ValueError(f"features must be a file with a row for each node of {path}, got None")
        pairs, x = _read_table(path)[:, :2], _read_table(Path(features))
        y = None if labels is None else _read_table(Path(labels))[:, 0]
    return _graph_from_arrays(name or path.stem, pairs, x, y)


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
    digest = hashlib.sha256(graph.name.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    stem = "".join(c if c.isalnum() else "-" for c in graph.name)
    file = f"inputs/{stem}-{digest.hexdigest()[:12]}.safetensors"
    if not (Path(folder) / file).exists():
        save_checkpoint(Path(folder) / file, tensors, {"name": graph.name})
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
    return Graph(str(metadata["name"]), tensors["x"], tensors["edges"], tensors.get("y"), official_split)


def _graph_from_arrays(name: str, pairs: NDArray[Any], x: NDArray[Any], y: NDArray[Any] | None) -> Graph:
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"edges must have shape [edges, 2], got {pairs.shape}")
    if x.ndim != 2:
        raise ValueError(f"features must have shape [nodes, features], got {x.shape}")
    is_finite = np.isfinite(x.astype(np.float64))
    if not is_finite.all():
        raise ValueError(f"features must be finite, got {int((~is_finite).sum())} NaN or infinite values")
    if not np.equal(np.mod(pairs, 1), 0).all():
        raise ValueError(f"edges must hold integer node ids from 0 to {len(x) - 1}, got fractions")
    edges = torch.from_numpy(pairs.astype(np.int64)).T.contiguous()
    classes = None
    if y is not None:
        if len(y) != len(x):
            raise ValueError(f"labels must have {len(x)} rows, one for each node, got {len(y)}")
        is_missing = _is_missing(y)
        if is_missing.any():
            raise ValueError(
                f"labels must hold a class for each node, got none for {int(is_missing.sum())} nodes, "
                f"the first is {int(is_missing.argmax())}"
            )
        classes = torch.from_numpy(np.unique(y, return_inverse=True)[1]).long()
    return Graph(name, torch.from_numpy(x.astype(np.float32)), _unique_undirected_edges(edges, len(x)), classes)


def _unique_undirected_edges(edges: Tensor, num_nodes: int) -> Tensor:
    """Return each undirected edge once, the smaller node id first; the list may hold both directions of all edges."""
    forward, backward = edges[:, edges[0] < edges[1]], edges[:, edges[0] > edges[1]].flip(0)
    are_halves = forward.size(1) == backward.size(1) == edges.size(1) / 2
    if are_halves and torch.equal(torch.unique(forward, dim=1), torch.unique(backward, dim=1)):
        return forward
    check_edges(edges, num_nodes)
    return torch.stack([edges.min(dim=0).values, edges.max(dim=0).values])


def _is_missing(y: NDArray[Any]) -> NDArray[np.bool_]:
    if y.dtype.kind in "fc":
        return np.isnan(y)
    if y.dtype.kind in "iu":
        return y < 0
    return np.array([value is None or value != value or value == "" for value in y.tolist()], dtype=bool)


def _read_table(path: Path) -> NDArray[Any]:
    if _check_suffix(path) == ".npz":
        raise ValueError(
            f"features and labels must be CSV or Parquet files, got {str(path)!r}. An NPZ file is read only as edges"
        )
    if path.suffix == ".parquet":
        try:
            import pandas as pd

            table = pd.read_parquet(path).to_numpy()
        except ImportError as error:
            raise ImportError(f"{path} needs the packages pandas and pyarrow: pip install pandas pyarrow") from error
    else:
        table = _read_csv(path)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{path} must hold a table with at least one row and column, got shape {table.shape}")
    return table


def _read_csv(path: Path) -> NDArray[Any]:
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path, "table"), newline="")) if row]
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV file, got one that cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path} must hold a table, got an empty file")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{path} must have comma-separated rows of one length, got several lengths")
    table = np.array([[cell.strip() for cell in row] for row in rows])
    for start in (0, 1):  # a first line that is not numeric is a header
        try:
            return table[start:].astype(np.float64)
        except ValueError:
            continue
    if table.shape[1] == 1:
        return table[1:].astype(object)
    raise ValueError(f"{path} must hold numbers below at most one header line, got other cells")


def _check_suffix(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} must be a file with one of the suffixes {', '.join(_SUFFIXES)}, got {path.suffix!r}")
    if not path.exists():
        raise ValueError(f"file must exist, got {str(path)!r}")
    return path.suffix
