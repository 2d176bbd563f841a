import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.nn import MLP, LayerNorm

from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.module_state import norm_mode
from suffice.link.auditing.norm_layers import FrozenBatchNorm
from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Fixed
from suffice.link.corrections import NoNorm, freeze_statistics, replace_batch_norm, train_corrected
from suffice.link.models import EncoderDecoderSettings, PairScorer
from suffice.link.train.config import TrainConfig
from suffice.link.train.trainer import fit


class Decoder(nn.Module):
    """A model that is not of this package: fixed embeddings, a Hadamard product and PyG's MLP."""

    def __init__(self, norm="batch_norm", nodes=200):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("z", torch.randn(nodes, 8))
        self.mlp = MLP([8, 16, 1], norm=norm, dropout=0.5)

    def forward(self, pairs):
        return self.mlp(self.z[pairs[0]] * self.z[pairs[1]]).squeeze(-1)


@pytest.fixture(scope="module")
def edges() -> EdgeSet:
    model = Decoder()
    pairs = torch.randint(0, 200, (2, 1200), generator=torch.Generator().manual_seed(0))
    likely = (model.z[pairs[0]] * model.z[pairs[1]]).sum(1)
    order = likely.argsort()
    return EdgeSet(pairs[:, order[-400:]], pairs[:, order[:400]])


def _statistics(report, name="heldout"):
    return {key: value.mean for key, value in report.parts[name].statistics.items()}


def test_kappa_of_a_known_shift(edges):
    """s(e) = ±1 − c·(f − 0.5): scores fall by c = 3 as f goes from 0 to 1, and the gap is 2."""
    positive = {tuple(pair) for pair in edges.positives.T.tolist()}

    def score(pairs):
        label = torch.tensor([float(tuple(pair) in positive) for pair in pairs.T.tolist()])
        return 2 * label - 1 - 3 * (label.mean() - 0.5)

    found = _statistics(audit(score, edges, batch_size=200))
    assert found["kappa"] == pytest.approx(-1.5, abs=1e-5)
    # At f = 1 positives score 1 − 1.5 < 0, and at f = 0 negatives score −1 + 1.5 > 0: all are misclassified.
    assert found["a_pure"] == 0
    assert found["accuracy_balanced"] == 1
    assert found["rank_change"] == 0


def test_a_function_of_single_edges_is_unaffected_and_tau_is_tpr_minus_fpr(edges):
    z = Decoder().z

    def score(pairs):
        return (z[pairs[0]] * z[pairs[1]]).sum(-1)

    report = audit(score, edges)
    found = _statistics(report)
    rates = [float((score(part) > 0).float().mean()) for part in (edges.positives, edges.negatives)]
    assert found["kappa"] == pytest.approx(0, abs=1e-6)
    assert found["tau"] == pytest.approx(rates[0] - rates[1], abs=0.02)
    assert found["a_pure"] == pytest.approx((rates[0] + 1 - rates[1]) / 2, abs=1e-6)
    assert report.verdict.level == "unaffected"
    assert report.layers == ()


def test_the_batch_norm_of_pyg_mlp_is_found_and_the_model_left_unchanged(edges):
    model = Decoder()
    model.train()
    model.mlp.norms[0].eval().train()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    report = audit(model, edges)
    assert [(layer.input_rows, layer.mixes_edges) for layer in report.layers] == [("edges", True)]
    assert report.verdict.level != "unaffected"
    assert abs(_statistics(report)["kappa"]) > 0.2
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(parameter.grad is None for parameter in model.parameters())
    assert audit(model, edges) == report


def test_norm_mode_switches_norm_layers_alone_and_restores_every_mode():
    model = Decoder().train()
    model.mlp.norms[0].module.eval()
    modes = [part.training for part in model.modules()]
    is_norm = [name.startswith("mlp.norms.0") for name, _ in model.named_modules()]
    with norm_mode(model, training=True, frozen=set()):
        assert [part.training for part in model.modules()] == is_norm
        with norm_mode(model, training=True, frozen={"mlp.norms.0.module"}):
            assert not model.mlp.norms[0].module.training
        assert model.mlp.norms[0].module.training
        with norm_mode(model, training=False, frozen=set()):
            assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(KeyError), norm_mode(model, training=True, frozen=set()):
        raise KeyError
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_models_with_a_row_wise_norm_or_none_are_unaffected(norm, edges):
    model = Decoder(norm)
    if norm:  # by default, PyG's LayerNorm normalizes over the whole batch
        assert audit(model, edges).layers[0].mixes_rows
        for layer in model.mlp.norms:
            layer.mode = "node"
    report = audit(model, edges)
    assert _statistics(report)["kappa"] == pytest.approx(0, abs=1e-4)
    assert not any(layer.mixes_rows for layer in report.layers)


