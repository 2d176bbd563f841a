"""Where runs are done: in this process, or in worker processes with their thread counts set."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from dataclasses import dataclass
from typing import IO, Any, Protocol

from suffice.study.jobs import Job, perform

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Event:
    """What happened to the run in a slot: it said something, it is done, or it failed."""

    slot: int
    said: str = ""
    done: dict[str, Any] | None = None
    failed: str = ""


class Executor(Protocol):
    """A place with slots, each for one run at a time."""

    slots: int

    def submit(self, slot: int, job: Job) -> None:
        """Begin a run in a free slot."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """Return what happened, after at most so many seconds."""
        ...

    def close(self) -> None:
        """End every worker, finished or not."""
        ...


class Inline:
    """The process at hand, one run at a time. A run that crashes takes it along; finished runs are safe."""

    slots = 1

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._job: Job | None = None
        self.listen: Any = None

    def submit(self, slot: int, job: Job) -> None:
        """Keep the run for the next `wait`."""
        self._job = job

    def wait(self, seconds: float) -> list[Event]:
        """Do the run; what it says is passed on at once through `listen`."""
        if self._job is None:
            return []
        job, self._job = self._job, None
        try:
            # What a run prints must not get between a command's own lines.
            with contextlib.redirect_stdout(sys.stderr):
                done = perform(job, lambda text: self.listen(Event(0, said=text)) if self.listen else None)
        except Exception:
            return [Event(0, failed=traceback.format_exc())]
        return [Event(0, done=done)]

    def close(self) -> None:
        """Nothing is left to end."""


class Processes:
    """Worker processes of this machine.

    Args:
        workers: how many.
        threads: of each worker's numerical libraries.

    Raises:
        ValueError: a number is below 1.

    """

    def __init__(self, workers: int, threads: int | None = None) -> None:
        threads = threads or max(1, (os.cpu_count() or 1) // max(workers, 1))
        if workers < 1 or threads < 1:
            raise ValueError(f"workers, threads are {workers}, {threads}; accepted: at least 1")
        self.slots = workers
        self._environment = environment(threads)
        self._events: queue.Queue[tuple[int, int, dict[str, Any] | None]] = queue.Queue()
        self._workers: dict[int, _Worker] = {}

    def submit(self, slot: int, job: Job) -> None:
        """Give the run to the slot's worker, which is started if there is none."""
        worker = self._workers.get(slot)
        if worker is None or not worker.give(job):
            worker = self._workers[slot] = _Worker(slot, self._environment, self._events)
            worker.give(job)

    def wait(self, seconds: float) -> list[Event]:
        """Return what workers said, finished or left undone."""
        found: list[Event] = []
        try:
            while True:
                slot, pid, told = self._events.get(timeout=0 if found else seconds)
                worker = self._workers.get(slot)
                if worker is None or worker.pid != pid:
                    continue
                if told is not None:
                    found.append(Event(slot, **told))
                    continue
                del self._workers[slot]
                found.append(Event(slot, failed=worker.obituary()))
        except queue.Empty:
            return found

    def close(self) -> None:
        """Kill every worker."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()


class _Worker:
    def __init__(self, slot: int, env: dict[str, str], events: queue.Queue[tuple[int, int, dict[str, Any] | None]]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "suffice.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            text=True,
            encoding="utf-8",
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        threading.Thread(target=self._read, args=(slot, self._process.stdout, events), daemon=True).start()

    def give(self, job: Job) -> bool:
        try:
            self._stdin.write(job.to_json() + "\n")
            self._stdin.flush()
        except OSError:
            return False
        return True

    def obituary(self) -> str:
        """Say what is known of a worker that ended by itself."""
        status = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace")[-4000:]
        self._close()
        try:
            how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        except ValueError:
            how = f"with status {status}"
        hint = "; often the machine's memory was full" if status == -9 else ""
        return f"The worker process ended {how}{hint}.\n{said}".rstrip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._log.close()
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _read(self, slot: int, stdout: IO[str], events: queue.Queue[tuple[int, int, dict[str, Any] | None]]) -> None:
        with stdout:
            for line in stdout:
                events.put((slot, self.pid, json.loads(line)))
        events.put((slot, self.pid, None))


def environment(threads: int) -> dict[str, str]:
    """Return this process's environment for a worker: its modules, and so many threads."""
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_THREADS, str(threads))}
