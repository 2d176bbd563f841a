"""The data of `leaderboard.py`: contexts, questions and right answers in the columns of kvpress's RULER data set."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffice.kv.eval.tasks import make_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")
# Tasks that `make_data` writes, named after RULER's, and the tasks of `suffice.kv.eval.tasks` that make them.
MADE_TASKS = {
    "niah_single": "single",
    "niah_multikey": "multikey",
    "niah_multivalue": "multivalue",
    "niah_multiquery": "multiquery",
    "vt": "variables",
    "cwe": "common-words",
    "fwe": "frequent-words",
    "qa": "qa",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")
_MAX_FIELD = 2**30  # characters in a field of a CSV file; the default of the csv module is too small for a context


@dataclass(frozen=True)
class Sample:
    """A question about a context.

    Args:
        index: number of the sample in the data set.
        context: the text that is compressed before the question is seen.
        question: the question.
        answer_prefix: the first words of the answer, which are given to the model.
        answer: the strings that a right answer contains.
        max_new_tokens: maximum number of generated tokens.
        task: name of the task; its part before the first underscore decides how answers are scored.

    """

    index: int
    context: str
    question: str
    answer_prefix: str
    answer: tuple[str, ...]
    max_new_tokens: int
    task: str

    def score(self, text: str) -> float:
        """Return the score of a generated text, 0 to 1, as RULER does (2404.06654).

        The score is the share of the right strings in the text; for question answering (`qa`), whether there is any.
        Case and control characters are ignored.
        """
        said = _CONTROL_CHARACTERS.sub("", text).lower()
        found = [string.lower() in said for string in self.answer]
        return float(any(found)) if self.task.split("_")[0] == "qa" else sum(found) / len(found)


def read_samples(data: str, data_dir: str) -> list[Sample]:
    """Return the samples of a folder, or of a data set of the Hugging Face hub.

    Args:
        data: a folder with Parquet, CSV or JSON Lines files, or the id of a data set.
        data_dir: folder within the data set of the hub.

    Raises:
        ValueError: there is no such data, a package is missing that reads it, or a row has other columns or values.

    """
    folder = Path(data)
    if folder.is_dir():
        rows = _read_folder(folder)
    elif _HUB_ID.fullmatch(data) and not folder.exists():
        rows = _read_hub(data, data_dir)
    else:
        raise ValueError(
            f"--data must be a folder with .parquet, .csv or .jsonl files, or the id of a data set, got {data!r}"
        )
    samples = [_parse(row, index, where) for index, (where, row) in enumerate(rows)]
    if not samples:
        raise ValueError(f"--data must have at least one row, got none in {data!r}")
    return samples


def first_of_each_task(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """Return the first samples of each task, in the order of the data; all if `count` is None."""
    seen: dict[str, int] = {}
    kept: list[Sample] = []
    for sample in samples:
        seen[sample.task] = seen.get(sample.task, 0) + 1
        if count is None or seen[sample.task] <= count:
            kept.append(sample)
    return kept


def make_data(folder: Path, tokenizer: PreTrainedTokenizerBase, *, tokens: int, samples: int, seed: int) -> Path:
    """Write samples of all tasks, made from texts that come with Python, to `test.jsonl` in a folder.

    Args:
        folder: the folder, which must not hold data yet.
        tokenizer: counts tokens.
        tokens: length of the prompts: context, question, answer prefix and chat template.
        samples: number of samples of each task.
        seed: seed of the first sample of each task; the next ones follow it.

    Raises:
        ValueError: the folder holds data, or a task does not fit into `tokens`.

    """
    if folder.exists() and (not folder.is_dir() or _data_files(folder)):
        raise ValueError(f"--make-data must be a new folder, or one without data, got {str(folder)!r}")
    lines: list[str] = []
    for name, task in MADE_TASKS.items():
        for number in range(seed, seed + samples):
            example = make_example(task, tokenizer, tokens=tokens, seed=number)
            sample = Sample(
                index=len(lines),
                context=f"{example.document}\n\n",
                question=str(example.question),
                answer_prefix=example.answer_prefix,
                answer=example.references,
                max_new_tokens=example.max_new_tokens,
                task=name,
            )
            values = asdict(sample)
            lines.append(json.dumps({column: values[column] for column in COLUMNS}, ensure_ascii=False))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _READERS and path.is_file())


def _read_folder(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    files = _data_files(folder)
    if not files:
        inner = sorted(str(path) for path in folder.iterdir() if path.is_dir() and _data_files(path))
        hint = f". Did you mean {inner[0]!r}?" if inner else ""
        raise ValueError(
            f"--data must be a folder with .parquet, .csv or .jsonl files, got {str(folder)!r}, which has none{hint}"
        )
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for path in files:
        try:
            own = list(_READERS[path.suffix](path))
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"--data must hold files that can be read, got {str(path)!r}: {error}") from None
        rows += [(f"row {number} of {path}", row) for number, row in enumerate(own, 1)]
    return rows


def _read_jsonl(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _read_csv(path: Path) -> Iterable[Any]:
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def _read_parquet(path: Path) -> Iterable[Any]:
    if missing := [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"Parquet files need the packages pandas and pyarrow: pip install {' '.join(missing)}")
    import pandas

    return pandas.read_parquet(path).to_dict("records")


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, data_dir: str) -> list[tuple[str, Mapping[str, Any]]]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"--data must be a folder with files as long as the package datasets is missing, got {name!r}. For a data "
            "set of the hub: pip install datasets"
        )
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, data_dir=data_dir, split="test")
    except Exception as error:  # the package raises errors of many kinds if it cannot load a data set
        raise ValueError(
            f"--data must be a data set that can be loaded, with --data-dir in it, got {name!r} and {data_dir!r}: "
            f"{error}"
        ) from error
    return [(f"row {number} of {name}", row) for number, row in enumerate(rows, 1)]


def _parse(row: Any, index: int, where: str) -> Sample:
    """Return the sample of a row.

    Raises:
        ValueError: a column is missing, or has a value of another kind.

    """
    if not isinstance(row, Mapping):
        raise ValueError(f"--data must hold rows with named columns, got {row!r} in {where}")
    if missing := [name for name in COLUMNS if row.get(name) is None]:
        raise ValueError(
            f"--data must have the columns {', '.join(COLUMNS)}, got a row without {', '.join(missing)} ({where})"
        )
    texts = {name: row[name] for name in ("context", "question", "answer_prefix", "task")}
    for name, text in texts.items():
        if not isinstance(text, str) or not (text.strip() or name in ("question", "answer_prefix")):
            raise ValueError(f"{name} must be a text, got {text!r} ({where})")
    try:
        max_new_tokens = int(row["max_new_tokens"])
    except (TypeError, ValueError):
        max_new_tokens = 0
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a number of at least 1, got {row['max_new_tokens']!r} ({where})")
    return Sample(index, answer=_parse_answer(row["answer"], where), max_new_tokens=max_new_tokens, **texts)


def _parse_answer(answer: Any, where: str) -> tuple[str, ...]:
    """Return the strings of a right answer: a list or array of them, one string, or in a CSV file a list as JSON."""
    strings = answer
    if isinstance(answer, str):
        strings = [answer]
        if answer.lstrip().startswith("["):
            try:
                strings = json.loads(answer)
            except ValueError:
                strings = None
    strings = None if strings is None or isinstance(strings, (int, float, dict)) else list(strings)
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            f'answer must be a list of texts (in a CSV file as JSON: ["a", "b"]), got {answer!r} ({where})'
        )
    return tuple(strings)
