"""Stores: those that cannot be used say why, and claims are exclusive."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from suffice.study import PlannedRun, Store, StoreError, run_study
from suffice.study.database import FILE_NAME, VERSION
from suffice.study.owner import Owner
from tests.study.tiny import SQUARE


def plan(*numbers):
    return [PlannedRun(SQUARE.complete({"x": x}), 0) for x in numbers]


@pytest.fixture
def folder(tmp_path):
    run_study(tmp_path / "s", SQUARE, plan(1, 2, 3), name="squares")
    return tmp_path / "s"


@pytest.mark.parametrize("read_only", [True, False])
def test_a_store_of_a_newer_version_is_refused_and_unchanged(folder, read_only):
    with sqlite3.connect(folder / FILE_NAME) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = (folder / FILE_NAME).read_bytes()
    with pytest.raises(StoreError, match=rf"a newer version \(store version {VERSION + 1}; .*install a newer suffice"):
        Store(folder, read_only=read_only)
    assert (folder / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("read_only", [True, False])
def test_a_store_of_the_former_library_is_refused_and_unchanged(folder, read_only):
    with closing(sqlite3.connect(folder / FILE_NAME)) as database:
        database.execute("PRAGMA application_id = 0x5265746E")
    before = (folder / FILE_NAME).read_bytes()
    with pytest.raises(StoreError, match=r"was written by an earlier version of this library.*; start a new folder"):
        Store(folder, read_only=read_only)
    assert (folder / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("read_only", [True, False])
def test_files_that_are_not_stores_are_refused(tmp_path, read_only):
    (tmp_path / FILE_NAME).write_bytes(b"not a database, by any means" * 100)
    with pytest.raises(StoreError, match="is not a store of runs"):
        Store(tmp_path, read_only=read_only)
    (tmp_path / FILE_NAME).unlink()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("CREATE TABLE songs (title)")
    with pytest.raises(StoreError, match="a database, but not a store of runs"):
        Store(tmp_path, read_only=read_only)
    with pytest.raises(StoreError, match="holds no study"):
        Store(tmp_path / "nowhere", read_only=True)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/s cannot be created"):
        Store(tmp_path / "file" / "s")


_AS_NOBODY = """
import os, sys
from suffice.study import Store, StoreError, run_study
from tests.study.tiny import SQUARE
folder = sys.argv[1]
os.setuid(65534)
with Store(folder, read_only=True) as store:
    print(store.counts("squares")["done"], [r.result["values"]["y"] for r in store.records("squares")])
try:
    Store(folder)
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_store_in_a_read_only_folder_can_be_read(folder):
    with tempfile.TemporaryDirectory() as readable_by_all:
        os.chmod(readable_by_all, 0o755)
        place = Path(readable_by_all) / "ä b"
        shutil.move(folder, place)
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", _AS_NOBODY, str(place)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        first, second = done.stdout.splitlines()
    assert first == "3 [1.0, 4.0, 9.0]"
    assert "cannot be written; use a folder that this user may write to" in second


def test_many_threads_can_create_the_same_store_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for n in range(40):
            start = Barrier(8)

            def create(n=n, start=start):
                start.wait()
                Store(tmp_path / str(n)).close()

            for created in [pool.submit(create) for _ in range(8)]:
                created.result()


def test_claims_are_exclusive_and_those_of_dead_owners_are_recovered(tmp_path):
    with Store(tmp_path) as one, Store(tmp_path) as two:
        one.plan("squares", SQUARE, plan(1, 2))
        with Owner(tmp_path) as first:
            second = Owner(tmp_path).__enter__()
            a, b = one.claim("squares", first), two.claim("squares", second)
            assert {a.settings["x"], b.settings["x"]} == {1, 2}
            assert one.claim("squares", first) is None
            assert one.recover(first) == 0  # the second owner is alive
            second._lock.release()
            assert one.recover(first) == 1
            again = one.claim("squares", first)
            assert again.key == b.key
            # The late result of the owner that lost the run is not stored.
            assert two.finish(b.key, second, {"values": {"y": 0.0}}, {}, 0.1) is False
            assert one.finish(b.key, first, {"values": {"y": 4.0}}, {}, 0.1) is True
        assert one.counts("squares") == {"done": 1, "failed": 0, "running": 1, "missing": 0}


def test_a_run_of_two_studies_is_done_once(folder):
    outcome = run_study(folder, SQUARE, plan(3, 4), name="others")
    assert (outcome.done, outcome.new) == (2, 1)
    with Store(folder) as store:
        assert list(store.studies()) == ["squares", "others"]
        with pytest.raises(StoreError, match="name one with --study"):
            store.study_name()
        with pytest.raises(StoreError, match=r"study must be one of squares, others in .*, got 'mine'"):
            store.study_name("mine")


def test_a_plan_with_the_same_run_twice_is_refused(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ValueError, match=r"runs must be distinct, got seed 0 of .* twice"):
        store.plan("squares", SQUARE, plan(1, 1))


def test_runs_of_another_code_version_are_other_runs(tmp_path):
    newer = replace(SQUARE, version=2)
    run_study(tmp_path, SQUARE, plan(1), name="squares")
    assert run_study(tmp_path, newer, plan(1), name="squares").new == 1
    assert run_study(tmp_path, SQUARE, plan(1), name="squares").new == 0
