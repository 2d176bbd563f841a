"""The runner, which executes the missing runs of a study and stores the result of each run when it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffice.arguments import check_int
from suffice.study.executors import Executor, InlineExecutor, JobEvent, ProcessExecutor
from suffice.study.job import Job
from suffice.study.owner import Owner
from suffice.study.progress import Progress, ProgressCallback, WorkerStatus, make_run_labeler
from suffice.study.ray_executor import RayExecutor
from suffice.study.run_kind import RunKind
from suffice.study.spec import PlannedRun, Spec
from suffice.study.store import ClaimedRun, Store, StoreError

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Outcome:
    """The state of a study after a call of `run_study`.

    Args:
        study: name of the study.
        done: number of done runs.
        failed: number of failed runs.
        new: number of runs that this call has completed.
        recovered: number of runs that were taken over from processes that had ended.
        seconds: duration of the call.

    """

    study: str
    done: int
    failed: int
    new: int
    recovered: int
    seconds: float


def run_study(
    folder: str | Path,
    kind: RunKind,
    study: Spec | Sequence[PlannedRun],
    *,
    name: str = "study",
    about: Mapping[str, Any] | None = None,
    workers: int = 0,
    threads: int | None = None,
    ray: str | None = None,
    retry_failed: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Outcome:
    """Execute every run of a study whose result is not in its folder yet.

    Each run is stored when it ends, so that a call that is killed loses only the runs in progress. The next call
    resumes these first. Several calls on one folder share the work: no run is executed twice, and all calls return when
    no run is missing.

    Args:
        folder: folder of the store; created if it is missing.
        kind: kind of all runs.
        study: a grid, or a list of runs.
        name: name of the study in the store if `study` is a list of runs; a `Spec` has its own name.
        about: information about the study for reports and exports, such as the command.
        workers: number of worker processes on this machine; 0 to run in this process. With `ray`, the largest number of
            tasks at a time.
        threads: threads of each worker; by default the cores are shared equally.
        ray: address of a Ray cluster to run on.
        retry_failed: run failed runs again.
        on_progress: shows progress.

    Returns:
        the number of done and failed runs.

    Raises:
        ValueError: a setting of the study or an argument is not accepted.
        StoreError: the folder cannot be used or is full.

    """
    if isinstance(study, Spec):
        name, about = study.name, {"spec": study.to_dict(), **(about or {})}
        study = study.plan(kind)
    if not study:
        raise ValueError("study must have at least one run, got none")
    workers = check_int("workers", workers, 0)
    label = make_run_labeler([kind.flatten(run.settings) for run in study])
    with Store(folder) as store:
        store.plan(name, kind, study, about)
        if retry_failed:
            store.reset_failed(name)
        executor = _make_executor(min(workers, len(study)), threads, ray)
        with Owner(folder) as owner, contextlib.closing(executor):
            runner = _Runner(store, owner, executor, kind, name, label, on_progress or _ignore_progress)
            try:
                return runner.run()
            except BaseException:
                # If the disk is full, the runs become missing anyway when this process ends and its lock is released.
                with contextlib.suppress(StoreError):
                    store.release(owner)
                raise


def _make_executor(workers: int, threads: int | None, ray: str | None) -> Executor:
    if ray is not None:
        return RayExecutor(ray, workers or None, threads or 1)
    return ProcessExecutor(workers, threads) if workers else InlineExecutor()


def _ignore_progress(progress: Progress, line: str) -> None:
    pass


class _Runner:
    """Claims runs, submits them to the slots of an executor, and stores their results."""

    def __init__(
        self,
        store: Store,
        owner: Owner,
        executor: Executor,
        kind: RunKind,
        study: str,
        label: Callable[[Mapping[str, Any], int], str],
        on_progress: ProgressCallback,
    ) -> None:
        self._store, self._owner, self._executor, self._kind, self._study = store, owner, executor, kind, study
        self._label, self._on_progress = label, on_progress
        self._busy: dict[int, ClaimedRun] = {}
        self._new = self._recovered = 0
        counts = store.counts(study)
        ended = counts["done"] + counts["failed"]
        self._progress = Progress(sum(counts.values()), counts["done"], counts["failed"], executor.slots, ended)
        if isinstance(executor, InlineExecutor):
            executor.on_message = self._handle

    def run(self) -> Outcome:
        # Before the first claim, so that interrupted runs are resumed first.
        self._recovered = self._store.recover(self._owner)
        last_fill = 0.0
        while True:
            if len(self._busy) < self._executor.slots and time.monotonic() - last_fill >= _POLL_SECONDS:
                all_slots_busy = self._fill_slots()
                last_fill = 0.0 if all_slots_busy else time.monotonic()
                if not all_slots_busy and not self._busy and self._is_finished():
                    break
            if not self._busy:
                time.sleep(_POLL_SECONDS)
                continue
            for event in self._executor.wait(_POLL_SECONDS):
                self._handle(event)
                if event.message is None:
                    last_fill = 0.0  # a slot is free: fill it at once
        counts = self._store.counts(self._study)
        seconds = time.monotonic() - self._progress.start
        return Outcome(self._study, counts["done"], counts["failed"], self._new, self._recovered, seconds)

    def _fill_slots(self) -> bool:
        """Claim and submit a run for every free slot; returns False if there were too few runs."""
        for slot in range(self._executor.slots):
            if slot in self._busy:
                continue
            claimed = self._store.claim(self._study, self._owner)
            if claimed is None and (recovered := self._store.recover(self._owner)):
                self._recovered += recovered
                claimed = self._store.claim(self._study, self._owner)
            if claimed is None:
                return False
            self._busy[slot] = claimed
            label = self._label(self._kind.flatten(claimed.settings), claimed.seed)
            self._progress.workers[slot] = WorkerStatus(label, time.monotonic())
            folder = str(self._store.folder.resolve())
            job = Job(claimed.key, self._kind.function, claimed.settings, claimed.seed, folder, claimed.inputs)
            self._executor.submit(slot, job)
            self._on_progress(self._progress, "")
        return True

    def _is_finished(self) -> bool:
        counts = self._store.counts(self._study)
        progress = self._progress
        progress.done, progress.failed, progress.elsewhere = counts["done"], counts["failed"], counts["running"]
        self._on_progress(progress, "")
        return not counts["running"] and not counts["missing"]

    def _handle(self, event: JobEvent) -> None:
        claimed = self._busy.get(event.slot)
        if claimed is None:
            return
        progress = self._progress
        worker = progress.workers[event.slot]
        if event.message is not None:
            worker.message = event.message
            self._on_progress(progress, "")
            return
        del self._busy[event.slot], progress.workers[event.slot]
        if event.completed is not None:
            stored = self._store.finish(claimed.key, self._owner, **event.completed)
            self._new += stored
            progress.done += stored
            self._on_progress(progress, f"{worker.label}: {worker.message or 'done'}")
        else:
            self._store.fail(claimed.key, self._owner, event.error)
            progress.failed += 1
            self._on_progress(progress, f"{worker.label}: failed: {event.error.strip().splitlines()[-1]}")
