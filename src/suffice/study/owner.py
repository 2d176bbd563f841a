"""The owner of runs in progress: a process that holds the lock of a file until it ends."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout


class Owner:
    """A process that executes runs of a store, for as long as it holds the lock of its file.

    The operating system releases the lock when the process ends, also after `kill -9`, so that other processes can tell
    whether a run in progress is still executed.

    Args:
        folder: folder of the store.

    """

    def __init__(self, folder: str | Path) -> None:
        self.name = uuid.uuid4().hex[:16]
        self._path = _lock_path(Path(folder), self.name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._path)

    def __enter__(self) -> Owner:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def is_alive(folder: Path, name: str) -> bool:
        """Whether the process of an owner still runs."""
        path = _lock_path(folder, name)
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    @staticmethod
    def remove(folder: Path, name: str) -> None:
        """Remove the lock file of an owner whose process has ended."""
        _lock_path(folder, name).unlink(missing_ok=True)


def _lock_path(folder: Path, name: str) -> Path:
    return folder / "owners" / f"{name}.lock"
