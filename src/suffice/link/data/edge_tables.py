"""Edge lists in files: which columns and rows of a table hold the nodes of the edges."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suffice.link.data.tables import Table, plain_suffix, read_matrix, read_table, shorten

# Usual names of columns, in lower case without separators.
_SOURCES = (
    "source",
    "src",
    "from",
    "fromnode",
    "fromnodeid",
    "u",
    "head",
    "node1",
    "id1",
    "sourceid",
    "user",
    "userid",
)
_TARGETS = ("target", "dst", "to", "tonode", "tonodeid", "v", "tail", "node2", "id2", "targetid", "item")
_CLASSES = ("label", "labels", "class", "classes", "y", "category")


@dataclass(frozen=True)
class EdgeList:
    """Edges as a file lists them.

    Args:
        pairs: ids of the two nodes of each edge, int64 or text, [edges, 2].
        values: description of the weights or other values of the edges; None if there are none.
        num_nodes: number of nodes, if the file is a matrix. `pairs` are then numbers of rows and columns, from 0.
        num_left: number of rows of a rectangular matrix, whose columns are numbered behind its rows. None for others.

    """

    pairs: NDArray[Any]
    values: str | None = None
    num_nodes: int | None = None
    num_left: int | None = None


def read_edge_list(path: Path, *, header: bool | None = None, known_ids: NDArray[Any] | None = None) -> EdgeList:
    """Read an edge list, or an adjacency matrix.

    Args:
        path: a text file, a Parquet file, or a matrix in Matrix Market format.
        header: whether the first line is a header, where it can be read either way.
        known_ids: ids of the nodes, if another file tells them.

    Raises:
        ValueError: the file cannot be read as edges, or its first line can be read either way.

    """
    if plain_suffix(path) == ".mtx":
        return _read_adjacency(path)
    table = read_table(path)
    if table.num_columns < 2:
        raise ValueError(f"{path} must hold the two nodes of an edge in each row, got {table.num_columns} column")
    table = table.with_header(is_header=_has_header(table, header, known_ids))
    first, second = _find_columns(table)
    pairs = np.stack([table.column(first), table.column(second)], axis=1)
    others = table.num_columns - 2 - (first > 0 and table.names is not None and table.names[0] == "")
    return EdgeList(as_ids(pairs, path), f"{others} more columns in {path}" if others else None)


def as_ids(ids: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return ids as int64 or text.

    Raises:
        ValueError: ids are fractions, or missing.

    """
    if ids.dtype.kind in "iu":
        return ids.astype(np.int64)
    if ids.dtype.kind == "f":
        if not np.equal(np.mod(ids, 1), 0).all():
            raise ValueError(f"{path} must hold integer node ids or texts, got fractions or missing ids")
        if (np.abs(ids) >= 2**53).any():
            raise ValueError(f"{path} must hold ids below 2**53 beside fractions, got larger ids")
        return ids.astype(np.int64)
    texts = ids.astype(str)
    # Beside other columns of texts, numbers are read as texts, too.
    if texts.size and all(re.fullmatch(r"0|-?[1-9]\d{0,17}", text) for text in texts.flat):
        return texts.astype(np.int64)
    if (texts == "").any():
        row = int((texts == "").reshape(len(texts), -1).any(axis=1).argmax())
        raise ValueError(f"{path} must hold an id in every row, got none in row {row + 1} below the header")
    return texts


def _read_adjacency(path: Path) -> EdgeList:
    """Read an adjacency matrix, or a rectangular matrix whose rows and columns are the sides of a bipartite graph."""
    matrix = read_matrix(path)
    rows, columns = matrix.shape
    matrix.eliminate_zeros()
    values = f"values other than 1 in {path}" if bool((matrix.data != 1).any()) else None
    if rows == columns:
        return EdgeList(np.stack([matrix.row, matrix.col], axis=1).astype(np.int64), values, rows)
    pairs = np.stack([matrix.row, matrix.col.astype(np.int64) + rows], axis=1).astype(np.int64)
    return EdgeList(pairs, values, rows + columns, rows)


def _has_header(table: Table, header: bool | None, known_ids: NDArray[Any] | None) -> bool:
    kind = table.first_line_kind()
    if kind != "unclear":
        return kind == "names"
    first = list(table.first or ())
    if not table.is_numeric:
        plain = [_plain(name) for name in first]
        if any(name in _SOURCES for name in plain) and any(name in _TARGETS for name in plain):
            return True
        ids = np.stack([table.column(0), table.column(1)])
        known = ids.astype(str) if known_ids is None else known_ids.astype(str)
        num_known = int(np.isin(np.array(first[:2]), known).sum())
        if num_known == len(first[:2]):
            return False
        if num_known == 0 and known_ids is not None:
            return True
    if header is None:
        raise ValueError(
            f"{table.path} must begin with a line that is either a header or an edge, got {table.show_first_line()}, "
            f"which can be both. Use header=True if it holds names of columns, or header=False if it holds an edge "
            f"(--header or --no-header on the command line)"
        )
    return header


def _find_columns(table: Table) -> tuple[int, int]:
    """Return the numbers of the two columns with the nodes of an edge."""
    count, path = table.num_columns, table.path
    names = None if table.names is None else [_plain(name) for name in table.names]
    if names is not None:
        sources, targets = ([i for i, name in enumerate(names) if name in group] for group in (_SOURCES, _TARGETS))
        if sources and targets:
            return sources[0], targets[0]
        start = 1 if names[0] == "" else 0
        ends = names[start : start + 2]
        if len(ends) < 2 or any(name in _CLASSES for name in ends):
            raise ValueError(
                f"{path} must hold the two nodes of an edge in each row, got columns "
                f"{shorten(', '.join(table.names or ()))}. Pass classes as labels, and features as features"
            )
        if start == 1:
            return 1, 2
    if count > 2 and table.texts is None and table.cells.dtype.kind in "iuf":
        column = table.column(0)
        if len(column) > 2 and np.array_equal(column, np.arange(len(column)) + column[0]):
            shown = ", ".join(map(str, table.cells[0].tolist()[:5]))
            raise ValueError(
                f"{path} must have the two nodes of an edge in its first two columns, got a first column that counts "
                f"the rows ({shorten(shown)} in the first row). Delete this column, or name the columns source and "
                f"target"
            )
    return 0, 1


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")
