"""Studies on a Ray cluster of two nodes, one of which may fail."""

import os
import sys

import pytest

from suffice.study import PlannedRun, Spec, Store, run_study
from tests.study.tiny import READ_INPUT, SQUARE

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of Ray itself


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # Nodes inherit the environment of this process.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.second = cluster.add_node(num_cpus=2)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_do_a_study_and_a_second_call_only_missing_runs(cluster, tmp_path):
    spec = Spec("squares", "square", settings={"sleep": 0.2}, grid={"x": list(range(12))})
    busy = []
    outcome = run_study(
        tmp_path, SQUARE, spec, ray=cluster.address, on_progress=lambda p, _: busy.append(len(p.workers))
    )
    assert (outcome.done, outcome.new, outcome.failed) == (12, 12, 0)
    assert max(busy) == 3  # the cores of both nodes
    with Store(tmp_path) as store:
        assert [record.result["values"]["y"] for record in store.records("squares")] == [x**2 for x in range(12)]
        assert {record.result["values"]["threads"] for record in store.records("squares")} == {1.0}
    assert run_study(tmp_path, SQUARE, spec).new == 0  # also without Ray


def test_failures_keep_their_traceback(cluster, tmp_path):
    plan = [PlannedRun(SQUARE.complete({"x": x, "fail": "raise" if x else ""}), 0) for x in range(2)]
    assert run_study(tmp_path, SQUARE, plan, name="squares", ray=cluster.address).failed == 1
    with Store(tmp_path) as store:
        (record,) = store.records("squares", "failed")
    assert "RuntimeError: no square today" in record.error
    plan = [PlannedRun(SQUARE.complete({"x": 5, "fail": "kill"}), 0), *plan[:1]]
    outcome = run_study(tmp_path, SQUARE, plan, name="squares", ray=cluster.address)
    assert (outcome.done, outcome.failed) == (1, 1)


def test_inputs_reach_a_node_that_does_not_see_the_folder(cluster, tmp_path, monkeypatch):
    from suffice.study import ray_executor

    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "text").write_text("twelve signs")
    plan = [PlannedRun(READ_INPUT.complete({"x": x}), 0, ("inputs/text",)) for x in range(3)]
    sent = ray_executor.Job.to_json
    monkeypatch.setattr(
        ray_executor.Job, "to_json", lambda job: sent(job).replace(str(tmp_path), "/nowhere" + str(tmp_path))
    )
    assert run_study(tmp_path, READ_INPUT, plan, name="inputs", ray=cluster.address).done == 3
    with Store(tmp_path) as store:
        assert {record.result["values"]["length"] for record in store.records("inputs")} == {12}


def test_a_node_that_fails_loses_no_run(cluster, tmp_path):
    spec = Spec("squares", "square", settings={"sleep": 0.5}, grid={"x": list(range(8))})
    removed = []

    def show(progress, line):
        if line and not removed:
            removed.append(line)
            cluster.remove_node(cluster.second)

    outcome = run_study(tmp_path, SQUARE, spec, ray=cluster.address, on_progress=show)
    assert removed
    assert (outcome.done, outcome.failed) == (8, 0)


def test_a_cluster_that_is_too_small_is_refused(cluster, tmp_path):
    with pytest.raises(ValueError, match="threads must be at most the number of cores of the Ray cluster, got 64"):
        run_study(tmp_path, SQUARE, Spec("squares", "square"), ray=cluster.address, threads=64)
