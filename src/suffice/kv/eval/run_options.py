"""Run the samples of `compare` or `tune` as a resumable study."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from suffice import SufficeError
from suffice.arguments import check_callable, check_instance, check_int, check_path, shown
from suffice.study.progress import ProgressCallback
from suffice.study.run_kind import RunKind
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Record, Store, StoreError


@dataclass(frozen=True)
class RunOptions:
    """Where finished samples are stored, and how many processes measure samples.

    Args:
        folder: folder that stores finished samples, so that a later call resumes; None stores nothing.
        workers: number of worker processes; 0 measures in this process.
        on_progress: called with the progress.
        command: the command line, recorded in the folder for reports.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `workers` is negative, or `folder` is an empty text.

    """

    folder: str | Path | None = None
    workers: int = 0
    on_progress: ProgressCallback | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.folder is not None:
            check_path("folder", self.folder)
        object.__setattr__(self, "workers", check_int("workers", self.workers, 0))
        if self.on_progress is not None:
            check_callable("on_progress", self.on_progress)
        if not isinstance(self.command, str):
            raise TypeError(f"command must be a string, got {shown(self.command)}")

    @classmethod
    def from_argument(cls, run: RunOptions | None) -> RunOptions:
        """Return the argument `run` of a function; None stands for the defaults.

        Raises:
            TypeError: it is neither None nor a `RunOptions`.

        """
        return cls() if run is None else check_instance("run", run, cls, "RunOptions(folder='results')", optional=True)

    def open_folder(self) -> AbstractContextManager[str | Path]:
        """Return a context with the folder; without a folder, with a temporary one."""
        return tempfile.TemporaryDirectory() if self.folder is None else nullcontext(self.folder)


def run_samples(
    folder: str | Path,
    kind: RunKind,
    samples: Sequence[PlannedRun],
    name: str,
    options: RunOptions,
    *,
    check: Callable[[], None] | None = None,
) -> list[Record]:
    """Measure all samples that the folder does not hold yet, and return the records of all.

    Args:
        folder: the folder of the study.
        kind: the kind of run.
        samples: settings and seed of each sample.
        name: name of the study in the folder.
        options: how to run.
        check: called before the first sample is measured, and not if the folder holds all of them.

    Raises:
        SufficeError: samples failed. If there is a folder, the others are stored, and a second call repeats the
            failed ones.

    """
    if check is not None and not _holds_all(folder, kind, samples):
        check()
    about = {"command": options.command} if options.command else {}
    run_study(
        folder,
        kind,
        samples,
        name=name,
        about=about,
        workers=options.workers,
        retry_failed=True,
        on_progress=options.on_progress,
    )
    with Store(folder, read_only=True) as store:
        records = list(store.records(name))
    if unfinished := [record for record in records if record.state != "done"]:
        first = unfinished[0]
        reason = first.error.strip().splitlines()[-1] if first.error else first.state
        others = "the others are stored"
        if options.folder is None:
            others = "the others are lost, because no folder was given (run=RunOptions(folder), or --folder)"
        raise SufficeError(
            f"{len(unfinished)} of {len(records)} samples are not done; {others}. The first unfinished sample has seed "
            f"{first.seed}: {reason}"
        )
    return records


def _holds_all(folder: str | Path, kind: RunKind, samples: Sequence[PlannedRun]) -> bool:
    """Return whether the folder holds the results of all samples."""
    try:
        with Store(folder, read_only=True) as store:
            return store.num_done(kind, samples) == len(samples)
    except StoreError:  # there is no store yet; one that cannot be used is reported later
        return False
