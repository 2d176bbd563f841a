import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from suffice.cli.link_tables import row_table
from suffice.link.auditing.trained import audit_trained
from suffice.link.models import EncoderDecoderSettings
from suffice.link.study.correct import correct
from suffice.link.study.experiment import Experiment, align_seeds, mean_rows
from suffice.link.train.alignment import alignment, feature_alignment, incident_edge_means, measure_alignment


def test_incident_edge_means_equal_brute_force(parts, graph):
    embeddings = torch.randn(parts.train.size(1), 3)
    means, has_edge = incident_edge_means(embeddings, parts.train, graph.num_nodes)
    for row, node in enumerate(has_edge.nonzero().flatten().tolist()):
        is_incident = (parts.train == node).any(dim=0)
        assert torch.allclose(means[row], embeddings[is_incident].mean(0), atol=1e-5)
    assert int(has_edge.sum()) == parts.train.unique().numel()


def test_small_classes_do_not_prevent_the_measures():
    x = torch.randn(40, 3)
    three, one = (torch.tensor([0] * (40 - n) + [1] * n) for n in (3, 1))
    assert 0 <= measure_alignment(x, three, measures=("probe",))["probe"] <= 1
    found = measure_alignment(x, one)
    assert math.isnan(found.pop("probe"))
    assert all(math.isfinite(value) for value in found.values())


def test_measures_are_named_after_what_they_measure(parts, graph):
    model = EncoderDecoderSettings(hidden=8).build(graph.x.size(1)).train()
    measures = ("nmi", "trace_ratio")
    found = alignment(model, graph, parts, measures=measures)
    assert list(found) == ["node_nmi", "node_trace_ratio", "edge_nmi", "edge_trace_ratio"]
    assert model.training
    expected = measure_alignment(graph.x, graph.classes, measures=measures)
    assert feature_alignment(graph, measures=measures) == {f"feature_{name}": expected[name] for name in measures}
    with pytest.raises(ValueError, match=r"measures must be among nmi, .*, got \['purity'\]"):
        alignment(model, graph, parts, measures=("purity",))


def test_classes_are_checked_before_any_training(graph, monkeypatch):
    monkeypatch.setattr("suffice.link.study.experiment.train_model", lambda *_, **__: pytest.fail("trained"))
    for y, message in (
        (None, "y must be the class of each node of block-model, got None"),
        (
            torch.ones(graph.num_nodes, dtype=torch.long),
            "y must hold at least two classes, got only class 1",
        ),
    ):
        wrong = replace(graph, y=y)
        with pytest.raises(ValueError, match=message):
            align_seeds(Experiment(wrong, EncoderDecoderSettings(hidden=8)), [0])
        if y is not None:
            with pytest.raises(ValueError, match=message):
                correct(wrong, seeds=1)


def test_other_modules_are_refused(graph, parts):
    module = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"model must be a LinkPredictor of suffice.link, got Linear\. Audit any other"):
        audit_trained(module, graph, parts)
    with pytest.raises(TypeError, match=r"model must be a LinkPredictor of suffice.link, got Linear\. Pass the"):
        alignment(module, graph, parts)


def test_intervals_end_where_the_metric_ends():
    rows = mean_rows([{"hits@100": 0.99, "node_trace_ratio": 1.0}, {"hits@100": 0.7, "node_trace_ratio": 9.0}])
    assert [rows[0]["low"], rows[0]["high"]] == [0, 1]
    assert rows[1]["high"] > 9
    assert rows[1]["low"] < 0
    assert mean_rows([{"auc": 0.5}]) == [{"metric": "auc", "mean": 0.5, "low": None, "high": None}]
    shown = StringIO()
    Console(file=shown).print(row_table(mean_rows([{"auc": 0.5}]), "one seed"))
    assert "nan" not in shown.getvalue()
    assert "low" not in shown.getvalue()
