"""Studies end with every result exactly once, whatever is killed, full or broken meanwhile."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest

from suffice.study import PlannedRun, Spec, Store, StoreError, run_study
from suffice.study.owner import Owner
from tests.study.tiny import SQUARE


def spec(x=4, seeds=1, **settings):
    return Spec("squares", "square", settings=settings, grid={"x": list(range(x))}, seeds=seeds)


def stored(folder):
    """Return the values of all done runs by setting and seed."""
    with Store(folder, read_only=True) as store:
        return {(r.settings["x"], r.seed): r.result["values"]["y"] for r in store.records("squares", "done")}


def expected(x, seeds=1):
    return {(i, seed): i**2 + seed for i in range(x) for seed in range(seeds)}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_run_is_done_once_and_only_missing_runs_are_done(tmp_path, workers):
    folder, log = tmp_path / "mit Leerzeichen und ä", tmp_path / "log"
    first = run_study(folder, SQUARE, spec(4, 2, log=str(log)), workers=workers)
    assert (first.done, first.failed, first.new) == (8, 0, 8)
    again = run_study(folder, SQUARE, spec(4, 3, log=str(log)), workers=workers)
    assert (again.done, again.new) == (12, 4)
    assert stored(folder) == expected(4, 3)
    keys = log.read_text().split()
    assert len(keys) == len(set(keys)) == 12
    # A smaller grid plans fewer runs; the results of the others are kept.
    assert run_study(folder, SQUARE, spec(2, 1, log=str(log))).done == 2
    assert run_study(folder, SQUARE, spec(4, 3, log=str(log))).new == 0


def test_workers_use_the_given_number_of_threads(tmp_path):
    run_study(tmp_path, SQUARE, spec(2), workers=1, threads=3)
    with Store(tmp_path) as store:
        assert {record.result["values"]["threads"] for record in store.records("squares")} == {3.0}


@pytest.mark.parametrize(
    ("fail", "workers", "message"),
    [
        ("raise", 0, "RuntimeError: no square today"),
        ("raise", 1, "RuntimeError: no square today"),
        ("kill", 1, "ended by signal SIGKILL"),
        ("exit", 1, "SystemExit: 3"),
        ("not JSON", 1, "object is not JSON serializable"),
    ],
)
def test_failed_runs_keep_their_traceback_and_do_not_stop_others(tmp_path, fail, workers, message):
    plan = [PlannedRun(SQUARE.complete({"x": x, "fail": fail if x == 1 else ""}), 0) for x in range(4)]
    outcome = run_study(tmp_path, SQUARE, plan, name="squares", workers=workers)
    assert (outcome.done, outcome.failed) == (3, 1)
    with Store(tmp_path) as store:
        (record,) = store.records("squares", "failed")
    assert message in record.error
    assert record.attempts == 1
    assert run_study(tmp_path, SQUARE, plan, name="squares", workers=workers).new == 0  # failed runs are kept


def test_failed_runs_can_be_retried(tmp_path):
    log = tmp_path / "log"
    study = spec(2, log=str(log), fail="until a file exists")
    assert run_study(tmp_path, SQUARE, study).failed == 2
    (tmp_path / "log.ok").touch()
    assert run_study(tmp_path, SQUARE, study).failed == 2
    again = run_study(tmp_path, SQUARE, study, retry_failed=True)
    assert (again.done, again.failed) == (2, 0)
    with Store(tmp_path) as store:
        assert [(record.attempts, record.error) for record in store.records("squares")] == [(2, "")] * 2


_RUN_STUDY = """
import sys
from suffice.study import Spec, run_study
from tests.study.tiny import SQUARE
spec = Spec("squares", "square", settings=dict(log=sys.argv[2], sleep=float(sys.argv[4])),
            grid=dict(x=list(range(int(sys.argv[3])))))
