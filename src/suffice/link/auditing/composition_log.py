"""The file to which a `CompositionMonitor` writes its measurements: CSV, one row for each measured epoch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from suffice.arguments import check_path
from suffice.files import check_suffix, read_text

Row = dict[str, "int | float | str"]
"""A measurement: `epoch`, the statistics by name, and `level`, that of the verdict."""

STATISTICS = ("a_pure", "accuracy_balanced", "tau", "kappa", "rank_change")
_COLUMNS = ("epoch", *STATISTICS, "level")


def check_log_file(name: str, path: object) -> Path:
    """Return the path of a log, which must end in .csv.

    Raises:
        TypeError: it is no path.
        ValueError: it has another suffix, is a folder, or is in no folder.

    """
    found = Path(check_path(name, path))
    check_suffix(found, (".csv",), name)
    parent = next(folder for folder in found.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{name} must be a file in a folder, got {str(found)!r}, but {str(parent)!r} is a file")
    return found


def read_log(name: str, path: Path) -> list[Row]:
    """Return the rows of a log; none if there is no such file, or if it is empty.

    Raises:
        ValueError: the file was not written by `write_log`.

    """
    if not path.exists():
        return []
    lines = list(csv.reader(io.StringIO(read_text(path, name))))
    if not lines:
        return []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if number == 1 and line == list(_COLUMNS):
            continue
        try:
            if number == 1:
                raise ValueError("it has other columns")
            epoch, *values, level = line
            statistics = dict(zip(STATISTICS, map(float, values), strict=True))
            if int(epoch) <= (int(rows[-1]["epoch"]) if rows else -1):
                raise ValueError("epochs do not grow")
            rows.append({"epoch": int(epoch), **statistics, "level": level})
        except ValueError:
            raise ValueError(
                f"{name} must be a new file or one of a CompositionMonitor, with columns {','.join(_COLUMNS)} and "
                f"growing epochs, got {str(path)!r}, of which line {number} is {','.join(line)!r}"
            ) from None
    return rows


def write_log(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, at once: a process that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([row[name] for name in _COLUMNS] for row in rows)
    os.replace(temporary, path)
