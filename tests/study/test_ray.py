"""The same study on a Ray cluster of two nodes, one of which may go away."""

import os
import sys

import pytest

from suffice.study import Planned, Spec, Store, run_study
from tests.study.tiny import READING, SQUARE

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


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


def test_two_nodes_do_a_study_and_a_second_call_what_is_missing(cluster, tmp_path):
    spec = Spec("squares", "square", settings={"sleep": 0.2}, grid={"x": list(range(12))})
    most = []
    outcome = run_study(tmp_path, SQUARE, spec, ray=cluster.address, watch=lambda p, _: most.append(len(p.workers)))
    assert (outcome.done, outcome.new, outcome.failed) == (12, 12, 0)
    assert max(most) == 3  # the cores of both nodes
    with Store(tmp_path) as store:
        assert [record.result["values"]["y"] for record in store.records("squares")] == [x**2 for x in range(12)]
        assert {record.result["values"]["threads"] for record in store.records("squares")} == {1.0}
    assert run_study(tmp_path, SQUARE, spec).new == 0  # whoever asks


def test_failures_keep_their_traceback(cluster, tmp_path):
    plan = [Planned(SQUARE.complete({"x": x, "fail": "raise" if x else ""}), 0) for x in range(2)]
    assert run_study(tmp_path, SQUARE, plan, name="squares", ray=cluster.address).failed == 1
    with Store(tmp_path) as store:
        (record,) = store.records("squares", "failed")
    assert "RuntimeError: no square today" in record.error
    plan = [Planned(SQUARE.complete({"x": 5, "fail": "die"}), 0), *plan[:1]]
    outcome = run_study(tmp_path, SQUARE, plan, name="squares", ray=cluster.address)
    assert (outcome.done, outcome.failed) == (1, 1)


def test_inputs_reach_a_node_that_does_not_see_the_folder(cluster, tmp_path, monkeypatch):
    from suffice.study import ray_executor

    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "text").write_text("twelve signs")
    plan = [Planned(READING.complete({"x": x}), 0, ("inputs/text",)) for x in range(3)]
    sent = ray_executor.Job.to_json
    monkeypatch.setattr(
        ray_executor.Job, "to_json", lambda job: sent(job).replace(str(tmp_path), "/nowhere" + str(tmp_path))
    )
    assert run_study(tmp_path, READING, plan, name="reading", ray=cluster.address).done == 3
    with Store(tmp_path) as store:
        assert {record.result["values"]["length"] for record in store.records("reading")} == {12}


def test_a_node_that_goes_away_loses_nothing(cluster, tmp_path):
    spec = Spec("squares", "square", settings={"sleep": 0.5}, grid={"x": list(range(8))})
    gone = []

    def watch(progress, line):
        if line and not gone:
            gone.append(line)
            cluster.remove_node(cluster.second)

    outcome = run_study(tmp_path, SQUARE, spec, ray=cluster.address, watch=watch)
    assert gone
    assert (outcome.done, outcome.failed) == (8, 0)


def test_a_cluster_that_is_too_small_is_named(cluster, tmp_path):
    with pytest.raises(ValueError, match="threads is 64; accepted: at most the cores"):
        run_study(tmp_path, SQUARE, Spec("squares", "square"), ray=cluster.address, threads=64)
