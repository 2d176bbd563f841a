"""Runs on a Ray cluster: the same function that a worker of this machine calls, as a task with its own threads."""

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

from suffice.study.executors import Event, environment
from suffice.study.jobs import Job, perform
from suffice.study.schema import FILE


class RayExecutor:
    """Tasks on a Ray cluster. A node that goes away takes no result with it: its tasks are done elsewhere.

    Args:
        address: of the cluster, as `ray.init` takes it: `auto`, `HOST:6379`, `ray://HOST:10001`; `local` starts one.
        workers: most tasks at a time; as many as the cluster's cores allow without it.
        threads: of each task, which asks for so many cores.

    Raises:
        ValueError: Ray is missing, there is no cluster at the address, or it is too small.

    """

    def __init__(self, address: str, workers: int | None = None, threads: int = 1) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ValueError(
                f"ray is {address!r}, but Ray is missing; install it: pip install 'suffice[scale]'"
            ) from None
        variables = {name: value for name, value in environment(threads).items() if value != os.environ.get(name)}
        self._mine = not self._ray.is_initialized()
        if self._mine:
            try:
                self._ray.init(
                    address=address,
                    log_to_driver=False,
                    runtime_env={"env_vars": variables},
                    configure_logging=False,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"ray is {address!r}; accepted: the address of a Ray cluster ({error})") from None
        room = int(self._ray.cluster_resources().get("CPU", 0)) // threads
        if room < 1:
            self.close()
            raise ValueError(f"threads is {threads}; accepted: at most the cores of the Ray cluster")
        self.slots = min(workers or room, room)
        self._task = self._ray.remote(num_cpus=threads, max_retries=2)(perform_remotely)
        self._slots: dict[Any, int] = {}
        self._inputs: dict[str, Any] = {}

    def submit(self, slot: int, job: Job) -> None:
        """Send the run, and the files it reads, to the cluster."""
        for name in job.inputs:
            if name not in self._inputs:
                self._inputs[name] = self._ray.put((Path(job.folder) / name).read_bytes())
        names = list(job.inputs)
        reference = self._task.remote(job.to_json(), names, *(self._inputs[name] for name in names))
        self._slots[reference] = slot

    def wait(self, seconds: float) -> list[Event]:
        """Return what has ended."""
        ready, _ = self._ray.wait(list(self._slots), num_returns=1, timeout=seconds)
        found: list[Event] = []
        for reference in ready:
            slot = self._slots.pop(reference)
            try:
                found.append(Event(slot, **json.loads(self._ray.get(reference))))
            except self._ray.exceptions.RayError:
                found.append(Event(slot, failed=traceback.format_exc()))
        return found

    def close(self) -> None:
        """Leave the cluster; tasks that still run are cancelled."""
        for reference in getattr(self, "_slots", {}):
            self._ray.cancel(reference, force=True)
        if self._mine:
            self._ray.shutdown()


def perform_remotely(text: str, names: list[str], *contents: bytes) -> str:
    """Do a run on a node, which may not see the study's folder; return JSON of an event's `done` or `failed`."""
    job = Job.from_json(text)
    folder = Path(job.folder)
    if not (folder / FILE).exists():
        digest = hashlib.sha256(job.folder.encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"suffice-{digest}"
        for name, content in zip(names, contents, strict=True):
            _place(folder / name, content)
    try:
        return json.dumps({"done": perform(replace(job, folder=str(folder)), lambda _: None)})
    except Exception:
        return json.dumps({"failed": traceback.format_exc()})


def _place(path: Path, content: bytes) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(half, path)