@pytest.mark.parametrize("how", ["named", "replaced"])
def test_a_frozen_batch_norm_has_no_effect(how, edges):
    model = Decoder().train()
    for _ in range(20):
        model(torch.cat([edges.positives, edges.negatives], 1))
    layer, named = model.mlp.norms[0].module, ()
    if how == "named":
        named = ("mlp.norms.0.module",)
    else:
        model.mlp.norms[0].module = FrozenBatchNorm(layer)
    report = audit(model, edges, frozen=named)
    assert report.layers[0].frozen
    assert _statistics(report)["kappa"] == pytest.approx(0, abs=1e-4)
    assert _statistics(report)["eval_gap"] == pytest.approx(0, abs=1e-5)


def test_intervals_of_a_set_no_larger_than_a_batch_cover_the_choice_of_its_edges():
    """Each edge is classified correctly with probability 0.8 or 0.6, whatever its batch: binomial intervals."""
    generator = torch.Generator().manual_seed(0)
    rates = {"positives": 0.8, "negatives": 0.6}
    correct = torch.rand(2, 300, generator=generator) < torch.tensor([[0.8], [0.6]])
    pairs = torch.arange(600).reshape(2, 300)
    edges = EdgeSet(torch.stack([pairs[0]] * 2), torch.stack([pairs[1]] * 2))

    def score(pairs):
        is_positive = pairs[0] < 300
        is_correct = correct.flatten()[pairs[0]]
        return torch.where(is_positive == is_correct, 1.0, -1.0) + 1e-3 * torch.sin(pairs[0].float())

    whole = audit(score, edges, batch_size=512).parts["heldout"]
    for name, value in whole.statistics.items():
        if name not in ("kappa", "rank_change", "eval_gap"):  # 0 for every choice of edges
            assert value.low < value.mean < value.high, name
    error = 0.5 * sum(rate * (1 - rate) / 300 for rate in rates.values()) ** 0.5
    a_pure = whole.statistics["a_pure"]
    assert a_pure.high - a_pure.low == pytest.approx(2 * 1.96 * error, rel=0.3)
    assert a_pure.low < 0.7 < a_pure.high
    for point in whole.curve:
        assert point.predicted.low < point.predicted.mean < point.predicted.high
    # tau is TPR - FPR, the same as 2 a_pure - 1.
    tau = whole.statistics["tau"]
    assert tau.high - tau.low == pytest.approx(4 * 1.96 * error, rel=0.3)


def test_kappa_of_a_set_no_larger_than_a_batch_has_an_interval(edges):
    kappa = audit(Decoder(), edges, batch_size=512).parts["heldout"].statistics["kappa"]
    assert kappa.high - kappa.low > 0.02


def test_a_model_wrapped_by_ddp_gives_the_same_audit(tmp_path, edges):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = audit(Decoder(), edges)
        wrapped = audit(DistributedDataParallel(Decoder()), edges)
    finally:
        distributed.destroy_process_group()
    assert _statistics(wrapped) == _statistics(plain)
    assert [layer.name for layer in wrapped.layers] == ["module." + layer.name for layer in plain.layers]


def test_trained_models_with_and_without_batch_norm_get_different_verdicts(graph, parts):
    levels = {}
    for norm in ("batch", "layer", "none"):
        model = EncoderDecoderSettings(encoder_norm=norm, decoder_norm=norm, hidden=32).build(graph.x.size(1))
        fit(model, graph, parts, TrainConfig(epochs=10, batch_size=256))
        report = audit_trained(model, graph, parts, batch_size=256)
        levels[norm] = report.verdict.level
        for part in ("heldout", "train"):
            if norm != "batch":
                assert _statistics(report, part)["kappa"] == pytest.approx(0, abs=1e-3)
    assert levels["batch"] in ("affected", "dominated")
    assert levels["layer"] == levels["none"] == "unaffected"


