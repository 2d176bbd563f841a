"""Tables in files: text with any usual delimiter, Parquet, and arrays of NumPy and Matrix Market."""

from __future__ import annotations

import csv
import gzip
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.io import mminfo, mmread

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".edges", ".edgelist")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".mtx", ".npy")
_COMMENT_MARKS = "#%"
_DELIMITERS = (",", ";", "\t")

HeaderKind = Literal["names", "data", "unclear"]


@dataclass(frozen=True)
class Table:
    """The cells of a file. What the first line is remains open until `with_header` decides it.

    Args:
        path: the file.
        texts: first column if its cells are texts, or integers too large for float64, and all other cells are numbers,
            [rows]; None for other tables.
        cells: all other cells, of int64, float64 or text, [rows, columns].
        names: names of all columns; None if there are none.
        first: cells of the first line of a text file, if they may be names; they are in no row of the table.
        first_line: number of this line in the file, from 1.
        may_be_numbered: whether a first line 0,1,2,… may be the header that pandas writes by default.

    """

    path: Path
    cells: NDArray[Any]
    texts: NDArray[Any] | None = None
    names: tuple[str, ...] | None = None
    first: tuple[str, ...] | None = None
    first_line: int = 1
    may_be_numbered: bool = False

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return self.cells.shape[1] + (self.texts is not None)

    @property
    def is_numeric(self) -> bool:
        """Whether all cells are numbers."""
        return self.texts is None and self.cells.dtype.kind in "iuf"

    def column(self, number: int) -> NDArray[Any]:
        """Return a column, [rows]."""
        if self.texts is None:
            return self.cells[:, number]
        return self.texts if number == 0 else self.cells[:, number - 1]

    def first_line_kind(self) -> HeaderKind:
        """Return what the first line holds: names of columns, data, or either of them."""
        if self.first is None or len(self) == 0:
            return "data"
        if self.first[0] == "" and len(self.first) > 1:  # pandas writes no name for the index
            return "names"
        kinds = [column.dtype.kind in "iuf" for column in (self.column(i) for i in range(min(self.num_columns, 2)))]
        are_numbers = [_is_number(cell) for cell in self.first]
        if any(is_numeric and not is_number for is_numeric, is_number in zip(kinds, are_numbers, strict=False)):
            return "names"
        if not any(are_numbers):
            return "unclear"
        is_numbered = self.may_be_numbered and list(self.first) == [str(i) for i in range(len(self.first))]
        return "unclear" if is_numbered else "data"

    def with_header(self, *, is_header: bool) -> Table:
        """Return the table with its first line as names, or as the first row."""
        if self.first is None:
            return self
        if is_header:
            return replace(self, names=self.first, first=None)
        row = list(self.first)
        texts = None
        if self.texts is not None:
            id_kind: Any = np.int64 if self.texts.dtype.kind == "i" else str
            texts = np.concatenate([np.array([id_kind(row.pop(0))]), self.texts])
        kind: Any = self.cells.dtype.type
        if self.cells.dtype.kind == "i" and not all(re.fullmatch(r"[+-]?\d+", cell) for cell in row):
            kind = np.float64
        first = np.array([row]) if self.cells.dtype.kind == "U" else np.array([[kind(cell) for cell in row]])
        cells = np.concatenate([first, self.cells]) if len(self.cells) else first
        return replace(self, texts=texts, cells=cells, first=None)

    def without_first_column(self) -> Table:
        """Return the table without its first column."""
        names = None if self.names is None else self.names[1:]
        cells = self.cells[:, 1:] if self.texts is None else self.cells
        return replace(self, texts=None, cells=cells, names=names)

    def show_first_line(self) -> str:
        """Return the first line with its number, for messages."""
        return f"line {self.first_line}, {shorten(', '.join(self.first or ()))!r}"


def read_table(path: Path) -> Table:
    """Read a table.

    Lines of a text file that begin with # or % before its first row are comments. Cells are separated by commas,
    semicolons, tabs or spaces, whichever the first row holds; they may be quoted. A file may be compressed (`.gz`).

    Args:
        path: a text file, a Parquet file, a dense NPY array, or a matrix in Matrix Market format, which is made dense.

    Raises:
        ImportError: the packages pandas and pyarrow are missing, which a Parquet file needs.
        ValueError: the file is missing, has another suffix or cannot be read, or the table is empty.

    """
    suffix = check_suffix(path, TABLE_SUFFIXES)
    if suffix in TEXT_SUFFIXES:
        table = _read_text_table(path)
    elif suffix == ".parquet":
        table = _read_parquet(path)
    elif suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        table = Table(path, array[:, None] if array.ndim == 1 else array)
    else:
        table = Table(path, read_matrix(path).toarray())
    num_rows = len(table) + (table.first is not None)
    if table.cells.ndim != 2 or num_rows == 0 or table.num_columns == 0:
        raise ValueError(f"{path} must hold a table with at least one row and column, got shape {table.cells.shape}")
    return table


