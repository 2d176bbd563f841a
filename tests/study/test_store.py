"""Stores that can't be used say why; those that can be are read as they are."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from suffice.study import Planned, Store, StoreError, run_study
from suffice.study.owners import Owner
from suffice.study.schema import FILE, VERSION
from tests.study.tiny import SQUARE


def planned(*numbers):
    return [Planned(SQUARE.complete({"x": x}), 0) for x in numbers]


@pytest.fixture
def folder(tmp_path):
    run_study(tmp_path / "s", SQUARE, planned(1, 2, 3), name="squares")
    return tmp_path / "s"


def test_a_store_of_a_newer_version_is_left_alone(folder):
    with sqlite3.connect(folder / FILE) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = (folder / FILE).read_bytes()
    for write in (True, False):
        with pytest.raises(StoreError, match=rf"a store of a newer version \({VERSION + 1}; .*install a newer suffice"):
            Store(folder, write=write)
    assert (folder / FILE).read_bytes() == before


@pytest.mark.parametrize("write", [True, False])
def test_other_files_are_no_stores(tmp_path, write):
    (tmp_path / FILE).write_bytes(b"not a database, by any means" * 100)
    with pytest.raises(StoreError, match="is no store of runs"):
        Store(tmp_path, write=write)
    (tmp_path / FILE).unlink()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE songs (title)")
    with pytest.raises(StoreError, match="a database, but no store of runs"):
        Store(tmp_path, write=write)
    with pytest.raises(StoreError, match="holds no study"):
        Store(tmp_path / "nowhere", write=False)


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/s can't be made"):
        Store(tmp_path / "file" / "s")


_AS_NOBODY = """
import os, sys
from suffice.study import Store, StoreError, run_study
from tests.study.tiny import SQUARE
folder = sys.argv[1]
os.setuid(65534)
with Store(folder, write=False) as store:
    print(store.counts("squares")["done"], [r.result["values"]["y"] for r in store.records("squares")])
try:
    Store(folder)
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_read_only_folder_can_be_looked_at(tmp_path, folder):
    import tempfile

    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        place = os.path.join(open_to_all, "ä b")
        os.rename(folder, place) if os.stat(open_to_all).st_dev == os.stat(folder).st_dev else None
        path = os.pathsep.join(filter(None, sys.path))
        code = [sys.executable, "-c", _AS_NOBODY, place]
        said = subprocess.run(code, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
        first, second = said.stdout.splitlines()
    assert first == "3 [1.0, 4.0, 9.0]"
    assert "can't be written; accepted: a folder that this user may write to" in second


def test_many_may_make_the_same_store_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for n in range(40):
            start = Barrier(8)

            def make(n=n, start=start):
                start.wait()
                Store(tmp_path / str(n)).close()

            for made in [pool.submit(make) for _ in range(8)]:
                made.result()


def test_claims_are_exclusive_and_those_of_the_dead_come_back(tmp_path):
    with Store(tmp_path) as one, Store(tmp_path) as two:
        one.plan("squares", SQUARE, planned(1, 2))
        with Owner(tmp_path) as first:
            dead = Owner(tmp_path).__enter__()
            a, b = one.claim("squares", first), two.claim("squares", dead)
            assert {a.settings["x"], b.settings["x"]} == {1, 2}
            assert one.claim("squares", first) is None
            assert one.recover(first) == 0  # the other lives
            dead._lock.release()
            assert one.recover(first) == 1
            again = one.claim("squares", first)
            assert again.key == b.key
            # What the late one brings is not taken.
            assert two.finish(b.key, dead, {"values": {"y": 0.0}}, {}, 0.1) is False
            assert one.finish(b.key, first, {"values": {"y": 4.0}}, {}, 0.1) is True
        assert one.counts("squares") == {"done": 1, "failed": 0, "running": 1, "missing": 0}


def test_a_run_in_two_studies_is_done_once(folder):
    outcome = run_study(folder, SQUARE, planned(3, 4), name="others")
    assert (outcome.done, outcome.new) == (2, 1)
    with Store(folder) as store:
        assert list(store.studies()) == ["squares", "others"]
        with pytest.raises(StoreError, match="name one with --study"):
            store.only()
        with pytest.raises(StoreError, match="study is 'mine'"):
            store.only("mine")


def test_the_same_run_twice_is_refused(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ValueError, match=r"seed 0 of .* twice"):
        store.plan("squares", SQUARE, planned(1, 1))


def test_code_and_settings_and_seed_make_the_key(tmp_path):
    from dataclasses import replace

    newer = replace(SQUARE, version=2)
    run_study(tmp_path, SQUARE, planned(1), name="squares")
    assert run_study(tmp_path, newer, planned(1), name="squares").new == 1
    assert run_study(tmp_path, SQUARE, planned(1), name="squares").new == 0