def test_frozen_statistics_are_means_over_all_batches(graph, parts):
    model = EncoderDecoderSettings(decoder="concat", encoder_norm="none", hidden=16).build(graph.x.size(1))
    scorer = PairScorer(model, graph.x, parts.message_edges())
    seen = []
    model.decoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    changes = freeze_statistics(
        model, scorer, parts.train, graph.num_nodes, known=parts.known, composition=Fixed(0.5), batch_size=100
    )
    assert [(change.name, change.after) for change in changes] == [("decoder.norm.module", "FrozenBatchNorm")]
    layer = model.decoder.norm.module
    means = torch.stack([rows.mean(0) for rows in seen]).mean(0)
    variances = torch.stack([rows.var(0) for rows in seen]).mean(0)
    assert torch.allclose(layer.running_mean, means, atol=1e-5)
    assert torch.allclose(layer.running_var, variances, atol=1e-5)
    model.train()
    report = audit_trained(model, graph, parts)
    assert abs(_statistics(report)["kappa"]) < 1e-3


@pytest.mark.parametrize(("norm", "kind"), [("layer", LayerNorm), ("none", NoNorm)])
def test_replacing_batch_norm(norm, kind, edges):
    model = Decoder()
    changes = replace_batch_norm(model, norm)
    assert [(change.name, change.before) for change in changes] == [("mlp.norms.0", "BatchNorm")]
    assert type(model.mlp.norms[0]) is kind
    assert audit(model, edges).verdict.level == "unaffected"
    assert replace_batch_norm(model, norm) == ()
    assert kind.__name__ in repr(model.mlp.norms)


def test_corrected_training_reports_its_changes(graph, parts):
    model = EncoderDecoderSettings(hidden=16).build(graph.x.size(1))
    result, changes = train_corrected(model, graph, parts, TrainConfig(epochs=2, batch_size=64))
    assert [change.after for change in changes] == ["random:0.05,0.95", "True"]
    assert len(set(result.epochs[0].fractions)) > 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda e: audit(3, e), TypeError, "score must be a function or module that scores pairs, got int"),
        (lambda e: audit(lambda p: p[0], e, num_probes=1), ValueError, "num_probes must be at least 4, got 1"),
        (lambda e: audit(lambda p: p, e), ValueError, "one score per pair, got 32 scores for 16 pairs"),
        (lambda e: audit(lambda p: p[0] / 0.0 * 0, e), ValueError, "finite scores, got 16 NaN or infinite"),
        (lambda e: audit(lambda p: [1], e), ValueError, "one score per pair, got 1 scores for 16 pairs"),
        (lambda e: audit(lambda p: "no", e), TypeError, "score must return a tensor of scores .*, got 'no'"),
        (lambda e: audit(lambda p: (p[0], p[1]), e), TypeError, "score must return a tensor of scores .*, got .*tuple"),
        (lambda e: audit(lambda p: p[0], (e.positives, e.negatives)), TypeError, "edges must be an EdgeSet or a map"),
        (lambda e: audit(lambda p: p[0], {}), ValueError, "edges must contain at least one EdgeSet"),
        (
            lambda e: audit(Decoder(), e, frozen=("x",)),
            ValueError,
            r"frozen must contain names of BatchNorm .*, got \['x'\]",
        ),
        (lambda e: EdgeSet(e.positives[:, :3], e.negatives), ValueError, r"positives must have shape .*, got \(2, 3\)"),
        (lambda e: replace_batch_norm(Decoder(), "group"), ValueError, "norm must be one of layer, none, got 'group'"),
        (
            lambda e: replace_batch_norm(Decoder(), names=["x"]),
            ValueError,
            r"names must be BatchNorm .*, got \['x'\]",
        ),
        (
            lambda e: freeze_statistics(nn.ReLU(), len, e.positives, 9),
            ValueError,
            "module must contain BatchNorm layers",
        ),
    ],
)
def test_errors_name_the_argument(make, error, message, edges):
    with pytest.raises(error, match=message):
        make(edges)
