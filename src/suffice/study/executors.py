"""Executors: run jobs in this process, or in worker processes with a fixed number of threads."""

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Protocol

from suffice.study.job import Job, run_job

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class JobEvent:
    """What happened to the job in a slot: a message, its completion, or its failure.

    Args:
        slot: number of the slot.
        message: what the run is doing.
        completed: what `run_job` returned.
        error: traceback of a failed run.

    """

    slot: int
    message: str | None = None
    completed: dict[str, Any] | None = None
    error: str = ""


class Executor(Protocol):
    """A place with a number of slots, each of which executes one job at a time."""

    slots: int

    def submit(self, slot: int, job: Job) -> None:
        """Start a job in a free slot."""
        ...

    def wait(self, seconds: float) -> list[JobEvent]:
        """Return the events that happened, after waiting for at most `seconds`."""
        ...

    def close(self) -> None:
        """Stop all workers, whether they have finished or not."""
        ...


class InlineExecutor:
    """Executes jobs in this process, one at a time.

    A run that crashes the interpreter ends this process as well; the runs finished before are safe.

    Args:
        on_message: called with the event of each message while the run is executed.

    """

    slots = 1

    def __init__(self, on_message: Callable[[JobEvent], None] | None = None) -> None:
        self.on_message = on_message
        self._job: Job | None = None

    def submit(self, slot: int, job: Job) -> None:
        """Keep the job for the next `wait`."""
        self._job = job

    def wait(self, seconds: float) -> list[JobEvent]:
        """Execute the job and return its completion or failure."""
        if self._job is None:
            return []
        job, self._job = self._job, None

        def log(text: str) -> None:
            if self.on_message is not None:
                self.on_message(JobEvent(0, message=text))

        try:
            # Standard output belongs to the command; what a run prints goes to standard error.
            with contextlib.redirect_stdout(sys.stderr):
                completed = run_job(job, log)
        except Exception:
            return [JobEvent(0, error=traceback.format_exc())]
        return [JobEvent(0, completed=completed)]

    def close(self) -> None:
        """Do nothing: there are no workers to stop."""


# A worker's process id and the fields of an event; None for the fields when the worker's output has ended.
_WorkerMessage = tuple[int, int, dict[str, Any] | None]


class ProcessExecutor:
    """Executes jobs in worker processes of this machine.

    Args:
        workers: number of processes.
        threads: threads of the numerical libraries in each process; by default the cores are shared equally.

    Raises:
        ValueError: a number is below 1.

    """

    def __init__(self, workers: int, threads: int | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.slots = workers
        self._environment = worker_environment(threads or max(1, (os.cpu_count() or 1) // workers))
        self._messages: queue.Queue[_WorkerMessage] = queue.Queue()
        self._workers: dict[int, _Worker] = {}

    def submit(self, slot: int, job: Job) -> None:
        """Send the job to the worker of the slot, which is started if there is none."""
        worker = self._workers.get(slot)
        if worker is None or not worker.send(job):
            worker = self._workers[slot] = _Worker(slot, self._environment, self._messages)
            worker.send(job)

    def wait(self, seconds: float) -> list[JobEvent]:
        """Return the messages, completions and failures of workers; a worker that ended counts as a failure."""
        events: list[JobEvent] = []
        try:
            while True:
                slot, pid, fields = self._messages.get(timeout=0 if events else seconds)
                worker = self._workers.get(slot)
                if worker is None or worker.pid != pid:
                    continue
                if fields is not None:
                    events.append(JobEvent(slot, **fields))
                else:
                    del self._workers[slot]
                    events.append(JobEvent(slot, error=worker.describe_exit()))
        except queue.Empty:
            return events

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()


class _Worker:
    """A worker process and the thread that reads its output."""

    def __init__(self, slot: int, environment: dict[str, str], messages: queue.Queue[_WorkerMessage]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "suffice.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        threading.Thread(target=self._read, args=(slot, self._process.stdout, messages), daemon=True).start()

    def send(self, job: Job) -> bool:
        """Send a job; returns False if the process has ended."""
        try:
            self._stdin.write(job.to_json() + "\n")
            self._stdin.flush()
        except OSError:
            return False
        return True

    def describe_exit(self) -> str:
        """Return the exit status of a process that ended by itself, and the end of its standard error."""
        status = self._process.wait()
        self._log.seek(0)
        output = self._log.read().decode("utf-8", "replace")[-4000:]
        self._close()
        try:
            cause = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        except ValueError:
            cause = f"with status {status}"
        hint = "; the machine may have run out of memory" if status == -9 else ""
        return f"The worker process ended {cause}{hint}.\n{output}".rstrip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._log.close()
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _read(self, slot: int, stdout: IO[str], messages: queue.Queue[_WorkerMessage]) -> None:
        with stdout:
            for line in stdout:
                messages.put((slot, self.pid, json.loads(line)))
        messages.put((slot, self.pid, None))


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a worker: those of this process, its module path, and thread counts."""
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
