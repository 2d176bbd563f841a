"""The assertion for test suites fails for models whose scores are known to depend on the batch, and for no others."""

import copy

import pytest
import torch
from torch import nn

from suffice.link import EdgeSet, assert_composition_invariant, freeze_statistics
from suffice.link.auditing.audit import audit
from tests.link.pixels import EDGES, GRAPH, SPLIT, PixelDecoder, trained


@pytest.fixture(scope="module")
def biased():
    return trained(nn.BatchNorm1d)


@pytest.fixture(scope="module")
def honest():
    return trained(nn.LayerNorm)


def _failure(score, **options):
    with pytest.raises(AssertionError) as error:
        assert_composition_invariant(score, EDGES, batch_size=256, repeats=4, **options)
    return str(error.value)


def test_message_names_verdict_statistics_layers_and_advice(biased):
    message = _failure(biased)
    found = audit(biased, EDGES, batch_size=256, repeats=4)
    statistics = found.parts["heldout"].statistics
    assert message.startswith("Scores depend on the composition of the batch (verdict: dominated).")
    assert f"|κ| is {abs(statistics['kappa'].mean):.3g} (tolerance 0.05)" in message
    assert f"accuracy is {statistics['a_pure'].mean:.2f} in pure batches" in message
    assert "Layers that normalize over the edge batch: norm." in message
    assert message.endswith(found.verdict.advice)


def test_honest_model_passes_even_with_a_tiny_tolerance(honest):
    report = assert_composition_invariant(honest, EDGES, tolerance=1e-5, batch_size=256, repeats=4)
    assert report == audit(honest, EDGES, batch_size=256, repeats=4)
    assert report.verdict.level == "unaffected"


def test_tolerance_limits_kappa():
    """The score gap is 1, and all scores fall by 0.03 as the fraction of positives goes from 0 to 1: κ is −0.03."""

    def score(pairs, label):
        return label - 0.03 * label.mean()

    label = torch.ones(EDGES.positives.size(1)), torch.zeros(EDGES.negatives.size(1))
    edges = EdgeSet(EDGES.positives, EDGES.negatives, items={"label": label})
    assert_composition_invariant(score, edges, tolerance=0.031, threshold=0.5)
    with pytest.raises(AssertionError) as error:
        assert_composition_invariant(score, edges, tolerance=0.029, threshold=0.5)
    assert str(error.value).splitlines() == [
        "Scores depend on the composition of the batch (verdict: unaffected).",
        "On heldout edges, |κ| is 0.03 (tolerance 0.029).",
        "No known layer normalizes over the edge batch: look for a mean, a softmax or attention over the scored pairs.",
        "Replace what depends on the batch, or pass a larger tolerance if you accept the dependence.",
    ]


def test_untrained_model_is_judged_by_what_is_measured():
    assert "(verdict: no skill)" in _failure(PixelDecoder(nn.BatchNorm1d))
    assert_composition_invariant(PixelDecoder(nn.LayerNorm), EDGES, batch_size=256, repeats=4)


def test_model_of_which_only_eval_mode_was_tested_fails(biased):
    def score(pairs):
        biased.eval()
        return biased(pairs)

    message = _failure(score)
    assert message.startswith("The audit could not test training mode (verdict: undecided).")
    assert "Remove eval() from score" in message


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)], ids=["global", "own"])
def test_noise_is_no_dependence(honest, generator):
    def score(pairs):
        logits = honest(pairs)
        return logits + torch.randn(logits.shape, generator=generator)

    assert_composition_invariant(score, EDGES, batch_size=256)


def test_frozen_statistics_pass(biased):
    model = copy.deepcopy(biased)
    freeze_statistics(model, model, SPLIT.train, GRAPH.num_nodes)
    assert_composition_invariant(model, EDGES, batch_size=256, repeats=4)


class _Centered(nn.Module):
    def __init__(self, _channels, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, hidden):
        return hidden - self.scale * hidden.mean(0)


def test_message_names_the_module_that_couples_the_edges():
    message = _failure(PixelDecoder(_Centered))
    assert "depends on the other edges of its batch: norm (_Centered)." in message
    assert "No known layer" not in message


def test_message_names_the_module_whatever_the_verdict():
    weak = trained(lambda channels: _Centered(channels, scale=0.003))
    message = _failure(weak, tolerance=1e-5)
    assert "(verdict: unaffected)" in message
    assert "Modules whose output for an edge depends on the other edges of its batch: norm (_Centered)." in message
    assert "No known layer" not in message
