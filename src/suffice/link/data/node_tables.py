"""Features and classes of nodes in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suffice.link.data.edge_tables import as_ids
from suffice.link.data.tables import Table, read_table, shorten

# Usual names of a column of ids, in lower case; pandas writes no name for an index without one.
_ID_NAMES = ("", "id", "ids", "node", "nodes", "nodeid", "node_id", "node id", "index", "name")


@dataclass(frozen=True)
class NodeTable:
    """Values of nodes.

    Args:
        values: features [nodes, features], or classes [nodes].
        ids: id of each node, int64 or text, [nodes]; None if the nodes are numbered from 0 in the order of the rows.

    """

    values: NDArray[Any]
    ids: NDArray[Any] | None = None


def read_features(path: Path, *, header: bool | None = None, ids: bool | None = None) -> NodeTable:
    """Read the features of nodes.

    Args:
        path: a table with a row for each node (see `read_table`).
        header: whether the first line is a header, where it can be read either way.
        ids: whether the first column holds ids; None to find out.

    Raises:
        ValueError: the file cannot be read as features, or its first line or column can be read in two ways.

    """
    table = read_table(path)
    kind = table.first_line_kind()
    if kind == "unclear" and not table.is_numeric:
        kind = "names"  # features are numbers
    is_header = kind == "names" if kind != "unclear" else _decide(table, header)
    table, found = _split_ids(table.with_header(is_header=is_header), ids)
    if not table.is_numeric:
        _refuse_texts(table)
    return NodeTable(table.cells, found)


def read_classes(path: Path, num_nodes: int, *, ids: bool | None = None) -> NodeTable:
    """Read the classes of nodes.

    Args:
        path: a table with one column of classes in the order of the nodes, or with ids and classes (see `read_table`).
        num_nodes: number of nodes; it tells whether the first line is a header where its cells do not.
        ids: whether the first column holds ids; None to find out.

    Raises:
        ValueError: the file cannot be read as classes, or its first line or columns can be read in two ways.

    """
    table = read_table(path)
    kind = table.first_line_kind()
    if kind == "unclear" and table.first is not None:
        is_label_too = bool(np.isin(table.first[-1], table.column(table.num_columns - 1).astype(str)))
        if len(table) == num_nodes and not (is_label_too and not table.is_numeric):
            kind = "names"
        elif len(table) + 1 == num_nodes:
            kind = "data"
        else:
            raise ValueError(
                f"labels must have {num_nodes} rows, one for each node, got {len(table)} rows below "
                f"{table.show_first_line()} of {path}, which may be a header or a row"
            )
    table, found = _split_ids(table.with_header(is_header=kind == "names"), ids)
    if table.num_columns != 1:
        names = f" ({shorten(', '.join(table.names))})" if table.names else ""
        raise ValueError(
            f"{path} must have one column of classes, or a column of ids and one of classes, got {table.num_columns} "
            f"columns{names}. If the first one holds ids, name it id or use ids=True (--ids on the command line)"
        )
    return NodeTable(table.column(0), found)


def _decide(table: Table, header: bool | None) -> bool:
    if header is None:
        raise ValueError(
            f"{table.path} must begin with a line that is either a header or a row, got {table.show_first_line()}, "
            f"which can be both. Use header=True if it numbers the columns, or header=False if it holds features "
            f"(--header or --no-header on the command line)"
        )
    return header


def _split_ids(table: Table, ids: bool | None) -> tuple[Table, NDArray[Any] | None]:
    """Return the table without its ids, and the ids if there are any that do not just count the rows."""
    if ids is None:
        ids = _has_ids(table)
    if not ids:
        return table, None
    if table.num_columns < 2:
        raise ValueError(f"{table.path} must have values behind its ids, got {table.num_columns} column")
    found = as_ids(table.column(0), table.path)
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{table.path} must have one row for each id, got {int((counts > 1).sum())} ids with several rows, the "
            f"first is {values[counts > 1][0]}"
        )
    is_count = found.dtype.kind == "i" and np.array_equal(found, np.arange(len(found)))
    return table.without_first_column(), None if is_count else found


def _has_ids(table: Table) -> bool:
    if table.num_columns < 2:
        return False
    if table.texts is not None:
        return True
    if table.names is not None:
        return table.names[0].lower() in _ID_NAMES
    first = table.column(0)
    if not table.is_numeric or (first.dtype.kind == "f" and (first % 1 != 0).any()):
        return False
    if len(first) < 3 or len(np.unique(first)) < len(first):
        return False
    shown = ", ".join(map(str, table.cells[0].tolist()[:5]))
    raise ValueError(
        f"{table.path} must tell whether its first column holds ids of nodes, got a different whole number in each row "
        f"and no header (the first row is {shorten(shown)!r}). Use ids=True if they are ids, or ids=False if not "
        f"(--ids or --no-ids on the command line)"
    )


def _refuse_texts(table: Table) -> None:
    """Raise and name the first cell that is no number."""
    cells = table.cells if table.texts is None else table.texts[:, None]
    for row, values in enumerate(cells):
        for column, cell in enumerate(values.tolist()):
            try:
                float(cell)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{table.path} must hold numbers, got {shorten(str(cell))!r} in row {row + 1} of the nodes, "
                    f"column {column + 1}"
                ) from None
