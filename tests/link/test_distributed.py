import json
import os
import subprocess
import sys

import pytest
import torch

from suffice.link.batches.composition import Random
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.graph import Graph, Split
from suffice.link.models import build_model
from suffice.link.train import distributed
from suffice.link.train.config import TrainConfig
from suffice.link.train.trainer import fit

# Trains in two processes as torchrun starts them, and writes the results of each rank to a file.
SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from suffice.link.data.synthetic import block_model
from suffice.link.batches.composition import Random
from suffice.link.train.distributed import process_group, rank_and_world_size
from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.models import build_model
from suffice.link.train.evaluate import evaluate
from suffice.link.train.config import TrainConfig
from suffice.link.train.trainer import fit

torch.set_num_threads(1)
graph = block_model(nodes=300, classes=3, degree=8, feature_signal=2.0, features=16, seed=1)
parts = split_edges(graph, SplitConfig(0.1, 0.2), 0)
found = {}
with process_group("cpu"):
    for name in ("encoder-decoder", "buddy"):
        model = build_model(name, 16, hidden=16)
        settings = TrainConfig(Random(), epochs=10, batch_size=64, directions=1, metric="auc", seed=1)
        path = os.path.join(sys.argv[1], name + ".safetensors")
        done = fit(model, graph, parts, settings, checkpoint=path)
        found[name] = {
            "parameters": [float(value.double().sum()) for value in model.state_dict().values()],
            "fractions": done.epochs[-1].fractions,
            "auc": evaluate(model, graph, parts, SplitConfig(0.1, 0.2))["auc"],
        }
    with open(os.path.join(sys.argv[1], f"{rank_and_world_size()[0]}.json"), "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, str(script), str(folder)], check=True, env=environment, capture_output=True, timeout=600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.parametrize("name", ["encoder-decoder", "buddy"])
def test_two_processes_train_one_model_that_is_as_good_as_with_one_process(name, pair, graph: Graph, parts: Split):
    (one, other), folder = pair
    assert one[name]["parameters"] == other[name]["parameters"]
    assert one[name]["auc"] == other[name]["auc"]
    # Both ranks draw the same fraction; it is rounded to the number of edges of each rank.
    assert one[name]["fractions"] == pytest.approx(other[name]["fractions"], abs=0.02)
    assert (folder / f"{name}.safetensors").exists()
    model = build_model(name, 16, hidden=16)
    settings = TrainConfig(Random(), epochs=10, batch_size=128, directions=1, metric="auc", seed=1)
    alone = fit(model, graph, parts, settings)
    assert len(alone.epochs[-1].fractions) == pytest.approx(len(one[name]["fractions"]), abs=3)
    from suffice.link.data.graph import SplitConfig
    from suffice.link.train.evaluate import evaluate

    assert abs(evaluate(model, graph, parts, SplitConfig(0.1, 0.2))["auc"] - one[name]["auc"]) < 0.06


def test_the_batches_of_all_ranks_contain_each_positive_once(graph: Graph, parts: Split):
    made = {"batch_size": 64, "known": parts.known, "seed": 3}
    sides = [EdgeBatches(parts.train, graph.num_nodes, Random(), rank=rank, world_size=2, **made) for rank in (0, 1)]
    seen: list[int] = []
    for first, second in zip(*sides, strict=True):
        assert abs(first.fraction - second.fraction) < 0.1
        assert not set(first.positive_index.tolist()) & set(second.positive_index.tolist())
        drawn = [set(map(tuple, b.pairs[:, b.positive_index.numel() :].T.tolist())) for b in (first, second)]
        assert not drawn[0] & drawn[1]
        seen += first.positive_index.tolist() + second.positive_index.tolist()
    assert sorted(seen) == list(range(parts.train.size(1)))


def test_without_a_process_group_there_is_one_rank():
    assert distributed.rank_and_world_size() == (0, 1)
    with distributed.process_group("cpu") as device:
        assert device == "cpu"
    forward = distributed.distribute(torch.nn.Linear(2, 2))
    assert isinstance(forward, distributed.TrainingForward)
