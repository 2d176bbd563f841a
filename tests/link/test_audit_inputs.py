"""Scores and edges of every form that people have: probabilities, NumPy arrays, tuples, and pairs with items."""

import numpy as np
import pytest
import torch
from torch import nn

from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.verdict import judge
from suffice.study.results import Interval

NODES = 80
Z = torch.randn(NODES, 6, generator=torch.Generator().manual_seed(0))
PAIRS = torch.cartesian_prod(torch.arange(NODES), torch.arange(NODES)).T
ORDER = (Z[PAIRS[0]] * Z[PAIRS[1]]).sum(1).argsort()
POSITIVES, NEGATIVES = PAIRS[:, ORDER[-300:]], PAIRS[:, ORDER[:300]]
EDGES = EdgeSet(POSITIVES, NEGATIVES)


def _logits(pairs):
    """Compare each pair with the rest of the batch: κ is about -1."""
    products = (Z[pairs[0]] * Z[pairs[1]]).sum(1)
    return products - products.mean()


def _audit(score, edges=EDGES, **options):
    return audit(score, edges, batch_size=128, repeats=4, module=(), **options)


def _means(report):
    return {name: value.mean for name, value in report.parts["heldout"].statistics.items()}


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_probabilities_get_the_verdict_of_their_logits(threshold):
    logits, probabilities = _audit(_logits), _audit(lambda pairs: _logits(pairs).sigmoid(), threshold=threshold)
    assert _means(logits)["kappa"] < -0.5
    assert _means(probabilities) == pytest.approx(_means(logits), rel=1e-3, abs=1e-4)
    assert probabilities.verdict.level == logits.verdict.level
    assert (probabilities.probabilities, probabilities.threshold) == (True, 0.5)
    assert "taken for probabilities: the threshold is 0.5, and κ is computed on their logits" in (
        probabilities.verdict.why
    )
    assert (logits.probabilities, logits.threshold) == (False, 0.0)
    assert "probabilities" not in logits.verdict.why


