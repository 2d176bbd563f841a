"""Export of finished runs to files for other tools."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suffice.study.store import Record, Store

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def flat_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each set of values of the finished runs: settings by dotted name, `seed`, and metrics."""
    return [
        {**record.flat_settings, **settings, "seed": record.seed, **values}
        for record in records
        if record.state == "done"
        for settings, values in record.rows()
    ]


def export_study(path: str | Path, folder: str | Path, study: str | None = None) -> int:
    """Write the finished runs of a study to a file, and return the number of rows; see `export_records`.

    Args:
        path: file to write, ending in one of `SUFFIXES`.
        folder: folder of the store, which is only read.
        study: name of the study, if the folder holds several.

    Raises:
        StoreError: the folder holds no such study.
        ValueError: the suffix is unknown, or Parquet is asked for without pandas.

    """
    with Store(folder, read_only=True) as store:
        name = store.study_name(study)
        about = store.studies()[name]
        records = list(store.records(name))
    export_records(path, name, about, records)
    return len(flat_rows(records))


def export_records(path: str | Path, study: str, about: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write finished runs to a file whose suffix determines the format.

    JSON files hold complete results and the environment of each run, all other formats one flat row for each set of
    values.

    Args:
        path: file to write, ending in one of `SUFFIXES`; its folder is created if it is missing.
        study: name of the study.
        about: information about the study, written to JSON files.
        records: runs of the study; those that are not done are left out.

    Raises:
        ValueError: the suffix is unknown, or Parquet is asked for without pandas.

    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must be a file ending in {', '.join(SUFFIXES)}, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    if path.suffix == ".parquet":
        _data_frame(flat_rows(records)).to_parquet(temporary)
    elif path.suffix == ".json":
        temporary.write_text(_json(study, about, records), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in flat_rows(records))
        temporary.write_text("".join(lines), encoding="utf-8")
    else:
        temporary.write_text(_csv(flat_rows(records)), encoding="utf-8")
    os.replace(temporary, path)


def _json(study: str, about: Mapping[str, Any], records: Sequence[Record]) -> str:
    runs = [
        {
            "key": record.key,
            "settings": record.settings,
            "seed": record.seed,
            "result": record.result,
            "environment": record.environment,
            "seconds": record.seconds,
        }
        for record in records
        if record.state == "done"
    ]
    return json.dumps({"study": study, **about, "runs": runs}, ensure_ascii=False) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _scalar(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError:
        raise ValueError(
            "path must end in .json, .jsonl or .csv without pandas, got .parquet; install it with: "
            "pip install pandas pyarrow"
        ) from None
    return pandas.DataFrame([{name: _scalar(value) for name, value in row.items()} for row in rows])


def _scalar(value: Any) -> Any:
    """Return a value that fits into a cell of a table: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