def read_matrix(path: Path) -> Any:
    """Read a matrix in Matrix Market format as a sparse array in coordinates; the mirrored half is filled in.

    Raises:
        ValueError: the file cannot be read, or is symmetric but not square.

    """
    try:
        rows, columns, *_, symmetry = mminfo(path)
        if symmetry != "general" and rows != columns:  # SciPy would mirror its entries
            raise ValueError(f"{rows} rows and {columns} columns, which is not square, but {symmetry}")
        return sparse.coo_array(mmread(path))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} must be a matrix in Matrix Market format, got an error: {error}") from None


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> str:
    """Return the suffix of an existing file in lower case, without `.gz`.

    Raises:
        ValueError: the suffix is not accepted, or the file does not exist.

    """
    suffix = plain_suffix(path)
    if suffix not in suffixes:
        raise ValueError(f"{path} must be a file with one of the suffixes {', '.join(suffixes)}, got {path.suffix!r}")
    if not path.is_file():
        raise ValueError(f"file must exist, got {str(path)!r}")
    return suffix


def plain_suffix(path: Path) -> str:
    """Return the suffix of a file name in lower case, without `.gz` behind it if the file is a text or a matrix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] in (*TEXT_SUFFIXES, ".mtx"):
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def shorten(text: str, width: int = 60) -> str:
    """Return at most `width` characters of a text."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _read_parquet(path: Path) -> Table:
    try:
        import pandas as pd

        frame = pd.read_parquet(path)
    except ImportError as error:
        raise ImportError(f"{path} needs the packages pandas and pyarrow: pip install pandas pyarrow") from error
    names = tuple(str(name) for name in frame.columns)
    columns = [_plain_array(frame[name].to_numpy()) for name in frame.columns]
    if len(columns) > 1 and columns[0].dtype.kind == "U" and all(one.dtype.kind in "iuf" for one in columns[1:]):
        return Table(path, np.stack(columns[1:], axis=1), columns[0], names)
    if any(one.dtype.kind == "U" for one in columns):
        columns = [one.astype(str) for one in columns]
    return Table(path, np.stack(columns, axis=1) if columns else np.empty((len(frame), 0)), None, names)


def _plain_array(column: NDArray[Any]) -> NDArray[Any]:
    """Return a column as numbers or as texts; a missing text is empty."""
    if column.dtype.kind == "b":
        return column.astype(np.int64)
    if column.dtype.kind in "iuf":
        return column
    return np.array(["" if cell is None or cell != cell else str(cell) for cell in column.tolist()], dtype=str)


@dataclass(frozen=True)
class _Start:
    """The first lines of a text file."""

    rows: tuple[str, ...]  # the first two rows
    first_line: int  # number of the first row
    has_comments: bool  # whether comments precede it
    unclear_comment: str | None  # a comment without a space behind its mark, which may be a row of texts


def _read_text_table(path: Path) -> Table:
    start = _read_start(path)
    if not start.rows:
        raise ValueError(f"{path} must hold a table, got an empty file")
    delimiter = _find_delimiter(start.rows[-1], plain_suffix(path))
    split = [_split_line(row, delimiter) for row in start.rows]
    first, second = split[0], split[-1]
    if len(first) != len(second):
        raise ValueError(
            f"{path} must have rows of one length, got {len(first)} cells in line {start.first_line}, "
            f"{shorten(start.rows[0])!r}, and {len(second)} in the next row, {shorten(start.rows[-1])!r}"
        )
    if len(start.rows) == 1:
        cells = _to_numbers(np.array([first]))
        _check_comments(path, start, has_texts=cells.dtype.kind == "U")
        return Table(path, cells)
    has_texts = len(second) > 1 and not _is_number(second[0]) and all(_is_number(cell) for cell in second[1:])
    texts = _load(path, start.first_line, delimiter, (0,), [str]) if has_texts else None
    columns = tuple(range(1, len(second))) if has_texts else None
    cells = _load(path, start.first_line, delimiter, columns, [np.int64, np.float64, str])
    if cells.dtype.kind == "f" and cells.shape[1] > 1 and texts is None and (np.abs(cells[:, 0]) >= 2**53).any():
        large = _load(path, start.first_line, delimiter, (0,), [np.int64, str])
        if large.dtype.kind == "i":
            cells, texts = cells[:, 1:], large
    if texts is not None and cells.dtype.kind == "U":
        cells, texts = np.concatenate([texts, cells], axis=1), None
    _check_comments(path, start, has_texts=cells.dtype.kind == "U" or (texts is not None and texts.dtype.kind == "U"))
    return Table(
        path,
        cells,
        None if texts is None else texts[:, 0],
        first=tuple(first),
        first_line=start.first_line,
        may_be_numbered=not start.has_comments and (delimiter is not None or len(first) == 1),
    )


