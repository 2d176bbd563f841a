"""An executor on a Ray cluster, on which each job is a task that calls the same function as a worker process."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from suffice.study.database import FILE_NAME
from suffice.study.executors import JobEvent, worker_environment
from suffice.study.job import Job, run_job


class RayExecutor:
    """Executes jobs as tasks on a Ray cluster. If a node fails, its tasks are repeated on another one.

    Args:
        address: address of the cluster as `ray.init` takes it: `auto`, `HOST:6379` or `ray://HOST:10001`; `local`
            starts a cluster on this machine.
        workers: largest number of tasks at a time; by default, all cores of the cluster are used.
        threads: threads of each task, which is also the number of cores that it reserves.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or the cluster is too small.

    """

    def __init__(self, address: str, workers: int | None = None, threads: int = 1) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ValueError(
                f"ray must be None where Ray is not installed, got {address!r}; run: pip install 'suffice[scale]'"
            ) from None
        variables = {
            name: value for name, value in worker_environment(threads).items() if value != os.environ.get(name)
        }
        self._started_here = not self._ray.is_initialized()
        if self._started_here:
            try:
                self._ray.init(
                    address=address,
                    log_to_driver=False,
                    runtime_env={"env_vars": variables},
                    configure_logging=False,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"ray must be the address of a Ray cluster, got {address!r} ({error})") from None
        max_tasks = int(self._ray.cluster_resources().get("CPU", 0)) // threads
        if max_tasks < 1:
            self.close()
            raise ValueError(f"threads must be at most the number of cores of the Ray cluster, got {threads}")
        self.slots = min(workers or max_tasks, max_tasks)
        self._task = self._ray.remote(num_cpus=threads, max_retries=2)(run_remotely)
        self._slots: dict[Any, int] = {}
        self._inputs: dict[str, Any] = {}

    def submit(self, slot: int, job: Job) -> None:
        """Send the job, and the files that it reads, to the cluster."""
        for name in job.inputs:
            if name not in self._inputs:
                self._inputs[name] = self._ray.put((Path(job.folder) / name).read_bytes())
        names = list(job.inputs)
        reference = self._task.remote(job.to_json(), names, *(self._inputs[name] for name in names))
        self._slots[reference] = slot

    def wait(self, seconds: float) -> list[JobEvent]:
        """Return the completions and failures of tasks."""
        ready, _ = self._ray.wait(list(self._slots), num_returns=1, timeout=seconds)
        events: list[JobEvent] = []
        for reference in ready:
            slot = self._slots.pop(reference)
            try:
                events.append(JobEvent(slot, **json.loads(self._ray.get(reference))))
            except self._ray.exceptions.RayError:
                events.append(JobEvent(slot, error=traceback.format_exc()))
        return events

    def close(self) -> None:
        """Cancel the tasks that still run and disconnect from the cluster."""
        for reference in getattr(self, "_slots", {}):
            self._ray.cancel(reference, force=True)
        if self._started_here:
            self._ray.shutdown()


def run_remotely(job_json: str, names: list[str], *contents: bytes) -> str:
    """Execute a run on a node of the cluster.

    Args:
        job_json: the job, as JSON.
        names: names of the files that it reads. They are written to a temporary folder if the node has no access to the
            study's folder.
        contents: contents of these files.

    Returns:
        `completed` or `error` of the job's event, as JSON.

    """
    job = Job.from_json(job_json)
    folder = Path(job.folder)
    if not (folder / FILE_NAME).exists():
        digest = hashlib.sha256(job.folder.encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"suffice-{digest}"
        for name, content in zip(names, contents, strict=True):
            _write_once(folder / name, content)
    try:
        return json.dumps({"completed": run_job(replace(job, folder=str(folder)), lambda _: None)})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})


def _write_once(path: Path, content: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
