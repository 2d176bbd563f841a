"""Who is at work: a locked file for each process, which the operating system unlocks when the process is gone."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout


class Owner:
    """A process that does runs of a store. It lives as long as its lock is held; kill -9 ends both.

    Args:
        folder: the store's.

    """

    def __init__(self, folder: str | Path) -> None:
        self.name = uuid.uuid4().hex[:16]
        self._path = _path(Path(folder), self.name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._path)

    def __enter__(self) -> Owner:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def lives(folder: Path, name: str) -> bool:
        """Say whether the process of this name still runs."""
        path = _path(folder, name)
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    @staticmethod
    def forget(folder: Path, name: str) -> None:
        """Remove what a process that is gone has left."""
        _path(folder, name).unlink(missing_ok=True)


def _path(folder: Path, name: str) -> Path:
    return folder / "owners" / f"{name}.lock"
