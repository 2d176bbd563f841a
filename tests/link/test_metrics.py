import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suffice.link.metrics import (
    auc,
    average_precision,
    compute_metric,
    compute_metrics,
    hits_at_k,
    mean_reciprocal_rank,
)

# Few distinct values, so that ties are common.
SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40).map(torch.tensor)


@pytest.mark.filterwarnings("ignore:negatives must be at least k")
@given(positives=SCORES, negatives=SCORES, k=st.integers(1, 30))
def test_hits_equals_that_of_ogb(positives, negatives, k):
    linkproppred = pytest.importorskip("ogb.linkproppred")
    evaluator = linkproppred.Evaluator("ogbl-ppa")
    evaluator.K = k
    expected = evaluator.eval({"y_pred_pos": positives, "y_pred_neg": negatives})[f"hits@{k}"]
    assert hits_at_k(positives, negatives, k) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [hits_at_k, compute_metrics])
def test_hits_with_fewer_than_k_negatives_warns(measure):
    with pytest.warns(
        UserWarning, match=r"negatives must be at least k=100 for Hits@100 .*, got 99: the result is 1\.0"
    ):
        measure(torch.zeros(5), torch.ones(99), 100)
    assert hits_at_k(torch.zeros(5), torch.ones(100), 100) == 0


@given(positives=SCORES, negatives=SCORES)
def test_ranks_and_auc_equal_brute_force(positives, negatives):
    p, n = positives.tolist(), negatives.tolist()
    ranks = [1 + sum(x > s for x in n) + sum(x == s for x in n) / 2 for s in p]
    assert mean_reciprocal_rank(positives, negatives) == pytest.approx(sum(1 / r for r in ranks) / len(p))
    negatives_of_each = negatives.expand(len(p), -1)
    assert mean_reciprocal_rank(positives, negatives_of_each) == pytest.approx(sum(1 / r for r in ranks) / len(p))
    wins = sum((s > x) + (s == x) / 2 for s in p for x in n) / (len(p) * len(n))
    assert auc(positives, negatives) == pytest.approx(wins)


def test_average_precision_by_hand():
    assert average_precision(torch.tensor([3.0, 1.0]), torch.tensor([2.0])) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_all_metrics_are_returned_by_name():
    found = compute_metrics(torch.tensor([1.0]), torch.tensor([0.0]), k=1)
    assert found == {"hits@1": 1.0, "auc": 1.0, "ap": 1.0, "mrr": 1.0}


@given(positives=SCORES, negatives=SCORES)
def test_one_metric_equals_that_of_all(positives, negatives):
    for name, value in compute_metrics(positives, negatives, 1).items():
        assert compute_metric(name, positives, negatives) == value


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"metric must be hits@K, auc, ap or mrr, got 'f1'"):
        compute_metric("f1", torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("positives", "negatives", "k", "message"),
    [
        ([], [1.0], 1, r"positives must have shape \[scores\] with at least one score, got \(0,\)"),
        ([1.0], [float("nan")], 1, "negatives must not contain NaN, got 1 NaN"),
        ([1.0], [1.0], 0, "k must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(positives, negatives, k, message):
    with pytest.raises(ValueError, match=message):
        hits_at_k(torch.tensor(positives), torch.tensor(negatives), k)
