"""Verdicts on a decoder with BatchNorm over the edge batch, whose predictions are known to depend on the batch.

The decoder is trained with one negative for each positive on the pixels of the digits.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from suffice.link import SplitConfig, load_graph, split_edges
from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.norm_layers import FrozenBatchNorm


class PixelDecoder(nn.Module):
    """A perceptron with BatchNorm over the product of the pixels of two digits."""

    def __init__(self, x, seed=0, norm=nn.BatchNorm1d):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("x", x)
        self.first = nn.Linear(x.size(1), 32)
        self.norm = norm(32)
        self.last = nn.Linear(32, 1)

    def forward(self, pairs):
        hidden = self.norm(self.first(self.x[pairs[0]] * self.x[pairs[1]]))
        return self.last(hidden.relu()).squeeze(-1)


class OwnBatchNorm(nn.Module):
    """BatchNorm by hand, with a name that does not tell what it is."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if not self.training:
            return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()
        self.running_mean.lerp_(x.detach().mean(0), 0.1)
        self.running_var.lerp_(x.detach().var(0), 0.1)
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


class FunctionalBatchNorm(OwnBatchNorm):
    """BatchNorm by the function of torch, without a norm layer."""

    def forward(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class Wrapper(nn.Module):
    """A module whose own mode says nothing about that of the module in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pairs):
        return self.model(pairs)


@pytest.fixture(scope="module")
def digits():
    graph = load_graph("digits")
    return graph, split_edges(graph, SplitConfig(), seed=0)


@pytest.fixture(scope="module")
def edges(digits):
    _, split = digits
    return EdgeSet(split.test, split.test_negatives)


@pytest.fixture(scope="module")
def train(digits):
    graph, split = digits

    def run(model, steps=40):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(512) < 256
        model.train()
        for _ in range(steps):
            chosen = torch.randint(split.train.size(1), (256,), generator=generator)
            negatives = torch.randint(graph.num_nodes, (2, 256), generator=generator)
            logits = model(torch.cat([split.train[:, chosen], negatives], 1))
            loss = functional.binary_cross_entropy_with_logits(logits, labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    return run


@pytest.fixture(scope="module")
def trained(digits, train):
    return train(PixelDecoder(digits[0].x))


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def _audit(score, edges, **options):
    return audit(score, edges, batch_size=256, repeats=4, **options)


def _mean(report, name):
    return report.parts["heldout"].statistics[name].mean


@pytest.fixture(scope="module")
def truth(trained, edges):
    report = _audit(trained, edges)
    assert report.verdict.level == "dominated"
    assert _mean(report, "a_pure") < 0.55 < 0.85 < _mean(report, "accuracy_balanced")
    return report


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: nn.ModuleList([model])])
def test_the_mode_of_a_wrapper_does_not_hide_batch_norm(wrap, model, edges, truth):
    wrapped = wrap(model)
    assert wrapped.training
    assert not model.training
    report = _audit(model, edges, module=wrapped)
    assert report.parts == truth.parts
    assert not report.layers[0].frozen


@pytest.mark.parametrize("norm", [FunctionalBatchNorm, OwnBatchNorm])
def test_batch_norm_without_a_known_layer_is_found_by_training_mode(norm, digits, edges, train):
    model = train(PixelDecoder(digits[0].x, norm=norm))
    before = copy.deepcopy(model.state_dict())
    report = _audit(model, edges)
    assert report.verdict.level == "dominated"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_gets_the_same_statistics(model, edges, truth):
    report = _audit(torch.jit.script(model), edges)
    assert report.verdict.level == "dominated"
    assert _mean(report, "kappa") == pytest.approx(_mean(truth, "kappa"), abs=1e-4)


class Scorer:
    """A callable object that holds its model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, pairs):
        return self.model(pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: lambda pairs: model(pairs),
        lambda model: model.forward,
        Scorer,
        lambda model: Scorer(model).__call__,
        lambda model: {"score": model}.__getitem__("score").__call__,
    ],
)
def test_the_module_behind_a_function_is_found(make, model, edges, truth):
    report = _audit(make(model), edges)
    assert report.parts == truth.parts
    assert report.tested == "training mode"


