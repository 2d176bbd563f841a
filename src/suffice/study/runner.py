"""The runner: does what a study is missing, keeps each run when it ends, and shares a store with others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffice.study.executors import Event, Executor, Inline, Processes
from suffice.study.jobs import Job
from suffice.study.kinds import Kind
from suffice.study.owners import Owner
from suffice.study.progress import Progress, Watcher, Working, labels
from suffice.study.ray_executor import RayExecutor
from suffice.study.spec import Planned, Spec
from suffice.study.store import Claim, Store, StoreError


@dataclass(frozen=True)
class Outcome:
    """What a call did: how many of the study's runs are done and failed, how many of them in this call."""

    study: str
    done: int
    failed: int
    new: int
    recovered: int
    seconds: float


def run_study(
    folder: str | Path,
    kind: Kind,
    study: Spec | Sequence[Planned],
    *,
    name: str = "study",
    about: Mapping[str, Any] | None = None,
    workers: int = 0,
    threads: int | None = None,
    ray: str | None = None,
    retry: bool = False,
    watch: Watcher | None = None,
) -> Outcome:
    """Do every run of a study that its folder doesn't hold yet.

    Each run is kept when it ends, so that a call that was killed loses only what it was at. Several calls on one
    folder share the work; none does a run that another is at, and all return when there is nothing left.

    Args:
        folder: of the store; made if it is missing.
        kind: what a run is.
        study: a grid, or runs one by one.
        name: of the study in the store, where `study` is no `Spec`.
        about: what else the store is to tell of the study, as the command.
        workers: processes of this machine; 0 for this very process. With `ray`, most tasks at a time.
        threads: of each worker; by default the cores are shared out.
        ray: address of a Ray cluster to run on instead.
        retry: try failed runs again.
        watch: shows progress.

    Raises:
        ValueError: the study, or the place to run it, is impossible.
        StoreError: the folder can't be used, or is full.

    """
    if isinstance(study, Spec):
        name, about = study.name, {"spec": study.to_dict(), **(about or {})}
        study = study.plan(kind)
    if not study:
        raise ValueError("study has no runs; accepted: at least one")
    if workers < 0:
        raise ValueError(f"workers is {workers}; accepted: at least 0")
    with Store(folder) as store, Owner(folder) as owner:
        store.plan(name, kind, study, about)
        if retry:
            store.retry(name)
        executor: Executor = (
            RayExecutor(ray, workers or None, threads or 1)
            if ray is not None
            else Processes(min(workers, len(study)), threads)
            if workers
            else Inline()
        )
        loop = _Loop(store, owner, executor, kind, name, labels(study), watch or _unwatched)
        try:
            return loop.run()
        except BaseException:
            # What a full disk keeps us from saying, our lock says when this process ends.
            with contextlib.suppress(StoreError):
                store.release(owner)
            raise
        finally:
            executor.close()


def _unwatched(progress: Progress, line: str) -> None:
    pass


class _Loop:
    def __init__(
        self,
        store: Store,
        owner: Owner,
        executor: Executor,
        kind: Kind,
        study: str,
        label: Callable[[Mapping[str, Any], int], str],
        watch: Watcher,
        poll: float = 0.25,
    ) -> None:
        self._store, self._owner, self._executor, self._kind, self._study = store, owner, executor, kind, study
        self._label, self._watch, self._poll = label, watch, poll
        self._busy: dict[int, Claim] = {}
        self._new = self._recovered = 0
        counts = store.counts(study)
        ended = counts["done"] + counts["failed"]
        self._progress = Progress(sum(counts.values()), counts["done"], counts["failed"], executor.slots, ended)
        if isinstance(executor, Inline):
            executor.listen = self._handle

    def run(self) -> Outcome:
        looked = 0.0
        while True:
            if len(self._busy) < self._executor.slots and time.monotonic() - looked >= self._poll:
                full = self._fill()
                looked = 0.0 if full else time.monotonic()
                if not full and not self._busy and self._over():
                    break
            if not self._busy:
                time.sleep(self._poll)
                continue
            for event in self._executor.wait(self._poll):
                self._handle(event)
                # A slot is free: look at once.
                looked = looked if event.said else 0.0
        counts = self._store.counts(self._study)
        seconds = time.monotonic() - self._progress.start
        return Outcome(self._study, counts["done"], counts["failed"], self._new, self._recovered, seconds)

    def _fill(self) -> bool:
        """Claim a run for every free slot; False if there were too few."""
        for slot in range(self._executor.slots):
            if slot in self._busy:
                continue
            claim = self._store.claim(self._study, self._owner)
            if claim is None and (freed := self._store.recover(self._owner)):
                self._recovered += freed
                claim = self._store.claim(self._study, self._owner)
            if claim is None:
                return False
            self._busy[slot] = claim
            self._progress.workers[slot] = Working(self._label(claim.settings, claim.seed), time.monotonic())
            folder = str(self._store.folder.resolve())
            job = Job(claim.key, self._kind.run, claim.settings, claim.seed, folder, claim.inputs)
            self._executor.submit(slot, job)
            self._watch(self._progress, "")
        return True

    def _over(self) -> bool:
        counts = self._store.counts(self._study)
        progress = self._progress
        progress.done, progress.failed, progress.elsewhere = counts["done"], counts["failed"], counts["running"]
        self._watch(progress, "")
        return not counts["running"] and not counts["missing"]

    def _handle(self, event: Event) -> None:
        claim = self._busy.get(event.slot)
        if claim is None:
            return
        progress = self._progress
        work = progress.workers[event.slot]
        if event.said:
            work.said = event.said
            self._watch(progress, "")
            return
        del self._busy[event.slot], progress.workers[event.slot]
        if event.done is not None:
            kept = self._store.finish(claim.key, self._owner, **event.done)
            self._new += kept
            progress.done += kept
            self._watch(progress, f"{work.label}: {work.said or 'done'}")
            return
        self._store.fail(claim.key, self._owner, event.failed)
        progress.failed += 1
        self._watch(progress, f"{work.label}: failed: {event.failed.strip().splitlines()[-1]}")
