"""The SQLite database of a store: its tables, its connections, and its errors."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import suffice

FILE_NAME = "study.db"
VERSION = 1
_LOCK_TIMEOUT = 60.0  # seconds to wait for a lock of another process
_APPLICATION_ID = 0x53666663  # "Sffc": distinguishes a store from other databases
_FORMER_APPLICATION_IDS = (0x5265746E,)
_TABLES = """
CREATE TABLE studies (name TEXT PRIMARY KEY, kind TEXT NOT NULL, about TEXT NOT NULL);
CREATE TABLE runs (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, code TEXT NOT NULL, settings TEXT NOT NULL, seed INTEGER NOT NULL,
    inputs TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'missing', owner TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    numbers TEXT, details TEXT, error TEXT, environment TEXT, seconds REAL, ended REAL
) WITHOUT ROWID;
CREATE TABLE plans (
    study TEXT NOT NULL REFERENCES studies, position INTEGER NOT NULL, key TEXT NOT NULL REFERENCES runs,
    PRIMARY KEY (study, position)
) WITHOUT ROWID;
CREATE INDEX runs_by_state ON runs (state, key);
CREATE INDEX plans_by_run ON plans (key);
"""


class StoreError(suffice.SufficeError):
    """A store cannot be used: it is missing, of another version, full, not writable, or not a store at all."""


def connect(folder: Path, *, read_only: bool) -> sqlite3.Connection:
    """Open the database of a store; without `read_only` it is created if it is missing.

    Raises:
        StoreError: the database cannot be used.

    """
    path = folder / FILE_NAME
    if read_only:
        if not path.exists():
            raise StoreError(f"{folder} holds no study ({FILE_NAME} is missing)")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"folder {folder} cannot be created: {error.strerror}") from None
    connection: sqlite3.Connection | None = None
    try:
        connection = _open_to_read(path) if read_only else _open_to_write(path)
        if not read_only:
            _create_tables(connection, path)
        _check_version(connection, path)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise StoreError(explain(error, path)) from None
    except StoreError:
        if connection is not None:
            connection.close()
        raise
    return connection


def explain(error: sqlite3.Error, path: Path) -> str:
    """Return what a database error means and what to do about it."""
    text = str(error)
    if "full" in text:
        return f"no space left to write {path}; the finished runs are safe: free some space and run again"
    if "readonly" in text or "unable to open" in text:
        return f"{path} cannot be written; use a folder that this user may write to"
    if "not a database" in text or "malformed" in text:
        return f"{path} is not a store of runs: {text}"
    return f"{path}: {text}"


def _open_to_write(path: Path) -> sqlite3.Connection:
    connection = _connect(str(path))
    _enable_write_ahead_log(connection)
    # A commit returns after the data is on disk, so that a finished run survives a power failure.
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _open_to_read(path: Path) -> sqlite3.Connection:
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    connection = _connect(address)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        # The index of the write-ahead log cannot be created in a read-only folder. If it does not exist, no other
        # process writes the database, and it can be opened as immutable.
        connection.close()
        connection = _connect(address + "&immutable=1")
    return connection


def _enable_write_ahead_log(connection: sqlite3.Connection) -> None:
    # SQLite does not apply its lock timeout to this statement: when two processes create the same store, one of them
    # gets an error at once.
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _connect(address: str) -> sqlite3.Connection:
    # Autocommit mode: transactions are begun explicitly.
    return sqlite3.connect(address, timeout=_LOCK_TIMEOUT, isolation_level=None, uri=address.startswith("file:"))


def _create_tables(connection: sqlite3.Connection, path: Path) -> None:
    if _pragma(connection, "user_version"):
        return
    # When two processes create the same store, the second waits here and then finds the tables.
    connection.execute("BEGIN IMMEDIATE")
    if _pragma(connection, "user_version") == 0:
        if not _is_empty(connection):
            connection.execute("ROLLBACK")
            raise StoreError(f"{path} is a database, but not a store of runs")
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    version, application_id = _pragma(connection, "user_version"), _pragma(connection, "application_id")
    if application_id in _FORMER_APPLICATION_IDS:
        raise StoreError(
            f"{path} was written by an earlier version of this library, whose runs have other settings and keys; "
            "start a new folder"
        )
    if version == 0 and _is_empty(connection):
        # The process that creates the store has not written the tables yet, or was killed before it did.
        raise StoreError(f"{path.parent} holds no study yet")
    if application_id != _APPLICATION_ID:
        raise StoreError(f"{path} is a database, but not a store of runs")
    if version > VERSION:
        raise StoreError(
            f"{path} was written by a newer version (store version {version}; suffice {suffice.__version__} reads up "
            f"to {VERSION}); install a newer suffice to use it"
        )


def _is_empty(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
