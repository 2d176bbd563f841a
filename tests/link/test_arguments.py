"""Bad arguments of the public functions raise an error that names them, before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from suffice.link import (
    EdgeSet,
    Fixed,
    Random,
    SplitConfig,
    TrainConfig,
    alignment,
    audit,
    build_model,
    correct,
    load_graph,
    replace_batch_norm,
    split_edges,
)
from suffice.link.metrics import hits_at_k
from suffice.link.study.arms import parse_arm
from suffice.link.study.reproduction import reproduce
from tests.wrong_arguments import each_wrong_argument, expect_error

EDGES = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
NETWORK = nn.Sequential(nn.BatchNorm1d(3))
GRAPH = load_graph("digits")


def score(pairs):
    pytest.fail("a model was run")


CALLS = {
    "audit": lambda **own: audit(score, EDGES, **own),
    "TrainConfig": TrainConfig,
    "SplitConfig": SplitConfig,
    "Fixed": Fixed,
    "Random": Random,
    "correct": lambda **own: correct(GRAPH, **own),
    "reproduce": lambda **own: reproduce(
        **{"folder": "/nowhere", "data": ["digits"], "models": ["gcn"], "arms": [parse_arm("fixed/batch")], **own}
    ),
    "replace_batch_norm": lambda **own: replace_batch_norm(NETWORK, **own),
    "build_model": lambda **own: build_model("encoder-decoder", 3, **own),
    "hits_at_k": lambda **own: hits_at_k(torch.ones(3), torch.zeros(3), **own),
    "alignment": lambda **own: alignment(
        build_model("encoder-decoder", GRAPH.x.size(1)), GRAPH, split_edges(GRAPH, SplitConfig(), 0), **own
    ),
}

WRONG = [
    *(
        (call, name, value, TypeError, f"{name} must be an int, at least .*, got {value!r}")
        for call, name in (
            ("audit", "batch_size"),
            ("audit", "repeats"),
            ("TrainConfig", "epochs"),
            ("TrainConfig", "seed"),
            ("TrainConfig", "patience"),
            ("correct", "seeds"),
            ("correct", "first_seed"),
            ("correct", "workers"),
            ("reproduce", "seeds"),
            ("build_model", "hidden"),
            ("hits_at_k", "k"),
        )
        for value in (1.5, "x", True)
    ),
    ("audit", "seed", "x", TypeError, "seed must be an int, from 0 to .*, got 'x'"),
    ("audit", "seed", -1, ValueError, "seed must be from 0 to .*, got -1"),
    ("audit", "seed", 2**63, ValueError, "seed must be from 0 to .*, got 9223372036854775808"),
    ("audit", "module", 3, TypeError, "module must be a module, a list of modules or None, got 3"),
    ("audit", "module", ["x"], TypeError, "module must be a module, .*, got 'x' as item 0"),
    ("audit", "threshold", "x", TypeError, "threshold must be a number, got 'x'"),
    ("audit", "frozen", "norm", TypeError, r"frozen must be a list of names of layers, such as .*, got 'norm'"),
    ("replace_batch_norm", "names", "0", TypeError, "names must be a list of names of layers, such as .*, got '0'"),
    ("replace_batch_norm", "norm", "layr", ValueError, "norm must be one of layer, none, got 'layr'.*'layer'"),
    ("alignment", "measures", "nmi", TypeError, "measures must be a list of names of measures, such as .*, got 'nmi'"),
    ("correct", "arms", "fixed/batch", TypeError, "arms must be a list of Arms, such as .*, got 'fixed/batch'"),
    ("correct", "arms", ["fixed/batch"], TypeError, r"arms\[0\] must be an Arm, such as .*, got 'fixed/batch'"),
    ("reproduce", "data", "digits", TypeError, "data must be a list of names of graphs, such as .*, got 'digits'"),
    ("reproduce", "models", "gcn", TypeError, "models must be a list of names of models, such as .*, got 'gcn'"),
    ("TrainConfig", "learning_rate", "x", TypeError, "learning_rate must be a number, above 0, got 'x'"),
    ("TrainConfig", "learning_rate", 0, ValueError, "learning_rate must be above 0, got 0"),
    ("TrainConfig", "clip", 0, ValueError, "clip must be above 0, got 0"),
    ("TrainConfig", "directions", 3, ValueError, "directions must be from 1 to 2, got 3"),
    ("TrainConfig", "balanced", 1, TypeError, "balanced must be True or False, got 1"),
    ("TrainConfig", "composition", "fixed", TypeError, "composition must be a Composition, such as .*, got 'fixed'"),
    ("TrainConfig", "metric", 3, TypeError, "metric must be a string, got 3"),
    ("SplitConfig", "test", "x", TypeError, "test must be a number, got 'x'"),
    ("SplitConfig", "negatives", 0, ValueError, "negatives must be above 0, got 0"),
    ("SplitConfig", "largest_component", "yes", TypeError, "largest_component must be True or False, got 'yes'"),
    ("Fixed", "fraction", "x", TypeError, "fraction must be a number, above 0 and below 1, got 'x'"),
    ("Random", "low", None, TypeError, "low must be a number, got None"),
    ("build_model", "dropout", 1, ValueError, "dropout must be at least 0 and below 1, got 1"),
]


@each_wrong_argument(WRONG)
def test_a_wrong_argument_is_named_before_any_work(monkeypatch, call, argument, value, error, words):
    for module in ("correct", "reproduction"):
        monkeypatch.setattr(f"suffice.link.study.{module}.save_graph", lambda *_: pytest.fail("a graph was stored"))
    expect_error(CALLS[call], argument, value, error, words)


def test_numbers_of_numpy_are_plain_numbers():
    config = TrainConfig(epochs=np.int64(3), learning_rate=np.float32(0.5))
    assert (type(config.epochs), type(config.learning_rate)) == (int, float)
