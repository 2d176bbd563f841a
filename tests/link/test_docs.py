"""The code of the pages results/link.md and results/link-models.md runs."""

import re
from pathlib import Path

import torch

from suffice.link.batches.negatives import sample_negatives
from suffice.link.models import EncoderDecoderSettings, PairScorer
from suffice.link.train.config import TrainConfig

DOCS = (Path(__file__).parents[2] / "docs" / "results" / "link.md").read_text(encoding="utf-8")
MODELS = (Path(__file__).parents[2] / "docs" / "results" / "link-models.md").read_text(encoding="utf-8")


class Inner(torch.nn.Module):
    def forward(self, first, second):
        return (first * second).sum(-1)


def test_examples_run(graph, parts, capsys):
    model = EncoderDecoderSettings(hidden=16).build(graph.x.size(1)).eval()
    z = torch.randn(graph.num_nodes, 16)
    names = {
        "decoder": Inner(),
        "z": z,
        "positives": parts.train,
        "negatives": sample_negatives(parts.known, graph.num_nodes, 64, 5),
        "model": model,
        "score": PairScorer(model, graph.x, parts.message_edges()),
        "num_nodes": graph.num_nodes,
        "graph": graph,
        "parts": parts,
        "settings": TrainConfig(epochs=1, batch_size=256),
    }
    codes = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "link.md", "exec"), names)
    assert capsys.readouterr().out.startswith("unaffected")


def test_the_models_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", MODELS, flags=re.DOTALL)
    names = {}
    exec(compile(code, "link-models.md", "exec"), names)
    assert names["encoding"].nodes.shape == (names["graph"].num_nodes, 64)
    assert names["model"].score(names["encoding"], names["pairs"]).shape == (100,)
