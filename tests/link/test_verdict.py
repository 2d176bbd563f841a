"""Verdicts on measured statistics: means of trainings with a known composition."""

import pytest

from suffice.link.auditing.norm_layers import NormLayer
from suffice.link.auditing.verdict import Evidence, judge
from suffice.study.results import Interval

UNBIASED = {
    "a_pure": 0.82,
    "tau": 0.64,
    "kappa": 0.0,
    "rank_change": 0.0,
    "accuracy_balanced": 0.82,
    "auc_pure": 0.91,
    "auc_eval": 0.91,
}


def _judge(**changes: float):
    values = {key: Interval(value, value, value) for key, value in {**UNBIASED, **changes}.items()}
    layer = NormLayer("decoder.norm", "BatchNorm", "edges", mixes_rows=True, frozen=False)
    return judge({"heldout": values}, (layer,))


@pytest.mark.parametrize(
    ("level", "why", "changes"),
    [
        ("unaffected", "does not depend", {}),
        (
            "dominated",
            "depend mostly on the batch",
            {"a_pure": 0.55, "tau": 0.17, "kappa": -1.3, "accuracy_balanced": 0.85},
        ),
        # Trained with 10 % positives, where κ alone shows little.
        (
            "dominated",
            "depend mostly on the batch",
            {"a_pure": 0.53, "tau": 0.05, "kappa": -0.3, "accuracy_balanced": 0.8},
        ),
        ("dominated", "κ = -1.20", {"a_pure": 0.7, "kappa": -1.2, "accuracy_balanced": 0.85}),
        ("affected", "κ = -0.64", {"a_pure": 0.70, "tau": 0.46, "kappa": -0.64, "accuracy_balanced": 0.844}),
        ("affected", "κ = 0.10", {"kappa": 0.1}),
        ("affected", "accuracy is 0.70", {"a_pure": 0.70}),
        # Trained with separate passes: the model recognizes pure batches, but not single edges.
        ("dominated", "infers the class from the batch", {"a_pure": 0.99, "auc_pure": 1.0, "auc_eval": 0.3}),
        ("dominated", "infers the class from the batch", {"a_pure": 0.99, "kappa": 14.0}),
        ("dominated", "infers the class from the batch", {"a_pure": 0.99, "accuracy_balanced": 0.7}),
        # BatchNorm over all nodes whose running statistics are not learned yet: only eval mode fails.
        ("unaffected", "does not depend", {"auc_pure": 0.91, "auc_balanced": 0.9, "auc_eval": 0.4}),
        ("dominated", "infers the class", {"a_pure": 0.9, "auc_pure": 1.0, "auc_balanced": 0.6, "auc_eval": 0.3}),
        # An untrained model has no accuracy above chance to lose.
        ("unaffected", "does not depend", {"a_pure": 0.5, "accuracy_balanced": 0.51}),
    ],
)
def test_levels(level, why, changes):
    verdict = _judge(**changes)
    assert verdict.level == level
    assert why in verdict.why
    assert "decoder.norm" in verdict.why


def test_the_worst_edge_set_decides():
    values = {key: Interval(value, value, value) for key, value in UNBIASED.items()}
    biased = {**values, "kappa": Interval(-1.5, -1.6, -1.4)}
    verdict = judge({"heldout": values, "train": biased}, ())
    assert verdict.level == "dominated"
    assert "train" in verdict.why
    assert "heldout" not in verdict.why


@pytest.mark.parametrize(
    ("level", "why", "changes"),
    [
        ("undecided", "not clear how much", {"kappa": -3.8, "rank_change": 0.1}),
        ("undecided", "not clear how much", {"kappa": 7.0}),
        ("unaffected", "does not depend", {"kappa": 0.0}),
        ("dominated", "infers the class", {"kappa": 7.0, "auc_pure": 1.0, "auc_eval": 0.3}),
    ],
)
def test_kappa_has_no_meaning_if_the_score_gap_may_be_zero(level, why, changes):
    values = {key: Interval(value, value, value) for key, value in {**UNBIASED, **changes}.items()}
    verdict = judge({"heldout": values}, (), Evidence(score_gaps={"heldout": Interval(0.1, -0.1, 0.3)}))
    assert verdict.level == level
    assert why in verdict.why


@pytest.mark.parametrize("kappa", [0.6, 1.23])
def test_a_positive_kappa_is_explained(kappa):
    verdict = _judge(kappa=kappa, a_pure=0.95, tau=0.9, accuracy_balanced=0.77)
    assert verdict.level == "dominated"
    assert "score higher the more positives their batch contains" in verdict.why
    assert "train with the balanced loss" in verdict.why


def test_a_negative_kappa_is_not_explained_as_a_positive_one():
    assert "balanced loss" not in _judge(kappa=-1.2, a_pure=0.7).why


@pytest.mark.parametrize(("level", "noise"), [("affected", 0.05), ("unaffected", 0.1)])
def test_noise_is_subtracted(level, noise):
    values = {key: Interval(value, value, value) for key, value in {**UNBIASED, "rank_change": 0.1}.items()}
    evidence = Evidence(noise={"heldout": {"kappa": 0.0, "rank_change": noise}})
    assert judge({"heldout": values}, (), evidence).level == level
