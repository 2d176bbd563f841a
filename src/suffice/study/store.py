"""The store of a study's folder: which runs are wanted, who is at them, and what they gave."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from suffice.study.keys import canonical, run_key
from suffice.study.kinds import Kind
from suffice.study.owners import Owner
from suffice.study.schema import FILE, StoreError, connect, explain
from suffice.study.spec import Planned

__all__ = ["STATES", "Claim", "Record", "Store", "StoreError"]

STATES = ("done", "failed", "running", "missing")
_NUMBERS = ("values", "rows")


@dataclass(frozen=True)
class Claim:
    """A run that this process is to do."""

    key: str
    settings: dict[str, Any]
    seed: int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A run as the store holds it.

    Args:
        key: its name.
        settings: complete.
        seed: of the run.
        state: `done`, `failed`, `running` or `missing`.
        result: what it returned; empty unless it is done.
        error: traceback of its last failure, or empty.
        made: versions, machine and source it was made with.
        seconds: how long it took.
        attempts: how often it was begun.

    """

    key: str
    settings: Mapping[str, Any]
    seed: int
    state: str
    result: Mapping[str, Any]
    error: str
    made: Mapping[str, str]
    seconds: float | None
    attempts: int

    def rows(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return each set of values of the result with the settings that come with it, beside those of the run."""
        rows = [(row.get("settings", {}), row["values"]) for row in self.result.get("rows", ())]
        return [({}, self.result["values"]), *rows] if "values" in self.result else rows


class Store:
    """Finished and wanted runs in a folder, in SQLite; processes of one machine may share it.

    Args:
        folder: made if it is missing and `write`.
        write: False to look only, also where nothing can be written.

    Raises:
        StoreError: the folder holds no store that this code can use.

    """

    def __init__(self, folder: str | Path, *, write: bool = True) -> None:
        self.folder = Path(folder)
        self._path = self.folder / FILE
        self._db = connect(self.folder, write=write)
        self._reached: dict[str, int] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def plan(self, study: str, kind: Kind, runs: Sequence[Planned], about: Mapping[str, Any] | None = None) -> None:
        """Say which runs a study wants, in place of what it wanted before; runs that exist are kept as they are.

        Args:
            study: name in this store.
            kind: of all its runs.
            runs: in the order in which to do them.
            about: what to show of the study: its specification, the command.

        Raises:
            ValueError: two runs are the same.
            StoreError: the store can't be written.

        """
        keys = [run_key(kind.name, kind.code, run.settings, run.seed) for run in runs]
        if len(set(keys)) < len(keys):
            twice = next(run for key, run in zip(keys, runs, strict=True) if keys.count(key) > 1)
            raise ValueError(f"runs hold seed {twice.seed} of {dict(twice.settings)!r} twice; accepted: each once")
        rows = [
            (key, kind.name, kind.code, canonical(run.settings), run.seed, json.dumps(run.inputs))
            for key, run in zip(keys, runs, strict=True)
        ]
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO studies VALUES (?, ?, ?)", (study, kind.name, json.dumps(about or {})))
            db.execute("DELETE FROM plans WHERE study = ?", (study,))
            db.executemany(
                "INSERT OR IGNORE INTO runs (key, kind, code, settings, seed, inputs) VALUES (?, ?, ?, ?, ?, ?)", rows
            )
            db.executemany("INSERT INTO plans VALUES (?, ?, ?)", ((study, n, key) for n, key in enumerate(keys)))

    def claim(self, study: str, owner: Owner) -> Claim | None:
        """Return a missing run of a study that is this owner's from now on, or None if there is none."""
        query = (
            "SELECT key, settings, seed, inputs, position FROM plans JOIN runs USING (key) "
            "WHERE study = ? AND state = 'missing' AND position >= ? ORDER BY position LIMIT 1"
        )
        with self._transaction() as db:
            # On from the last one, else every claim would read all that is done; then from the start.
            reached = self._reached.get(study, 0)
            row = db.execute(query, (study, reached)).fetchone()
            if row is None and reached:
                row = db.execute(query, (study, 0)).fetchone()
            if row is None:
                return None
            self._reached[study] = row[4]
            db.execute(
                "UPDATE runs SET state = 'running', owner = ?, attempts = attempts + 1 WHERE key = ?",
                (owner.name, row[0]),
            )
        return Claim(row[0], json.loads(row[1]), row[2], tuple(json.loads(row[3])))

    def recover(self, owner: Owner) -> int:
        """Make runs missing again whose process is gone, and return how many."""
        found = self._all("SELECT DISTINCT owner FROM runs WHERE state = 'running' AND owner != ?", (owner.name,))
        gone = [name for (name,) in found if not Owner.lives(self.folder, name)]
        freed = 0
        with self._transaction() as db:
            for name in gone:
                freed += db.execute(
                    "UPDATE runs SET state = 'missing', owner = NULL WHERE state = 'running' AND owner = ?", (name,)
                ).rowcount
        for name in gone:
            Owner.forget(self.folder, name)
        return freed

    def finish(
        self, key: str, owner: Owner, result: Mapping[str, Any], made: Mapping[str, str], seconds: float
    ) -> bool:
        """Keep the result of a run; False if it isn't this owner's any more.

        Raises:
            StoreError: there is no room; what was finished before is safe.

        """
        numbers = {name: result[name] for name in _NUMBERS if name in result}
        rest = {name: value for name, value in result.items() if name not in _NUMBERS}
        values = (json.dumps(numbers), json.dumps(rest), json.dumps(made), seconds, time.time(), key, owner.name)
        with self._transaction() as db:
            return bool(
                db.execute(
                    "UPDATE runs SET state = 'done', owner = NULL, error = NULL, numbers = ?, rest = ?, made = ?, "
                    "seconds = ?, ended = ? WHERE key = ? AND state = 'running' AND owner = ?",
                    values,
                ).rowcount
            )

    def fail(self, key: str, owner: Owner, error: str) -> None:
        """Keep the traceback of a failed run."""
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET state = 'failed', owner = NULL, error = ?, ended = ? "
                "WHERE key = ? AND state = 'running' AND owner = ?",
                (error, time.time(), key, owner.name),
            )

    def release(self, owner: Owner) -> None:
        """Make an owner's unfinished runs missing again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET state = 'missing', owner = NULL WHERE state = 'running' AND owner = ?", (owner.name,)
            )

    def retry(self, study: str) -> int:
        """Make a study's failed runs missing again, and return how many."""
        with self._transaction() as db:
            return db.execute(
                "UPDATE runs SET state = 'missing' WHERE state = 'failed' "
                "AND key IN (SELECT key FROM plans WHERE study = ?)",
                (study,),
            ).rowcount

    def drop(self, keys: Sequence[str]) -> None:
        """Forget what runs gave, so that they are done again."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE runs SET state = 'missing', owner = NULL, numbers = NULL, rest = NULL, error = NULL "
                "WHERE key = ? AND state IN ('done', 'failed')",
                ((key,) for key in keys),
            )

    def studies(self) -> dict[str, dict[str, Any]]:
        """Return each study's kind and what `plan` was told about it."""
        found = self._all("SELECT name, kind, about FROM studies ORDER BY rowid")
        return {name: {"kind": kind, **json.loads(about)} for name, kind, about in found}

    def only(self, study: str | None = None) -> str:
        """Return the name of a study: the one asked for, or the only one.

        Raises:
            StoreError: there is no such study, or none or several to choose from.

        """
        names = list(self.studies())
        if study is not None and study not in names:
            raise StoreError(f"study is {study!r}; {self.folder} holds: {', '.join(names) or 'none'}")
        if study is None and len(names) != 1:
            raise StoreError(f"{self.folder} holds {', '.join(names) or 'no study'}; name one with --study")
        return study or names[0]

    def counts(self, study: str) -> dict[str, int]:
        """Return how many of a study's runs are in each state."""
        found = Counter(
            dict(
                self._all(
                    "SELECT state, count(*) FROM plans JOIN runs USING (key) WHERE study = ? GROUP BY state", (study,)
                )
            )
        )
        return {state: found[state] for state in STATES}

    def overview(self, study: str) -> tuple[dict[str, int], float, dict[str, int]]:
        """Return counts by state, the seconds that finished runs took, and how many each source of the package made."""
        query = (
            "SELECT state, json_extract(made, '$.source'), count(*), total(seconds) "
            "FROM plans JOIN runs USING (key) WHERE study = ? GROUP BY 1, 2"
        )
        counts: dict[str, int] = dict.fromkeys(STATES, 0)
        seconds, sources = 0.0, dict[str, int]()
        for state, source, number, took in self._all(query, (study,)):
            counts[state] += number
            if state == "done":
                seconds += took
                sources[source or ""] = sources.get(source or "", 0) + number
        return counts, seconds, sources

    def records(self, study: str, state: str | None = None, *, whole: bool = True) -> Iterator[Record]:
        """Return a study's runs in the order of its plan.

        Args:
            study: which.
            state: only runs in this state.
            whole: False to leave out of results what is not a number to compare; quicker.

        """
        rest = "rest" if whole else "NULL"
        query = (
            f"SELECT key, settings, seed, state, numbers, {rest}, error, made, seconds, attempts "
            # The few runs that failed are found by their state, all others in the order of the plan.
            + ("FROM runs CROSS JOIN plans USING (key) " if state == "failed" else "FROM plans JOIN runs USING (key) ")
            + "WHERE study = ?"
            + (" AND state = ?" if state else "")
        )
        parsed = lru_cache(maxsize=4096)(json.loads)
        for row in self._db.execute(query + " ORDER BY position", (study, state) if state else (study,)):
            result = {**json.loads(row[5] or "{}"), **json.loads(row[4] or "{}")} if row[3] == "done" else {}
            yield Record(
                row[0], parsed(row[1]), row[2], row[3], result, row[6] or "", parsed(row[7] or "{}"), row[8], row[9]
            )

    def _all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(explain(error, self._path)) from error

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        try:
            # Immediate: what is read is still so when it is written.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(explain(error, self._path)) from error
