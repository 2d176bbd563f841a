"""A user's own graph: an edge list, features and labels in CSV, Parquet or NPZ files."""

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
from suffice.link.data.graph import Graph, Split, check_edges

_ENDINGS = (".csv", ".parquet", ".npz")


def read_graph(
    edges: str | Path,
    features: str | Path | None = None,
    labels: str | Path | None = None,
    *,
    name: str | None = None,
) -> Graph:
    """Read a graph from files.

    CSV and Parquet: the first two columns of `edges` are the ids of its ends, 0 to nodes - 1; `features` has
    a row for each node; the only column of `labels` is the class of each node, in the order of the ids. One
    NPZ file may hold all of it in arrays `edges` [edges, 2], `x` [nodes, features] and `y` [nodes].

    An edge list may name every edge once or in both directions, but not some of them twice.

    Args:
        edges: edge list, or an NPZ file with everything.
        features: features; needed unless `edges` is an NPZ file.
        labels: classes; without them there is no alignment to measure.
        name: name in tables; that of the edge file if not given.

    Raises:
        ImportError: Parquet is asked for without pandas and pyarrow.
        ValueError: a file's ending or content is not accepted; ids out of range, self-loops, duplicates,
            missing labels.

    """
    path = Path(edges)
    if _ending(path) == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"edges", "x"} - set(arrays.files)
            if missing:
                raise ValueError(f"{path} lacks {sorted(missing)}; accepted: arrays edges, x and perhaps y")
            pairs, x = arrays["edges"], arrays["x"]
            y = arrays["y"] if "y" in arrays.files else None
    else:
        if features is None:
            raise ValueError(f"features is not given for {path}; accepted: a file with a row for each node")
        pairs, x = _read(path)[:, :2], _read(Path(features))
        y = None if labels is None else _read(Path(labels))[:, 0]
    return _graph(name or path.stem, pairs, x, y)


def save_graph(graph: Graph, folder: str | Path) -> str:
    """Write a graph unless it is there, and return its path within the folder."""
    tensors: dict[str, Tensor] = {"x": graph.x, "edges": graph.edges}
    if graph.y is not None:
        tensors["y"] = graph.y
    if graph.official_split is not None:
        tensors |= {f"official/{name}": getattr(graph.official_split, name) for name in Split.__dataclass_fields__}
    digest = hashlib.sha256(graph.name.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    place = f"inputs/{''.join(c if c.isalnum() else '-' for c in graph.name)}-{digest.hexdigest()[:12]}.safetensors"
    if not (Path(folder) / place).exists():
        save_checkpoint(Path(folder) / place, tensors, {"name": graph.name})
    return place


@lru_cache(maxsize=2)
def read_saved_graph(path: Path) -> Graph:
    """Read what `save_graph` wrote; the last ones are kept, since the runs of a study share them.

    Raises:
        CheckpointError: the file is missing or no graph of ours.

    """
    tensors, facts = load_checkpoint(path)
    official = select_prefix(tensors, "official")
    return Graph(
        str(facts["name"]), tensors["x"], tensors["edges"], tensors.get("y"), Split(**official) if official else None
    )


def _graph(name: str, pairs: NDArray[Any], x: NDArray[Any], y: NDArray[Any] | None) -> Graph:
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"edges has shape {pairs.shape}; accepted: [edges, 2]")
    if x.ndim != 2 or not np.isfinite(x.astype(np.float64)).all():
        raise ValueError(f"features of shape {x.shape} hold NaN or are no table; accepted: finite numbers")
    if not np.equal(np.mod(pairs, 1), 0).all():
        raise ValueError("edges hold ids that are no whole numbers; accepted: 0 to nodes - 1")
    edges = torch.from_numpy(pairs.astype(np.int64)).T.contiguous()
    classes = None
    if y is not None:
        if len(y) != len(x):
            raise ValueError(f"labels hold {len(y)} rows, {len(x) - len(y)} missing; accepted: {len(x)}")
        absent = _absent(y)
        if absent.any():
            raise ValueError(
                f"labels are missing for {int(absent.sum())} nodes (the first is {int(absent.argmax())}); "
                "accepted: a class for each node"
            )
        classes = torch.from_numpy(np.unique(y, return_inverse=True)[1]).long()
    return Graph(name, torch.from_numpy(x.astype(np.float32)), _once(edges, len(x)), classes)


def _once(edges: Tensor, nodes: int) -> Tensor:
    """Return each undirected edge once if the list holds both directions of all of them."""
    up, down = edges[:, edges[0] < edges[1]], edges[:, edges[0] > edges[1]].flip(0)
    symmetric = up.size(1) == down.size(1) == edges.size(1) / 2
    if symmetric and torch.equal(torch.unique(up, dim=1), torch.unique(down, dim=1)):
        return up
    check_edges(edges, nodes)
    return torch.stack([edges.min(dim=0).values, edges.max(dim=0).values])


def _absent(y: NDArray[Any]) -> NDArray[np.bool_]:
    if y.dtype.kind in "fc":
        return np.isnan(y)
    if y.dtype.kind in "iu":
        return y < 0
    return np.array([value is None or value != value or value == "" for value in y.tolist()], dtype=bool)


def _read(path: Path) -> NDArray[Any]:
    if _ending(path) == ".npz":
        raise ValueError(f"{path} is an NPZ file; accepted here: CSV or Parquet, or one NPZ with everything")
    if path.suffix == ".parquet":
        try:
            import pandas as pd

            table = pd.read_parquet(path).to_numpy()
        except ImportError as error:
            raise ImportError(f"{path} needs pandas and pyarrow: pip install pandas pyarrow") from error
    else:
        table = _read_csv(path)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{path} holds no rows; accepted: a table")
    return table


def _read_csv(path: Path) -> NDArray[Any]:
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not rows:
        raise ValueError(f"{path} is empty; accepted: a table")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{path} has rows of different lengths; accepted: comma-separated values")
    table = np.array([[cell.strip() for cell in row] for row in rows])
    for start in (0, 1):  # a first line that is no number is a header
        try:
            return table[start:].astype(np.float64)
        except ValueError:
            continue
    if table.shape[1] == 1:
        return table[1:].astype(object)
    raise ValueError(f"{path} holds cells that are no numbers; accepted: numbers below at most one header")


def _ending(path: Path) -> str:
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path} ends in {path.suffix!r}; accepted: {', '.join(_ENDINGS)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; accepted: a file")
    return path.suffix
