"""Finished runs as files for other tools."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suffice.study.store import Record

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a flat row for each set of values: settings, seed, metrics."""
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.state == "done":
            rows += [{**record.settings, **own, "seed": record.seed, **values} for own, values in record.rows()]
    return rows


def write(path: str | Path, study: str, about: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write runs to a file, by its ending; JSON has whole results and how they were made, the others flat rows.

    Raises:
        ValueError: the ending is unknown, or Parquet is asked for without pandas.

    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"to is {str(path)!r}; accepted: a file ending in {', '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    if path.suffix == ".parquet":
        _frame(rows_of(records)).to_parquet(half)
    else:
        half.write_text(_text(path.suffix, study, about, records), encoding="utf-8")
    os.replace(half, path)


def _text(ending: str, study: str, about: Mapping[str, Any], records: Sequence[Record]) -> str:
    if ending == ".json":
        runs = [
            {
                "key": record.key,
                "settings": record.settings,
                "seed": record.seed,
                "result": record.result,
                "made": record.made,
                "seconds": record.seconds,
            }
            for record in records
            if record.state == "done"
        ]
        return json.dumps({"study": study, **about, "runs": runs}, ensure_ascii=False) + "\n"
    rows = rows_of(records)
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _frame(rows: list[dict[str, Any]]) -> Any:
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError:
        raise ValueError("to is Parquet, which needs pandas and pyarrow: pip install pandas pyarrow") from None
    return pandas.DataFrame([{name: _cell(value) for name, value in row.items()} for row in rows])
