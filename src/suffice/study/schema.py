"""The database of a store: its tables, how it is opened, and the errors of both."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import suffice

FILE = "study.db"
VERSION = 1
_PATIENCE = 60.0  # seconds to wait for what another process holds
_APPLICATION = 0x5265746E  # "Retn": tells a store from any other database
_TABLES = """
CREATE TABLE studies (name TEXT PRIMARY KEY, kind TEXT NOT NULL, about TEXT NOT NULL);
CREATE TABLE runs (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, code TEXT NOT NULL, settings TEXT NOT NULL, seed INTEGER NOT NULL,
    inputs TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'missing', owner TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    numbers TEXT, rest TEXT, error TEXT, made TEXT, seconds REAL, ended REAL
) WITHOUT ROWID;
CREATE TABLE plans (
    study TEXT NOT NULL REFERENCES studies, position INTEGER NOT NULL, key TEXT NOT NULL REFERENCES runs,
    PRIMARY KEY (study, position)
) WITHOUT ROWID;
CREATE INDEX runs_by_state ON runs (state, key);
CREATE INDEX plans_by_run ON plans (key);
"""


class StoreError(suffice.SufficeError):
    """A store can't be used: it is missing, no store, newer than this code, full, or not writable."""


def connect(folder: Path, *, write: bool) -> sqlite3.Connection:
    """Open a store's database, made if it is missing and to be written.

    Raises:
        StoreError: it can't be used, and why.

    """
    path = folder / FILE
    if write:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"folder {folder} can't be made: {error.strerror}") from None
    elif not path.exists():
        raise StoreError(f"{folder} holds no study ({FILE} is missing)")
    connection: sqlite3.Connection | None = None
    try:
        connection = _open(path, write)
        _check(connection, path, write)
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
    """Say what a database error means for the person who meets it."""
    text = str(error)
    if "full" in text:
        return f"no room to write {path}: the finished runs are safe; make room and run again"
    if "readonly" in text or "unable to open" in text:
        return f"{path} can't be written; accepted: a folder that this user may write to"
    if "not a database" in text or "malformed" in text:
        return f"{path} is no store of runs: {text}"
    return f"{path}: {text}"


def _open(path: Path, write: bool) -> sqlite3.Connection:
    if write:
        connection = _autocommit(str(path))
        _log_ahead(connection)
        # A run is safe when it is said to be, also from a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        return connection
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    connection = _autocommit(address)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        # A folder that can't be written holds no index of the log; without one, nobody else writes it either.
        connection.close()
        connection = _autocommit(address + "&immutable=1")
    return connection


def _log_ahead(connection: sqlite3.Connection) -> None:
    # SQLite waits its time-out for a lock, but not for this one: of two processes that make the same store, one is
    # refused at once.
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _autocommit(address: str) -> sqlite3.Connection:
    # Transactions are begun where they are meant.
    return sqlite3.connect(address, timeout=_PATIENCE, isolation_level=None, uri=address.startswith("file:"))


def _check(connection: sqlite3.Connection, path: Path, write: bool) -> None:
    found = _pragma(connection, "user_version")
    if found == 0 and write:
        # Two processes may make the same store: the second waits and finds it made.
        connection.execute("BEGIN IMMEDIATE")
        if _pragma(connection, "user_version") == 0:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                connection.execute("ROLLBACK")
                raise StoreError(f"{path} is a database, but no store of runs")
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        found = _pragma(connection, "user_version")
    if found == 0 and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        # Its maker is about to fill it, or was killed before that.
        raise StoreError(f"{path.parent} holds no study yet")
    if _pragma(connection, "application_id") != _APPLICATION:
        raise StoreError(f"{path} is a database, but no store of runs")
    if found > VERSION:
        raise StoreError(
            f"{path} is a store of a newer version ({found}; suffice {suffice.__version__} reads up to {VERSION}); "
            "install a newer suffice to use it"
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