def test_a_module_that_only_a_call_shows_is_found(model, edges, truth):
    hidden = [[[[[[model]]]]]]
    report = _audit(lambda pairs: hidden[0][0][0][0][0][0](pairs), edges)
    assert report.parts == truth.parts


def test_a_layer_in_eval_mode_is_audited_like_all_others_unless_it_is_named(model, edges, truth):
    model.train()
    model.norm.eval()
    report = _audit(model, edges)
    assert report.parts == truth.parts
    assert "If norm kept stored statistics in training too, name these layers in frozen" in report.verdict.advice
    assert not model.norm.training


def test_several_modules_are_accepted(model, edges, truth):
    report = _audit(model, edges, module=[model.first, model.norm])
    assert report.parts == truth.parts
    assert [layer.name for layer in report.layers] == ["1"]


def test_a_function_that_sets_eval_mode_is_not_called_unaffected(model, edges):
    def score(pairs):
        model.eval()
        return model(pairs)

    report = _audit(score, edges)
    assert report.verdict.level == "undecided"
    assert "Only eval mode was tested" in report.verdict.why
    assert "Nothing" not in report.verdict.advice


def test_without_a_module_only_the_function_as_it_is_was_tested(model, edges):
    report = _audit(lambda pairs: model(pairs), edges, module=())
    assert report.tested == "as called"
    assert "only as it is" in report.verdict.why
    assert "only eval mode was tested" in report.verdict.advice


def test_batch_norm_without_gradients_is_not_taken_for_frozen(model, edges, truth):
    model.norm.requires_grad_(False)
    assert _audit(model, edges).parts == truth.parts


@pytest.mark.parametrize("how", ["replaced", "named", "train"])
def test_frozen_statistics_are_named_and_nothing_is_called_correct(how, model, edges):
    named = ()
    if how == "replaced":
        model.norm = FrozenBatchNorm(model.norm)
    elif how == "named":
        named = ("norm",)
    else:
        model.norm.train = lambda mode=True: model.norm
    report = _audit(model, edges, frozen=named)
    assert report.verdict.level == "unaffected"
    assert report.layers[0].frozen
    assert "batch statistics were not tested: norm." in report.verdict.why
    assert "Nothing" not in report.verdict.advice
    assert "did not undo" in report.verdict.advice


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_has_no_skill_to_judge(seed, digits, edges):
    report = _audit(PixelDecoder(digits[0].x, seed), edges)
    assert report.verdict.level == "no skill"
    assert "nothing to judge" in report.verdict.why


def _noisy(model, kind):
    """Return the trained model without BatchNorm statistics of the batch, with noise that ignores the mode."""
    model.norm = FrozenBatchNorm(model.norm)

    def drop(x):
        return functional.dropout(x, 0.3) if kind == "dropout" else x * (torch.rand_like(x) > 0.3) / 0.7

    model.last.register_forward_pre_hook(lambda _, inputs: drop(inputs[0]))
    return model


def test_dropout_that_ignores_the_mode_is_off(model, edges):
    report = _audit(_noisy(model, "dropout"), edges)
    assert report.verdict.level == "unaffected"
    assert _mean(report, "rank_change") == 0


def test_noise_is_not_taken_for_composition(model, edges):
    report = _audit(_noisy(model, "by hand"), edges)
    assert _mean(report, "rank_change") > 0.05
    assert report.parts["heldout"].noise["rank_change"] == pytest.approx(_mean(report, "rank_change"), abs=0.02)
    assert report.verdict.level == "unaffected"
    assert "from call to call" in report.verdict.why


def test_bias_is_found_in_spite_of_noise(model, edges):
    model.last.register_forward_pre_hook(lambda _, inputs: inputs[0] * (torch.rand_like(inputs[0]) > 0.3))
    report = _audit(model, edges)
    assert report.parts["heldout"].noise["rank_change"] > 0.05
    assert report.verdict.level == "dominated"


def test_swapped_scores_are_reported(model, edges):
    report = _audit(lambda pairs: -model(pairs), edges)
    assert "negatives score above positives" in report.verdict.why
