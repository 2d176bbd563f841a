"""The store in the folder of a study: planned runs, the processes that execute them, and their results."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from suffice.study.database import FILE_NAME, StoreError, connect, explain
from suffice.study.nested_settings import nest
from suffice.study.owner import Owner
from suffice.study.run_key import canonical_json, run_key
from suffice.study.run_kind import RunKind
from suffice.study.spec import PlannedRun

__all__ = ["STATES", "ClaimedRun", "Record", "Store", "StoreError"]

STATES = ("done", "failed", "running", "missing")
_NUMBERS = ("values", "rows")  # parts of a result that hold the numbers to compare


@dataclass(frozen=True)
class ClaimedRun:
    """A run that an owner has claimed and is about to execute.

    Args:
        key: key of the run.
        settings: complete settings, nested as the kind of run defines them.
        seed: seed of the run.
        inputs: files that the run reads, relative to the study's folder.

    """

    key: str
    settings: dict[str, Any]
    seed: int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A run in the store.

    Args:
        key: key of the run.
        settings: complete settings, nested as the kind of run defines them.
        flat_settings: the same settings by dotted name.
        seed: seed of the run.
        state: `done`, `failed`, `running` or `missing`.
        result: what the run returned; empty unless it is done.
        error: traceback of the last failure, or empty.
        environment: versions, machine and source that the run was executed with.
        seconds: how long the run took.
        attempts: how many times the run was started.

    """

    key: str
    settings: Mapping[str, Any]
    flat_settings: Mapping[str, Any]
    seed: int
    state: str
    result: Mapping[str, Any]
    error: str
    environment: Mapping[str, str]
    seconds: float | None
    attempts: int

    def rows(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return pairs (settings, values): the values of the run, and the settings and values of each of its rows."""
        rows = [(row.get("settings", {}), row["values"]) for row in self.result.get("rows", ())]
        return [({}, self.result["values"]), *rows] if "values" in self.result else rows


class Store:
    """Planned and finished runs in an SQLite database, which several processes of one machine may share.

    Args:
        folder: folder of the store; created if it is missing, unless `read_only`.
        read_only: open the store without writing, which also works in a folder that is not writable.

    Raises:
        StoreError: the folder holds no store that this version can use.

    """

    def __init__(self, folder: str | Path, *, read_only: bool = False) -> None:
        self.folder = Path(folder)
        self._path = self.folder / FILE_NAME
        self._database = connect(self.folder, read_only=read_only)
        self._last_claimed: dict[str, int] = {}
        self._without_interrupted: set[str] = set()  # studies that had no interrupted run when it was last looked for

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def plan(
        self, study: str, kind: RunKind, runs: Sequence[PlannedRun], about: Mapping[str, Any] | None = None
    ) -> None:
        """Set the runs of a study; they replace its previous plan. Existing runs keep their state and results.

        Args:
            study: name of the study in this store.
            kind: kind of all its runs.
            runs: runs in the order of execution.
            about: information about the study that reports and exports show, such as the command.

        Raises:
            ValueError: two runs are the same.
            StoreError: the store cannot be written.

        """
        flat = [kind.flatten(run.settings) for run in runs]
        keys = _keys(kind, runs)
        if len(set(keys)) < len(keys):
            repeated = next(n for n, key in enumerate(keys) if key in keys[:n])
            raise ValueError(f"runs must be distinct, got seed {runs[repeated].seed} of {flat[repeated]!r} twice")
        rows = [
            (key, kind.name, kind.code_version, canonical_json(settings), run.seed, json.dumps(run.inputs))
            for key, settings, run in zip(keys, flat, runs, strict=True)
        ]
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO studies VALUES (?, ?, ?)", (study, kind.name, json.dumps(about or {}))
            )
            database.execute("DELETE FROM plans WHERE study = ?", (study,))
            database.executemany(
                "INSERT OR IGNORE INTO runs (key, kind, code, settings, seed, inputs) VALUES (?, ?, ?, ?, ?, ?)", rows
            )
            database.executemany("INSERT INTO plans VALUES (?, ?, ?)", ((study, n, key) for n, key in enumerate(keys)))

    def claim(self, study: str, owner: Owner) -> ClaimedRun | None:
        """Claim a missing run of a study for an owner; None if no run is missing.

        Runs that were interrupted come first, because they can resume from their checkpoints. All others, and runs that
        failed before, are claimed in the order of the plan.
        """
        query = (
            "SELECT key, settings, seed, inputs, position FROM plans JOIN runs USING (key) "
            "WHERE study = ? AND state = 'missing' AND position >= ? {} ORDER BY position LIMIT 1"
        )
        with self._transaction() as database:
            row = None
            if study not in self._without_interrupted:
                row = database.execute(query.format("AND attempts > 0 AND error IS NULL"), (study, 0)).fetchone()
            if row is None:
                self._without_interrupted.add(study)
                # Search from the last claimed position first: a search from the start would read all finished runs.
                start = self._last_claimed.get(study, 0)
                row = database.execute(query.format(""), (study, start)).fetchone()
                if row is None and start:
                    row = database.execute(query.format(""), (study, 0)).fetchone()
                if row is None:
                    return None
                self._last_claimed[study] = row[4]
            # An error of an earlier attempt is cleared: this attempt may be interrupted, which is no failure.
            database.execute(
                "UPDATE runs SET state = 'running', owner = ?, error = NULL, attempts = attempts + 1 WHERE key = ?",
                (owner.name, row[0]),
            )
        return ClaimedRun(row[0], nest(json.loads(row[1])), row[2], tuple(json.loads(row[3])))

    def recover(self, owner: Owner) -> int:
        """Make the runs of owners whose process has ended missing again, and return their number."""
        rows = self._fetch_all("SELECT DISTINCT owner FROM runs WHERE state = 'running' AND owner != ?", (owner.name,))
        dead = [name for (name,) in rows if not Owner.is_alive(self.folder, name)]
        recovered = 0
        with self._transaction() as database:
            for name in dead:
                recovered += database.execute(
                    "UPDATE runs SET state = 'missing', owner = NULL WHERE state = 'running' AND owner = ?", (name,)
                ).rowcount
        for name in dead:
            Owner.remove(self.folder, name)
        if recovered:
            self._without_interrupted.clear()
        return recovered

    def finish(
        self, key: str, owner: Owner, result: Mapping[str, Any], environment: Mapping[str, str], seconds: float
    ) -> bool:
        """Store the result of a run; return False and store nothing if the owner no longer owns the run.

        Raises:
            StoreError: there is no space left. Results that were stored before are safe.

        """
        numbers = {name: result[name] for name in _NUMBERS if name in result}
        details = {name: value for name, value in result.items() if name not in _NUMBERS}
        values = (
            *(json.dumps(part) for part in (numbers, details, environment)),
            *(seconds, time.time(), key, owner.name),
        )
        with self._transaction() as database:
            return bool(
                database.execute(
                    "UPDATE runs SET state = 'done', owner = NULL, error = NULL, numbers = ?, details = ?, "
                    "environment = ?, seconds = ?, ended = ? WHERE key = ? AND state = 'running' AND owner = ?",
                    values,
                ).rowcount
            )

    def fail(self, key: str, owner: Owner, error: str) -> None:
        """Store the traceback of a failed run."""
        with self._transaction() as database:
            database.execute(
                "UPDATE runs SET state = 'failed', owner = NULL, error = ?, ended = ? "
                "WHERE key = ? AND state = 'running' AND owner = ?",
                (error, time.time(), key, owner.name),
            )

    def release(self, owner: Owner) -> None:
        """Make the unfinished runs of an owner missing again."""
        with self._transaction() as database:
            database.execute(
                "UPDATE runs SET state = 'missing', owner = NULL WHERE state = 'running' AND owner = ?", (owner.name,)
            )

    def reset_failed(self, study: str) -> int:
        """Make the failed runs of a study missing again, and return their number."""
        with self._transaction() as database:
            return database.execute(
                "UPDATE runs SET state = 'missing' WHERE state = 'failed' "
                "AND key IN (SELECT key FROM plans WHERE study = ?)",
                (study,),
            ).rowcount

    def discard_results(self, keys: Sequence[str]) -> None:
        """Delete the results of done and failed runs, so that they are executed again."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE runs SET state = 'missing', owner = NULL, numbers = NULL, details = NULL, error = NULL "
                "WHERE key = ? AND state IN ('done', 'failed')",
                ((key,) for key in keys),
            )

    def num_done(self, kind: RunKind, runs: Sequence[PlannedRun]) -> int:
        """Return how many of some runs of a kind are done."""
        done = {key for (key,) in self._fetch_all("SELECT key FROM runs WHERE state = 'done'")}
        return len(done.intersection(_keys(kind, runs)))

    def studies(self) -> dict[str, dict[str, Any]]:
        """Return, by name of the study, its `kind` and the information that was given to `plan`."""
        rows = self._fetch_all("SELECT name, kind, about FROM studies ORDER BY rowid")
        return {name: {"kind": kind, **json.loads(about)} for name, kind, about in rows}

    def study_name(self, study: str | None = None) -> str:
        """Return the name of a study after checking that it exists; without a name, the name of the only study.

        Raises:
            StoreError: there is no such study; or, without a name, there are no or several studies.

        """
        names = list(self.studies())
        if study is not None and study not in names:
            raise StoreError(f"study must be one of {', '.join(names) or 'none'} in {self.folder}, got {study!r}")
        if study is None and len(names) != 1:
            raise StoreError(f"{self.folder} holds {', '.join(names) or 'no study'}; name one with --study")
        return study or names[0]

    def counts(self, study: str) -> dict[str, int]:
        """Return the number of runs of a study in each state."""
        query = "SELECT state, count(*) FROM plans JOIN runs USING (key) WHERE study = ? GROUP BY state"
        return {**dict.fromkeys(STATES, 0), **dict(self._fetch_all(query, (study,)))}

    def overview(self, study: str) -> tuple[dict[str, int], float, dict[str, int]]:
        """Return the number of runs by state, the seconds of all done runs, and the number of done runs by source."""
        query = (
            "SELECT state, json_extract(environment, '$.source'), count(*), total(seconds) "
            "FROM plans JOIN runs USING (key) WHERE study = ? GROUP BY 1, 2"
        )
        counts: dict[str, int] = dict.fromkeys(STATES, 0)
        total_seconds, sources = 0.0, dict[str, int]()
        for state, source, count, seconds in self._fetch_all(query, (study,)):
            counts[state] += count
            if state == "done":
                total_seconds += seconds
                sources[source or ""] = sources.get(source or "", 0) + count
        return counts, total_seconds, sources

    def records(self, study: str, state: str | None = None, *, numbers_only: bool = False) -> Iterator[Record]:
        """Return the runs of a study in the order of its plan.

        Args:
            study: name of the study.
            state: return only runs in this state.
            numbers_only: return only the `values` and `rows` of each result, which is faster.

        """
        query = (
            f"SELECT key, settings, seed, state, numbers, {'NULL' if numbers_only else 'details'}, error, environment, "
            "seconds, attempts "
            # The few failed runs are found by their state, all others in the order of the plan.
            + ("FROM runs CROSS JOIN plans USING (key) " if state == "failed" else "FROM plans JOIN runs USING (key) ")
            + "WHERE study = ?"
            + (" AND state = ?" if state else "")
        )
        # Runs share settings and environments; each distinct text is parsed once.
        parse = lru_cache(maxsize=4096)(json.loads)
        parse_nested = lru_cache(maxsize=4096)(lambda text: nest(json.loads(text)))
        for row in self._database.execute(query + " ORDER BY position", (study, state) if state else (study,)):
            result = {**json.loads(row[5] or "{}"), **json.loads(row[4] or "{}")} if row[3] == "done" else {}
            yield Record(
                key=row[0],
                settings=parse_nested(row[1]),
                flat_settings=parse(row[1]),
                seed=row[2],
                state=row[3],
                result=result,
                error=row[6] or "",
                environment=parse(row[7] or "{}"),
                seconds=row[8],
                attempts=row[9],
            )

    def _fetch_all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(explain(error, self._path)) from error

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        try:
            # Immediate, so that nothing changes between reading and writing.
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(explain(error, self._path)) from error


def _keys(kind: RunKind, runs: Sequence[PlannedRun]) -> list[str]:
    """Return the key of each run."""
    return [run_key(kind.name, kind.code_version, kind.flatten(run.settings), run.seed) for run in runs]