def test_the_threshold_of_probabilities_is_converted():
    logits = _audit(_logits, threshold=1.0)
    probabilities = _audit(lambda pairs: _logits(pairs).sigmoid(), threshold=float(torch.tensor(1.0).sigmoid()))
    assert _means(probabilities) == pytest.approx(_means(logits), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("convert", [torch.Tensor.double, lambda scores: scores.double().numpy()])
def test_scores_of_double_precision_keep_it(convert):
    """Scores around a billion cannot be told apart in float32."""
    offset = 1e9
    near_zero = _audit(lambda pairs: convert(_logits(pairs)), metrics=True)
    far = _audit(lambda pairs: convert(_logits(pairs)) + offset, threshold=offset, metrics=True)
    assert _means(far) == pytest.approx(_means(near_zero), rel=1e-5, abs=1e-6)
    assert far.verdict.level == near_zero.verdict.level
    for way, values in near_zero.metrics["heldout"].items():
        assert far.metrics["heldout"][way] == values
    single = _audit(lambda pairs: (_logits(pairs).double() + offset).float(), threshold=offset)
    assert _means(single)["auc_balanced"] == 0.5  # what float32 would have left


def test_probabilities_of_double_precision_keep_their_logits():
    def logits(pairs):
        return 0.5 * _logits(pairs).double() - 15  # probabilities below the rounding error of float32

    probabilities = _audit(lambda pairs: logits(pairs).sigmoid())
    assert probabilities.probabilities
    assert _means(probabilities)["kappa"] == pytest.approx(_means(_audit(logits))["kappa"], rel=1e-3)


def test_probabilities_of_0_and_1_have_finite_logits():
    report = _audit(lambda pairs: (100 * _logits(pairs)).sigmoid())
    assert all(np.isfinite(value) for value in _means(report).values())


def test_scores_between_0_and_1_are_no_probabilities_with_another_threshold():
    report = _audit(lambda pairs: 0.5 + 0.01 * _logits(pairs), threshold=0.0)
    assert not report.probabilities
    assert "all scores are on one side of the threshold 0" in report.verdict.why
    assert "Pass a threshold" in report.verdict.advice


def test_all_sets_must_be_probabilities():
    sets = {"heldout": EDGES, "train": EdgeSet(POSITIVES, NEGATIVES, lambda pairs: _logits(pairs).sigmoid())}
    assert not _audit(_logits, sets).probabilities


@pytest.mark.parametrize(
    "convert",
    [
        lambda pairs: pairs.numpy(),
        lambda pairs: pairs.numpy().astype(np.int32),
        lambda pairs: tuple(pairs),
        lambda pairs: tuple(pairs.numpy()),
        lambda pairs: pairs.tolist(),
        lambda pairs: (pairs[0].tolist(), pairs[1].numpy()),
    ],
)
def test_edges_may_be_arrays_and_tuples(convert):
    edges = EdgeSet(convert(POSITIVES), convert(NEGATIVES))
    assert torch.equal(edges.positives, POSITIVES)
    assert _audit(_logits, edges) == _audit(_logits)


@pytest.mark.parametrize(
    "convert",
    [
        lambda scores: scores.numpy(),
        lambda scores: tuple(scores.tolist()),
        lambda scores: tuple(scores),
        lambda scores: (scores,),
        lambda scores: scores.numpy()[:, None],
    ],
)
def test_scores_may_be_arrays_and_tuples(convert):
    assert _audit(lambda pairs: convert(_logits(pairs))) == _audit(_logits)


def test_a_function_of_arrays_gets_arrays():
    z = Z.numpy()

    def score(pairs):
        assert isinstance(pairs, np.ndarray)
        products = np.einsum("ij,ij->i", z[pairs[0]], z[pairs[1]])
        return products - np.mean(products)

    found = _means(_audit(score, EdgeSet(POSITIVES.numpy(), NEGATIVES.numpy())))
    assert found == pytest.approx(_means(_audit(_logits)), abs=1e-4)


@pytest.mark.parametrize("convert", [lambda values: values, lambda values: values.numpy()])
def test_every_pair_is_scored_with_its_own_items(convert):
    """The items of a pair are a function of its nodes, so that each call can check them."""

    def time(pairs):
        return pairs[0] * NODES + pairs[1]

    def relation(pairs):
        return torch.stack([pairs[0] % 3, pairs[1] % 5], dim=1)

    items = {
        "time": (convert(time(POSITIVES)), convert(time(NEGATIVES))),
        "relation": (convert(relation(POSITIVES)), convert(relation(NEGATIVES))),
    }
    calls = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, pairs, time, relation):
            expected = pairs[0] * NODES + pairs[1]
            assert torch.equal(torch.as_tensor(time), expected)
            assert torch.equal(torch.as_tensor(relation)[:, 1], pairs[1] % 5)
            calls.append(1)
            products = (Z[pairs[0]] * Z[pairs[1]]).sum(1)
            return self.norm(products[:, None]).squeeze(1)

    report = audit(Model(), EdgeSet(POSITIVES, NEGATIVES, items=items), batch_size=128, repeats=4)
    assert [layer.input_rows for layer in report.layers] == ["edges"]
    assert report.verdict.level == "dominated"
    assert not calls  # the variables of a scoring function are restored


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: EdgeSet(POSITIVES.float(), NEGATIVES),
            TypeError,
            "positives must be integers .*, got .* torch.float32",
        ),
        (lambda: EdgeSet("edges", NEGATIVES), TypeError, "positives must be integers of shape .*, got 'edges'"),
        (
            lambda: EdgeSet(POSITIVES, ([1, 2], [3])),
            TypeError,
            r"negatives must be integers .*, got \(\[1, 2\], \[3\]\)",
        ),
        (lambda: EdgeSet(POSITIVES.T, NEGATIVES), ValueError, r"positives must have shape \[2, edges\] .*\(300, 2\)"),
        (lambda: EdgeSet(POSITIVES, NEGATIVES, 3), TypeError, "score must be a function, got 3"),
        (
            lambda: EdgeSet(POSITIVES, NEGATIVES, items=[1]),
            TypeError,
            r"items must be a mapping of names .*, got \[1\]",
        ),
        (
            lambda: EdgeSet(POSITIVES, NEGATIVES, items={"time": POSITIVES[0]}),
            TypeError,
            r"items\['time'\] must be a tuple of two tensors or arrays",
        ),
        (
            lambda: EdgeSet(POSITIVES, NEGATIVES, items={"time": (POSITIVES[0], NEGATIVES[0, 1:])}),
            ValueError,
            r"items\['time'\] must have one value for each of 300 positives and 300 .* \(300,\) and \(299,\)",
        ),
        (lambda: audit(_logits, EDGES, threshold="0"), TypeError, "threshold must be a number, got '0'"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("high", "pure", "is_reported"), [(0.49, 0.45, True), (0.52, 0.45, False), (0.45, 0.99, False)]
)
def test_an_auc_below_one_half_is_a_wrong_sign(high, pure, is_reported):
    """Unless it may be chance, or pure batches are separated correctly, as after separate passes."""
    means = {"a_pure": 0.5, "tau": 0.0, "kappa": 0.0, "rank_change": 0.0, "accuracy_balanced": 0.5, "auc_pure": pure}
    part = {name: Interval(value, value, value) for name, value in means.items()}
    part |= {name: Interval(0.44, 0.4, high) for name in ("auc_eval", "auc_balanced")}
    verdict = judge({"heldout": part}, ())
    assert ("negatives score above positives" in verdict.why) == is_reported
    assert ("Check the sign of the scores" in verdict.advice) == is_reported


def test_swapped_edges_are_reported_without_any_norm():
    report = _audit(lambda pairs: (Z[pairs[0]] * Z[pairs[1]]).sum(1), EdgeSet(NEGATIVES, POSITIVES))
    assert report.verdict.level == "unaffected"
    assert "negatives score above positives (AUC is 0.00, below 0.5)" in report.verdict.why
    assert report.verdict.advice.startswith("Check the sign of the scores")


def test_frozen_layers_need_a_module():
    edges = EdgeSet(torch.arange(32).view(2, 16), torch.arange(32, 64).view(2, 16))
    with pytest.raises(ValueError, match=r"frozen must contain .* no module was found behind score.*, got \['norm'\]"):
        audit(lambda pairs: pairs[0].float(), edges, frozen=["norm"])


def test_names_of_edge_sets_are_texts():
    edges = EdgeSet(torch.arange(32).view(2, 16), torch.arange(32, 64).view(2, 16))
    with pytest.raises(TypeError, match=r"edges must be an EdgeSet or a mapping of names to EdgeSets, got \{1:"):
        audit(lambda pairs: pairs[0].float(), {1: edges})