print(run_study(sys.argv[1], SQUARE, spec, workers=2, threads=1).new)
"""


def start_process(folder, log, x, sleep):
    """Start a process that does a study with two workers."""
    return subprocess.Popen(
        [sys.executable, "-c", _RUN_STUDY, str(folder), str(log), str(x), str(sleep)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TEST_LOG": str(log)},
    )


def test_a_study_killed_twenty_times_has_every_result_once(tmp_path):
    generator, log = random.Random(0), tmp_path / "log"
    log.touch()
    interrupted = 0
    for _ in range(20):
        with start_process(tmp_path / "s", log, 300, 0.05) as process:
            # Anywhere from before the store exists to the middle of its runs.
            time.sleep(generator.uniform(0.05, 1.2))
            process.kill()
        try:
            interrupted += len(stored(tmp_path / "s")) < 300
        except StoreError:  # killed before the store was created
            interrupted += 1
    assert interrupted > 10
    with start_process(tmp_path / "s", log, 300, 0.05) as process:
        process.communicate()
    assert stored(tmp_path / "s") == expected(300)
    started_keys = log.read_text().split()
    # A run is started again only if it was interrupted: at most two runs were in progress at each kill.
    assert set(Counter(started_keys).values()) <= set(range(1, 22))
    assert len(started_keys) - 300 <= 2 * 20
    assert not list((tmp_path / "s" / "owners").iterdir())


_RUN_AND_WAIT = """
import sys
from suffice.study import Spec, run_study
from tests.study.tiny import SQUARE
spec = Spec("squares", "square", settings=dict(log=sys.argv[2], fail="wait for a file"), grid=dict(x=[0, 1, 2]))
run_study(sys.argv[1], SQUARE, spec, workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_is_resumed_first(tmp_path, workers):
    log = tmp_path / "log"
    log.touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", _RUN_AND_WAIT, str(tmp_path / "s"), str(log), str(workers)]
    with subprocess.Popen(arguments, env=environment) as process:
        while not log.read_text():
            time.sleep(0.02)
        process.kill()
    (tmp_path / "log.ok").touch()
    # The killed run is now the last one of the plan.
    study = Spec("squares", "square", settings={"log": str(log), "fail": "wait for a file"}, grid={"x": [2, 1, 0]})
    outcome = run_study(tmp_path / "s", SQUARE, study)
    assert (outcome.done, outcome.new, outcome.recovered) == (3, 3, 1)
    with Store(tmp_path / "s") as store:
        keys = {record.settings["x"]: record.key for record in store.records("squares")}
    assert log.read_text().split() == [keys[x] for x in (0, 0, 2, 1)]


def test_an_interrupted_run_is_resumed_first_and_a_failed_one_in_its_order(tmp_path):
    with Store(tmp_path) as store, Owner(tmp_path) as owner:
        store.plan("squares", SQUARE, spec(4).plan(SQUARE))
        started = [store.claim("squares", owner) for _ in range(3)]
        store.finish(started[0].key, owner, {"values": {"y": 0.0}}, {}, 0.1)
        store.fail(started[1].key, owner, "RuntimeError")
        store.release(owner)  # as after Ctrl-C
    with Store(tmp_path) as store, Owner(tmp_path) as owner:
        store.reset_failed("squares")
        assert [store.claim("squares", owner).settings["x"] for _ in range(3)] == [2, 1, 3]
        store.release(owner)
    with Store(tmp_path) as store, Owner(tmp_path) as owner:  # the second attempt of the failed run was interrupted
        assert [store.claim("squares", owner).settings["x"] for _ in range(3)] == [1, 2, 3]


def test_two_processes_share_a_store(tmp_path):
    log = tmp_path / "log"
    processes = [start_process(tmp_path / "s", log, 40, 0.02) for _ in range(2)]
    counts = [int(process.communicate()[0]) for process in processes]
    assert sum(counts) == 40
    keys = log.read_text().split()
    assert len(keys) == len(set(keys)) == 40
    assert stored(tmp_path / "s") == expected(40)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_exit_when_their_runner_is_killed(tmp_path):
    log = tmp_path / "log"
    log.touch()
    with start_process(tmp_path / "s", log, 2, 60) as process:
        while len(log.read_text().split()) < 2:
            time.sleep(0.05)
        assert _is_running(str(log).encode())
        process.kill()
    for _ in range(100):
        time.sleep(0.05)
        if not _is_running(str(log).encode()):
            break
    else:
        pytest.fail("a worker outlived its runner")


def _is_running(text):
    """Whether a process has the text among its environment variables."""
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if text in file.read():
                    return True
        except OSError:
            continue
    return False


def test_a_full_disk_loses_no_finished_run(tmp_path, monkeypatch):
    study = spec(100)
    with Store(tmp_path) as store:
        store.plan("squares", SQUARE, study.plan(SQUARE))
    from suffice.study import database

    open_to_write = database._open_to_write

    def open_with_little_space(path):
        connection = open_to_write(path)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        return connection

    monkeypatch.setattr(database, "_open_to_write", open_with_little_space)
    with pytest.raises(StoreError, match=r"no space left to write .*the finished runs are safe"):
        run_study(tmp_path, SQUARE, study)
    monkeypatch.undo()
    with Store(tmp_path) as store:
        kept = store.counts("squares")["done"]
    assert 0 < kept < 100
    assert run_study(tmp_path, SQUARE, study).new == 100 - kept
    assert stored(tmp_path) == expected(100)


def test_progress_shows_totals_and_failures(tmp_path):
    lines = []

    def show(progress, line):
        assert len(progress.workers) <= progress.slots
        lines.extend([f"{line} | {progress}"] if line else [])

    run_study(
        tmp_path, SQUARE, [*spec(3).plan(SQUARE), PlannedRun(SQUARE.complete({"fail": "raise"}), 0)], on_progress=show
    )
    assert len(lines) == 4
    assert "1 of 4 done" in lines[0]
    assert "left" in lines[0]
    assert "failed: RuntimeError: no square today | 3 of 4 done, 1 failed" in lines[-1]


def test_records_hold_results_environment_and_duration(tmp_path):
    run_study(tmp_path, SQUARE, spec(1))
    with Store(tmp_path) as store:
        (record,) = store.records("squares")
    json.dumps(record.result)
    assert record.environment["suffice"]
    assert record.seconds >= 0
