import math

import pytest
import torch

from suffice.link.models import EncoderDecoderSettings
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
