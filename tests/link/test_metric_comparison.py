"""Metrics in eval mode and in batches of each composition equal those that are computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from suffice.cli.link_tables import audit_tables
from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.metric_comparison import WAYS, choose_k, compare_metrics, resample_metrics
from suffice.link.auditing.module_state import Modes
from suffice.link.metrics import auc, hits_at_k, mean_reciprocal_rank
from suffice.link.study.report_sections import audit_page
from tests.link.pixels import EDGES as PIXEL_EDGES
from tests.link.pixels import trained

POSITIVES, NEGATIVES = 40, 100
VALUES = torch.randn(POSITIVES + NEGATIVES, generator=torch.Generator().manual_seed(0)) + (
    torch.arange(POSITIVES + NEGATIVES) < POSITIVES
)


def _edges(positives=POSITIVES, negatives=NEGATIVES):
    """Return edges from each node to itself, so that a pair is a position in the values."""
    nodes = torch.arange(POSITIVES + NEGATIVES)
    return EdgeSet(nodes[:positives].expand(2, -1), nodes[POSITIVES : POSITIVES + negatives].expand(2, -1))


def _means(compared):
    return {way: {name: value.mean for name, value in values.items()} for way, values in compared.items()}


def _compare(score, edges, batch_size, **options):
    return _means(audit(score, edges, batch_size=batch_size, repeats=2, metrics=True, **options).metrics["heldout"])


def _metrics(positives, negatives, k):
    return {
        "auc": pytest.approx(auc(positives, negatives)),
        f"hits@{k}": pytest.approx(hits_at_k(positives, negatives, k)),
        "mrr": pytest.approx(mean_reciprocal_rank(positives, negatives)),
    }


def test_scores_that_do_not_depend_on_the_batch_have_the_same_metrics_in_all():
    found = _compare(lambda pairs: VALUES[pairs[0]], _edges(), 20)
    assert found == dict.fromkeys(WAYS, _metrics(VALUES[:POSITIVES], VALUES[POSITIVES:], 10))


def test_metrics_of_scores_relative_to_the_mean_of_the_batch():
    def score(pairs):
        return VALUES[pairs[0]] - VALUES[pairs[0]].mean()

    found = _compare(score, _edges(), 1000)  # each class, and both together, are one batch
    together = _metrics(VALUES[:POSITIVES], VALUES[POSITIVES:], 10)
    centered = [side - side.mean() for side in (VALUES[:POSITIVES], VALUES[POSITIVES:])]
    assert found == {**dict.fromkeys(WAYS, together), "separate": _metrics(*centered, 10)}


@pytest.mark.parametrize(("positives", "negatives"), [(40, 100), (40, 40), (40, 16), (16, 100)])
def test_batches_have_the_composition_that_is_said(positives, negatives):
    batches = []

    def score(pairs):
        batches.append(pairs[0])
        return VALUES[pairs[0]]

    edges = _edges(positives, negatives).bind(score)
    compare_metrics(edges, Modes(None, set()), lambda **_: None, batch_size=20, seed=0)
    ratio = positives / (positives + negatives)
    remaining = list(batches)
    for way in WAYS:
        remaining = remaining[2:]  # a batch is scored twice, to see whether that changes the scores
        if way == "separate":
            counts = [-(-positives // 20), -(-negatives // 20)]
        elif way == "balanced":
            counts = [-(-max(positives, negatives) // 10)]
        else:
            counts = [-(-(positives + negatives) // 20)]
        own, remaining = remaining[: sum(counts)], remaining[sum(counts) :]
        assert max(map(len, own)) <= 20
        fractions = torch.tensor([float((nodes < POSITIVES).float().mean()) for nodes in own])
        if way == "separate":
            assert fractions.tolist() == [1.0] * counts[0] + [0.0] * counts[1]
        elif way == "balanced":
            assert fractions.tolist() == [0.5] * counts[0]
        else:
            assert (fractions - ratio).abs().max() < 0.06
        scored = torch.cat(own)
        assert scored.unique().numel() == positives + negatives
        assert way == "balanced" or scored.numel() == positives + negatives
    assert not remaining


@pytest.mark.parametrize("num_levels", [4, 10**6])  # with many ties, and with none
def test_resampled_metrics_are_those_of_the_drawn_edges(num_levels):
    positives, negatives = ((VALUES * num_levels).round() / num_levels).split([POSITIVES, NEGATIVES])
    negatives = negatives.sort().values  # the draws are of ranks
    found = resample_metrics(positives, negatives, 10, seed=3, count=30)
    rng = np.random.default_rng(3)
    for row in found:
        drawn = [side[torch.from_numpy(rng.integers(len(side), size=len(side)))] for side in (positives, negatives)]
        expected = [metric.expected for metric in _metrics(*drawn, 10).values()]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_intervals_cover_the_metrics_of_other_edges():
    """Of 95 % intervals of normal scores, about 95 % contain the AUC of the distribution."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        scores = torch.randn(200, generator=generator) + (torch.arange(200) < 100)
        nodes = torch.arange(200)
        edges = EdgeSet(nodes[:100].expand(2, -1), nodes[100:].expand(2, -1)).bind(lambda p, s=scores: s[p[0]])
        found = compare_metrics(edges, Modes(None, set()), lambda **_: None, batch_size=200, seed=seed)["eval"]["auc"]
        assert found.low < found.mean < found.high
        covered += found.low < 0.7602 < found.high  # Φ(1/√2)
    assert 88 <= covered <= 99


def test_k_of_hits_is_at_most_a_tenth_of_the_negatives():
    numbers = (1, 16, 29, 30, 50, 99, 100, 200, 500, 999, 1000, 10**6)
    assert [choose_k(number) for number in numbers] == [1, 1, 1, 3, 5, 5, 10, 20, 50, 50, 100, 100]


def test_what_batch_norm_changes():
    """A decoder that was trained at 1:1 ranks well in mixed batches, but not across pure ones."""
    report = audit(trained(), PIXEL_EDGES, batch_size=256, repeats=2, metrics=True)
    aucs = {way: values["auc"].mean for way, values in report.metrics["heldout"].items()}
    assert aucs["separate"] < 0.65 < 0.9 < min(aucs["eval"], aucs["balanced"], aucs["test_ratio"])
    without = audit(trained(nn.LayerNorm), PIXEL_EDGES, batch_size=256, repeats=2, metrics=True).metrics["heldout"]
    without = _means(without)
    assert all(values == pytest.approx(without["eval"], abs=1e-4) for values in without.values())
    tables = list(audit_tables(report))
    assert [table.title for table in tables] == ["heldout edges", "Metrics of heldout edges, mean [95 % interval]"]
    assert list(tables[1].columns[0].cells) == list(WAYS.values())
    html = audit_page(report, "suffice link audit").to_html()
    assert all(f"{value:.3f}" in html for value in aucs.values())


def test_a_memory_is_the_same_for_each_batch():
    seen = [0.0]

    def score(pairs):
        seen[0] += 10.0
        return VALUES[pairs[0]] + seen[0]

    found = _compare(score, _edges(), 20)
    assert found == dict.fromkeys(WAYS, _metrics(VALUES[:POSITIVES], VALUES[POSITIVES:], 10))


def test_metrics_are_only_computed_on_demand():
    assert audit(lambda pairs: VALUES[pairs[0]], _edges(), repeats=2).metrics == {}
    with pytest.raises(TypeError, match="metrics must be"):
        audit(lambda pairs: VALUES[pairs[0]], _edges(), metrics="auc")
