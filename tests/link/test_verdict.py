"""Verdicts on statistics as measured: mean values of trainings whose composition is known."""

import pytest

from suffice.link.auditing.norm_layers import NormLayer
from suffice.link.auditing.verdict import judge
from suffice.study.results import Interval

HONEST = {
    "a_pure": 0.82,
    "tau": 0.64,
    "kappa": 0.0,
    "rank_change": 0.0,
    "accuracy_balanced": 0.82,
    "auc_pure": 0.91,
    "auc_eval": 0.91,
}


def _verdict(**changes: float):
    values = {key: Interval(value, value, value) for key, value in {**HONEST, **changes}.items()}
    layer = NormLayer("decoder.norm", "BatchNorm", "edge batch", True, False)
    return judge({"heldout": values}, (layer,))


@pytest.mark.parametrize(
    ("level", "why", "changes"),
    [
        ("unaffected", "don't depend", {}),
        ("dominated", "the batch decides", {"a_pure": 0.55, "tau": 0.17, "kappa": -1.3, "accuracy_balanced": 0.85}),
        # A fixed fraction of one tenth, where κ alone sees little.
        ("dominated", "the batch decides", {"a_pure": 0.53, "tau": 0.05, "kappa": -0.3, "accuracy_balanced": 0.8}),
        ("dominated", "κ", {"a_pure": 0.7, "kappa": -1.2, "accuracy_balanced": 0.85}),
        ("affected", "κ = -0.64", {"a_pure": 0.70, "tau": 0.46, "kappa": -0.64, "accuracy_balanced": 0.844}),
        ("affected", "κ = 0.10", {"kappa": 0.1}),
        ("affected", "accuracy 0.70", {"a_pure": 0.70}),
        # Separate passes: pure batches told apart, single edges not.
        ("dominated", "read off the batch", {"a_pure": 0.99, "auc_pure": 1.0, "auc_eval": 0.3}),
        ("dominated", "read off the batch", {"a_pure": 0.99, "kappa": 14.0}),
        ("dominated", "read off the batch", {"a_pure": 0.99, "accuracy_balanced": 0.7}),
        # Nothing learned: no accuracy above chance that could be lost.
        ("unaffected", "don't depend", {"a_pure": 0.5, "accuracy_balanced": 0.51}),
    ],
)
def test_levels(level, why, changes):
    found = _verdict(**changes)
    assert found.level == level
    assert why in found.why
    assert "decoder.norm" in found.why


def test_the_worst_part_decides():
    values = {key: Interval(value, value, value) for key, value in HONEST.items()}
    bad = {**values, "kappa": Interval(-1.5, -1.6, -1.4)}
    found = judge({"heldout": values, "train": bad}, ())
    assert found.level == "dominated"
    assert "train" in found.why
    assert "heldout" not in found.why
