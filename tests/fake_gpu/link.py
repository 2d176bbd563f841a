"""Trains, audits and evaluates every link predictor on the CPU and on the fake GPU; prints a JSON line for each."""

import json
import sys
import warnings

import torch

from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Random
from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import build_model, models
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.trainer import fit
from tests.fake_gpu.device import DEVICE

CASES = (
    {"name": "encoder-decoder"},
    {"name": "encoder-decoder", "encoder": "sage", "encoder_norm": "layer"},
    {"name": "encoder-decoder", "encoder": "pure", "decoder": "concat"},
    *({"name": name} for name in models() if name != "encoder-decoder"),
)
SPLIT_CONFIG = SplitConfig(0.1, 0.2)


def run(device, case):
    """Return losses, metric, test scores and, in the first case, audit statistics of one training."""
    graph = block_model(nodes=120, classes=3, degree=6, feature_signal=2.0, features=16, seed=1)
    parts = split_edges(graph, SPLIT_CONFIG, seed=0)
    torch.manual_seed(0)
    model = build_model(in_channels=16, hidden=16, **case).to(device)
    settings = TrainConfig(epochs=1, batch_size=64, composition=Random())
    result = fit(model, graph, parts, settings)
    numbers = [*(epoch.loss for epoch in result.epochs), result.metric]
    numbers += evaluate(model, graph, parts, SPLIT_CONFIG).values()
    if case == CASES[0]:  # the audit does the same with every model
        report = audit_trained(model, graph, parts, batch_size=64)
        numbers += [statistic.mean for part in report.parts.values() for statistic in part.statistics.values()]
    return numbers


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in CASES:
        try:
            expected = run("cpu", case)
            found = run(DEVICE, case)
            print(json.dumps({"case": case, "numbers": [expected, found]}), flush=True)
        except Exception as error:
            print(json.dumps({"case": case, "error": f"{type(error).__name__}: {error}"}), flush=True)
            if "--raise" in sys.argv:
                raise
