"""The status of a study: how many runs are done, and why some failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suffice.environment import source_digest
from suffice.study.store import Store


@dataclass(frozen=True)
class Failure:
    """A failed run.

    Args:
        settings: its settings by dotted name.
        seed: its seed.
        error: its traceback.

    """

    settings: Mapping[str, Any]
    seed: int
    error: str

    @property
    def reason(self) -> str:
        """The last line of the traceback."""
        return self.error.strip().splitlines()[-1] if self.error.strip() else ""


@dataclass(frozen=True)
class StudyStatus:
    """The status of a study.

    Args:
        study: name of the study.
        kind: name of its kind of run.
        counts: number of runs in each state: `done`, `failed`, `running`, `missing`.
        seconds: seconds that all done runs took together.
        other_source: number of done runs that were executed with other source files of the same version.
        failures: the failed runs.

    """

    study: str
    kind: str
    counts: Mapping[str, int]
    seconds: float
    other_source: int
    failures: tuple[Failure, ...]

    @property
    def seconds_per_run(self) -> float | None:
        """Mean seconds of a done run; None if no run is done."""
        return self.seconds / self.counts["done"] if self.counts["done"] else None

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON represents it, with the counts beside the other fields."""
        return {
            "study": self.study,
            "kind": self.kind,
            **self.counts,
            "seconds": self.seconds,
            "other_source": self.other_source,
            "failures": [asdict(failure) for failure in self.failures],
        }


def read_status(folder: str | Path, study: str | None = None) -> list[StudyStatus]:
    """Return the status of every study in a folder, or of one of them.

    Args:
        folder: folder of the store, which is only read.
        study: name of a study; by default all.

    Raises:
        StoreError: the folder holds no such study.

    """
    with Store(folder, read_only=True) as store:
        kinds = {name: about["kind"] for name, about in store.studies().items()}
        names = list(kinds) if study is None else [store.study_name(study)]
        return [_status(store, name, kinds[name]) for name in names]


def _status(store: Store, study: str, kind: str) -> StudyStatus:
    counts, seconds, sources = store.overview(study)
    return StudyStatus(
        study=study,
        kind=kind,
        counts=counts,
        seconds=seconds,
        other_source=sum(sources.values()) - sources.get(source_digest(), 0),
        failures=tuple(
            Failure(dict(record.flat_settings), record.seed, record.error)
            for record in store.records(study, "failed", numbers_only=True)
        ),
    )