def _check_comments(path: Path, start: _Start, *, has_texts: bool) -> None:
    """Raise if a comment may be a row, because the cells are texts."""
    if has_texts and start.unclear_comment is not None:
        raise ValueError(
            f"{path} must have a space behind the # or % of a comment if its cells are texts, got "
            f"{shorten(start.unclear_comment)!r}. Quote the first cell of this line if it is no comment"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Return the numbered lines that are not empty, without the byte-order mark.

    Raises:
        ValueError: the file cannot be read.

    """
    open_text: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a text file in UTF-8, got one that cannot be read: {error}") from None


def _is_comment(line: str, *, of_texts: bool = False) -> bool:
    """Return whether a line begins with a mark of comments; among texts, `#tag` is a cell and `# text` a comment."""
    return line[0] in _COMMENT_MARKS and not (of_texts and line[1:2].isalnum())


def _read_start(path: Path) -> _Start:
    rows: list[str] = []
    first_line, has_comments, unclear_comment = 0, False, None
    for number, line in _lines(path):
        text = line.strip("\r\n ")
        if not rows and _is_comment(text):
            has_comments = True
            if not _is_comment(text, of_texts=True):
                unclear_comment = text
        elif not _is_comment(text, of_texts=True):
            first_line = first_line or number
            rows.append(text)
        if len(rows) == 2:
            break
    return _Start(tuple(rows), first_line, has_comments, unclear_comment)


def _find_delimiter(row: str, suffix: str) -> str | None:
    """Return the delimiter of a row, outside of quoted cells; None for spaces."""
    row = re.sub(r'"[^"]*"', '""', row)
    for delimiter in _DELIMITERS:
        if delimiter in row:
            return delimiter
    # A CSV file of one column may hold texts with spaces.
    return "," if suffix == ".csv" and not all(map(_is_number, row.split())) else None


def _split_line(text: str, delimiter: str | None) -> list[str]:
    cells = text.split() if delimiter is None else next(csv.reader([text], delimiter=delimiter))
    return [cell.strip().strip('"') for cell in cells]


def _load(
    path: Path, first_line: int, delimiter: str | None, columns: tuple[int, ...] | None, kinds: list[type]
) -> NDArray[Any]:
    """Return the cells below the first row in the first of several types that all cells have, [rows, columns].

    Raises:
        ValueError: the rows have different lengths, or the file cannot be read.

    """
    last_line = first_line

    def rows(*, of_texts: bool) -> Iterator[str]:
        nonlocal last_line
        for number, line in _lines(path):
            if number > first_line and not _is_comment(line, of_texts=of_texts):
                last_line = number
                yield line

    error: Exception | None = None
    for kind in kinds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)
                loaded = np.loadtxt(
                    rows(of_texts=kind is str),
                    dtype=kind,
                    comments=None,
                    delimiter=delimiter,
                    quotechar='"',
                    usecols=columns,
                    ndmin=2,
                )
        except (ValueError, OverflowError, DeprecationWarning) as caught:
            error = caught.with_traceback(None)  # which would keep the file open
            continue
        return np.char.strip(loaded) if kind is str else loaded
    if found := re.search(r"number of columns changed from (\d+) to (\d+)", str(error)):
        raise ValueError(
            f"{path} must have rows of one length, got {found[1]} cells and then {found[2]} in line {last_line}"
        )
    raise ValueError(f"{path} must be a table, got an error near line {last_line}: {error}")


def _to_numbers(texts: NDArray[Any]) -> NDArray[Any]:
    """Return texts as integers or fractions if all of them are."""
    for kind in (np.int64, np.float64):
        try:
            return texts.astype(kind)
        except ValueError:
            continue
    return texts


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
