"""The results of `leaderboard.py`: one folder for each cache, in the layout of kvpress's evaluation.

A folder holds `config.yaml`, `predictions.csv` and, at the end of a run, `metrics.json`. Predictions are appended after
each context, so that a run that was stopped continues after its last complete row.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from leaderboard_data import Sample

COLUMNS = (
    "sample",
    "task",
    "question",
    "answer_prefix",
    "answer",
    "max_new_tokens",
    "predicted_answer",
    "compression_ratio",
    "bytes",
    "score",
)
# Settings that may differ between the runs that fill a folder.
_ANY = ("device", "output_dir")


class ResultsFolder:
    """The results of one cache.

    Args:
        path: the folder.
        config: the settings, as kvpress names them, and under `suffice` our own.

    Attributes:
        finished: indices of the samples whose predictions are stored; empty before `open`.

    Raises:
        ValueError: the folder holds results of other settings.

    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path, self._config = path, dict(config)
        self.finished: set[int] = set()
        file = self._config_file
        stored = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else self._config
        names = sorted({*stored, *self._config} - set(_ANY))
        if changed := [name for name in names if stored.get(name) != self._config.get(name)]:
            raise ValueError(
                f"--output must be a folder without results of other settings, got {str(path)!r}, whose "
                f"{', '.join(changed)} in config.yaml is different. Choose another folder"
            )

    def open(self) -> None:
        """Make the folder, or read what it holds and remove an incomplete row from the end of the predictions."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._config_file, yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True))
        content = self._predictions.read_bytes() if self._predictions.exists() else b""
        complete = complete_rows(content)
        if not complete:
            write_atomically(self._predictions, ",".join(COLUMNS) + "\n")
        elif len(complete) < len(content):
            os.truncate(self._predictions, len(complete))
        self.finished = {int(row["sample"]) for row in read_predictions(self._path)}

    def append(self, predictions: Iterable[tuple[Sample, str]], num_bytes: float) -> None:
        """Store the predictions for one context.

        Args:
            predictions: samples and generated texts; those of finished samples are ignored.
            num_bytes: bytes of the cache, relative to the full cache with 16 bits.

        """
        rows = [
            {
                "sample": sample.index,
                "task": sample.task,
                "question": sample.question,
                "answer_prefix": sample.answer_prefix,
                "answer": json.dumps(list(sample.answer), ensure_ascii=False),
                "max_new_tokens": sample.max_new_tokens,
                "predicted_answer": text.replace("\0", ""),  # the csv module of Python 3.10 can't read it
                "compression_ratio": self._config["compression_ratio"],
                "bytes": f"{num_bytes:.6f}",
                "score": f"{sample.score(text):.6f}",
            }
            for sample, text in predictions
            if sample.index not in self.finished
        ]
        with self._predictions.open("a", encoding="utf-8", newline="") as file:
            file.write(_format(rows))
            file.flush()
            os.fsync(file.fileno())
        self.finished |= {row["sample"] for row in rows}

    def write_metrics(self) -> None:
        """Write the score of each task, in percent."""
        scores = task_scores(read_predictions(self._path))
        metrics = {task: {"string_match": score} for task, score in scores.items()}
        write_atomically(self._path / "metrics.json", json.dumps(metrics, indent=4) + "\n")

    @property
    def _config_file(self) -> Path:
        return self._path / "config.yaml"

    @property
    def _predictions(self) -> Path:
        return self._path / "predictions.csv"


def complete_rows(content: bytes) -> bytes:
    """Return the part of a CSV file that ends with the last complete row.

    A line break ends a row if an even number of quotation marks comes before it, because those within a field are
    doubled.
    """
    end = content.rfind(b"\n") + 1
    while end and content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    return content[:end]


def read_predictions(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of the predictions in a folder."""
    text = complete_rows((path / "predictions.csv").read_bytes()).decode("utf-8")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def task_scores(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Return the mean score of each task, in percent with two decimals, as RULER does."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["task"], []).append(float(row["score"]))
    return {task: round(100 * statistics.fmean(values), 2) for task, values in sorted(scores.items())}


def write_leaderboard(output: Path) -> list[dict[str, Any]]:
    """Write `leaderboard.csv`, with a row for each folder of results, and return its rows.

    The columns are the model, the policy, the compression ratio, the number of samples, the mean score over tasks, the
    mean bytes relative to the full cache with 16 bits, and the score of each task.
    """
    rows: list[dict[str, Any]] = []
    tasks: set[str] = set()
    for file in sorted(output.glob("*/config.yaml")):
        predictions = read_predictions(file.parent) if (file.parent / "predictions.csv").exists() else []
        if not predictions:
            continue
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        scores = task_scores(predictions)
        tasks |= set(scores)
        rows.append(
            {
                "model": config["model"],
                "data": config["data_dir"],
                "policy": config["press_name"],
                "compression_ratio": config["compression_ratio"],
                "samples": len(predictions),
                "score": round(statistics.fmean(scores.values()), 2),
                "bytes": round(statistics.fmean(float(row["bytes"]) for row in predictions), 4),
                **scores,
            }
        )
    rows.sort(key=lambda row: (row["model"], row["data"], row["compression_ratio"], row["policy"]))
    if rows:
        own = ("model", "data", "policy", "compression_ratio", "samples", "score", "bytes")
        write_atomically(output / "leaderboard.csv", _format(rows, (*own, *sorted(tasks)), header=True))
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, so that it holds the old or the new text if the process is killed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)


def _format(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS, *, header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
