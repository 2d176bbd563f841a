"""Properties that every registered link predictor must have, and each model against its formula in dense loops."""

import json
import pkgutil
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from suffice.link import models as package
from suffice.link.auditing.trained import audit_trained
from suffice.link.data import checkpoint as files
from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import (
    GCN,
    EncoderDecoderSettings,
    Encoding,
    GraphSAGE,
    LinkPredictor,
    ModelSettings,
    PairScorer,
    build_model,
    get_model_settings,
    make_norm,
    models,
    norms,
    preset,
    register_model,
)
from suffice.link.models.dropout import ByteDropout
from suffice.link.models.registry import MODELS
from suffice.link.sparse import adjacency as adjacency_module
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.count_cache import symmetrize
from suffice.link.sparse.distance_counts import count_by_distance
from suffice.link.sparse.sketches import sketch
from suffice.link.study.run_kinds import CORRECT
from suffice.link.study.run_settings import RunSettings
from suffice.link.train.alignment import representations
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate, score_validation_edges
from suffice.link.train.inputs import message_edges
from suffice.link.train.trainer import fit


def small(name, norm="batch"):
    """Settings of a small model, on the encoder `pure` if it has one, with one norm everywhere."""
    options = {"hidden": 16, "encoder": "pure", "layers": 1}
    settings = get_model_settings(name)
    given = {option: value for option, value in options.items() if option in settings.option_names()}
    return settings(**given).with_norms(norm, norm)


KINDS = [pytest.param(small(name, norm), id=f"{name}-{norm}") for name in models() for norm in norms()]
INDEPENDENT = [kind for kind in KINDS if not kind.id.endswith("graph")]  # GraphNorm mixes the pairs of a batch


@pytest.fixture(params=KINDS)
def model(request, graph):
    return warmed(request.param, graph)


def warmed(settings, graph):
    """A model in eval mode whose norms have running statistics."""
    model = settings.build(graph.x.size(1), seed=3).train()
    messages = Adjacency(graph.edges, graph.num_nodes)
    with torch.no_grad():
        for step in range(3):
            pairs = torch.randint(graph.num_nodes, (2, 64), generator=torch.Generator().manual_seed(step))
            model(graph.x, messages, pairs[:, pairs[0] != pairs[1]])
    return model.eval()


def scores(model, x, messages, pairs):
    with torch.no_grad():
        return model(x, messages, pairs)


def test_a_score_does_not_depend_on_the_order_of_the_two_nodes(model, graph, parts):
    one, two = (scores(model, graph.x, parts.message_edges(), pairs) for pairs in (parts.test, parts.test.flip(0)))
    assert torch.allclose(one, two, atol=1e-4)
    assert one.std() > 1e-4


def test_a_score_does_not_depend_on_the_numbering_of_the_nodes(model, graph, parts):
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(0))
    places = order.argsort()
    one = scores(model, graph.x, Adjacency(parts.message_edges(), graph.num_nodes), parts.test)
    renamed = Adjacency(places[parts.message_edges()], graph.num_nodes, hash_keys=order)
    assert torch.allclose(one, scores(model, graph.x[order], renamed, places[parts.test]), atol=1e-4)


@pytest.mark.parametrize("settings", INDEPENDENT)
def test_in_eval_mode_a_score_does_not_depend_on_the_batch(settings, graph, parts):
    model = warmed(settings, graph)
    # Some pairs are edges of the graph.
    pairs = torch.cat([parts.test, parts.train[:, :9], parts.test_negatives], dim=1)
    together = scores(model, graph.x, parts.message_edges(), pairs)
    apart = torch.cat([scores(model, graph.x, parts.message_edges(), part) for part in pairs.split(7, dim=1)])
    assert torch.allclose(together, apart, atol=1e-4)


@pytest.mark.parametrize("settings", INDEPENDENT)
def test_the_edge_of_a_pair_does_not_change_its_score(settings, graph, parts):
    model = warmed(settings, graph)
    for planted in parts.test[:, :4].split(1, dim=1):
        without = Adjacency(parts.message_edges(), graph.num_nodes)
        having = Adjacency(torch.cat([parts.message_edges(), planted], dim=1), graph.num_nodes)
        expected = scores(model, graph.x, without, planted)
        assert torch.allclose(scores(model, graph.x, having.without(planted), planted), expected, atol=1e-4)
        if settings.name == "buddy":  # computes constants of the whole graph and removes the edge itself
            assert torch.allclose(scores(model, graph.x, having, planted), expected, atol=1e-4)
            assert torch.allclose(
                scores(model.train(), graph.x, having, planted.repeat(1, 4)),
                scores(model, graph.x, without, planted.repeat(1, 4)),
                atol=1e-4,
            )
            model.eval()


@pytest.mark.parametrize("settings", KINDS)
def test_gradients_reach_every_parameter(settings, graph, parts):
    model = settings.build(graph.x.size(1)).train()
    pairs = torch.cat([parts.train[:, :40], parts.test_negatives[:, :40]], dim=1)
    messages = Adjacency(parts.message_edges(), graph.num_nodes).without(pairs)
    labels = torch.arange(80) < 40
    for part in model.training_logits(graph.x, messages, pairs):
        F.binary_cross_entropy_with_logits(part, labels.float()).backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not (name.endswith("bias") and "batch" in settings.norms.values()):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", models())
def test_a_model_trains_resumes_and_can_be_audited(name, graph, parts, tmp_path):
    settings = get_model_settings(name)(hidden=16, dropout=0.2)
    train = TrainConfig(epochs=4, batch_size=128, metric="auc", seed=1, learning_rate=3e-3)
    whole = settings.build(graph.x.size(1))
    found = fit(whole, graph, parts, train)
    assert found.epochs[-1].loss < found.epochs[0].loss
    assert found.metric > 0.6
    path = tmp_path / "model.safetensors"

    def stop(epoch):
        if epoch.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(settings.build(graph.x.size(1)), graph, parts, train, checkpoint=path, on_epoch=stop)
    halves = settings.build(graph.x.size(1), seed=9)
    fit(halves, graph, parts, train, checkpoint=path)
    for one, two in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    again = settings.build(graph.x.size(1), seed=5)
    again.load_state_dict(files.select_prefix(files.load_checkpoint(path)[0], "model"))
    expected = score_validation_edges(whole, graph.x, parts.message_edges(), parts)
    for one, two in zip(expected, score_validation_edges(again, graph.x, parts.message_edges(), parts), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    report = audit_trained(whole, graph, parts, batch_size=64)
    assert any(layer.input_rows == "edges" for layer in report.layers)
    assert evaluate(whole, graph, parts, SplitConfig())["auc"] > 0.6
    maps = representations(whole, graph, parts)
    assert maps["node"][0].shape == (graph.num_nodes, 16)
    assert maps["edge"][0].isfinite().all()
    scorer = PairScorer(whole, graph.x, parts.message_edges())
    assert torch.allclose(scorer(parts.validation), expected[0], atol=1e-5)


def dense(graph, parts):
    adjacency = torch.zeros(graph.num_nodes, graph.num_nodes)
    adjacency[parts.message_edges()[0], parts.message_edges()[1]] = 1
    return adjacency


def test_ncn_and_ncnc_against_dense_loops(graph, parts):
    adjacency, pairs = dense(graph, parts), parts.test[:, :12]
    for name in ("ncn", "ncnc"):
        model = warmed(small(name, "layer"), graph)
        with torch.no_grad():
            h = model.encoder(graph.x, parts.message_edges())
            pooled = h + model.node_mlp(h)

            def plain(i, j, sums, h=h, model=model):
                joined = model.beta * model.common_mlp(sums[None]) + model.product_mlp((h[i] * h[j])[None])
                return model.last(model.join_mlp(joined)).squeeze()

            def sums(i, j, pooled=pooled):
                return ((adjacency[i] * adjacency[j])[:, None] * pooled).sum(0)

            expected = []
            for i, j in pairs.T.tolist():
                total = sums(i, j)
                for one, other in ((i, j), (j, i)) if name == "ncnc" else ():
                    for k in (adjacency[one] > adjacency[other]).nonzero().flatten().tolist():
                        if k != other:
                            q = torch.sigmoid(5 * (plain(other, k, sums(other, k)) - 3))
                            total = total + 0.5 * q / (0.5 * q + 1 - q) * pooled[k]
                expected.append(plain(i, j, total))
        assert torch.allclose(scores(model, graph.x, parts.message_edges(), pairs), torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize("limit", [2**26, 0])
def test_neognn_against_dense_matrices(limit, graph, parts, monkeypatch):
    monkeypatch.setattr("suffice.link.sparse.overlap.MAX_DENSE_ENTRIES", limit)
    model = warmed(small("neognn", "none"), graph)
    adjacency = dense(graph, parts)
    with torch.no_grad():
        s = (adjacency[..., None] * model.edge_mlp(torch.ones(1, 1))).sum(1)
        f = model.node_mlp(s).squeeze(-1)
        reach = adjacency + 0.1 * adjacency @ adjacency
        z = ((reach * f) @ (reach * f).T)[parts.test[0], parts.test[1]]
        structure = torch.sigmoid(model.overlap_last(model.overlap_mlp(z[:, None]))).squeeze(-1)
        gnn = torch.sigmoid(model.decoder(model.encoder(graph.x, parts.message_edges()), parts.test))
        share = torch.softmax(model.mixture, 0)
    found = scores(model, graph.x, parts.message_edges(), parts.test)
    assert torch.allclose(torch.sigmoid(found), share[0] * structure + share[1] * gnn, atol=1e-5)


def test_elph_and_buddy_against_their_parts(graph, parts):
    adjacency = dense(graph, parts) + torch.eye(graph.num_nodes)
    scale = adjacency.sum(1).rsqrt()
    smooth = (scale[:, None] * adjacency * scale) @ graph.x
    base = Adjacency(parts.message_edges(), graph.num_nodes)
    counts = symmetrize(count_by_distance(base, sketch(base), parts.test), 2)
    for name in ("elph", "buddy"):
        model = warmed(small(name), graph)
        with torch.no_grad():
            h = model.encoder(graph.x, parts.message_edges()) if name == "elph" else model.encoder(smooth)
            product = h[parts.test[0]] * h[parts.test[1]]
            both = torch.cat([model.head.count_mlp(counts), model.head.product_mlp(product)], dim=1)
            expected = model.last(both).squeeze(-1)
        assert torch.allclose(scores(model, graph.x, parts.message_edges(), parts.test), expected, atol=1e-4)


@pytest.mark.parametrize("name", models())
def test_isolated_nodes_and_empty_inputs(name, graph):
    """Isolated nodes, pairs without common neighbors, no pairs, and no edges."""
    model = warmed(small(name), graph)
    x = torch.cat([graph.x, torch.zeros(2, graph.x.size(1))])
    isolated = torch.tensor([[graph.num_nodes, 0], [graph.num_nodes + 1, graph.num_nodes]])
    for edges in (graph.edges, graph.edges[:, :0]):
        messages = torch.cat([edges, edges.flip(0)], dim=1)
        assert scores(model, x, messages, isolated).isfinite().all()
        assert scores(model, x, messages, isolated[:, :0]).shape == (0,)


def test_models_score_alike_without_dense_matrices(graph, parts, monkeypatch):
    for name in ("ncn", "ncnc", "neognn"):
        model = warmed(small(name), graph)
        expected = scores(model, graph.x, parts.message_edges(), parts.test)
        with monkeypatch.context() as patch:
            patch.setattr(adjacency_module, "MAX_DENSE_ENTRIES", 0)
            patch.setattr("suffice.link.sparse.overlap.MAX_DENSE_ENTRIES", 0)
            assert torch.allclose(scores(model, graph.x, parts.message_edges(), parts.test), expected, atol=1e-4)


def test_byte_dropout_has_the_expected_share_and_mean():
    torch.manual_seed(0)
    layer, x = ByteDropout(0.3), torch.ones(1000, 333, requires_grad=True)
    out = layer(x)
    kept = 256 / round(256 * 0.7)
    assert out.detach().unique().tolist() == pytest.approx([0.0, kept])
    assert abs(float(out.detach().mean()) - 1) < 5e-3
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert not torch.equal(layer(x), out)
    assert layer.eval()(x) is x
    rows = (out > 0).float().mean(dim=0)
    assert float((rows - 0.7).abs().max()) < 0.07  # all columns are kept equally often


@pytest.mark.parametrize("encoder", ["gcn", "sage"])
def test_a_linear_encoder_is_affine(encoder):
    settings = EncoderDecoderSettings(encoder=encoder, encoder_norm="none", hidden=8, linear=True)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    one, two = torch.randn(2, 5, 6, dtype=torch.float64)

    def apart(encode):
        return encode(one + two, edges) - encode(one, edges) - encode(two, edges) + encode(torch.zeros_like(one), edges)

    assert float(apart(settings.build(6).double().eval().encoder).detach().abs().max()) < 1e-12
    other = replace(settings, linear=False)
    assert float(apart(other.build(6).double().eval().encoder).detach().abs().max()) > 1e-3


def test_presets_are_those_of_the_authors_and_build():
    for model in ("neognn", "ncn", "ncnc", "elph", "buddy"):
        for data in ("Cora", "CiteSeer", "PubMed", "Photo"):
            settings, training = preset(model, data)
            assert isinstance(settings.build(20), nn.Module)
            TrainConfig(**asdict(training))
    assert preset("ncn", "CiteSeer")[0].two_layers
    assert preset("buddy", "PubMed")[0].hops == 3
    assert preset("elph", "Cora")[0].linear
    ncn = preset("ncn", "Cora")[0].build(20)
    assert not any(isinstance(part, nn.LayerNorm) for part in ncn.encoder.modules())
    assert any(isinstance(part, nn.LayerNorm) for part in ncn.node_mlp.modules())
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'gcn'"):
        preset("gcn", "Cora")
    with pytest.raises(ValueError, match=r"model must have published settings \(buddy, .*\), got 'encoder-decoder'"):
        preset("encoder-decoder", "Cora")


@pytest.mark.parametrize("name", models())
def test_settings_survive_storage(name):
    """`to_dict` gives JSON that `from_dict` turns into equal settings, also with options left out."""
    settings = replace(get_model_settings(name)(hidden=24, dropout=0.1), decoder_norm="layer")
    stored = json.loads(json.dumps(settings.to_dict()))
    assert list(stored) == ["name", *settings.option_names()]
    assert ModelSettings.from_dict(stored) == settings
    assert ModelSettings.from_dict({"name": name}) == get_model_settings(name)()


@pytest.mark.parametrize("name", models())
def test_a_model_is_built_alike_by_name_and_by_settings(name):
    expected = get_model_settings(name)(hidden=8).build(5, seed=3)
    built = build_model(name, in_channels=5, seed=3, hidden=8)
    other = build_model(name, in_channels=5, seed=4, hidden=8)
    assert type(built) is type(expected)
    for key, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[key], value)
    assert any(not torch.equal(other.state_dict()[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_model("mcn", 4), "model must be one of buddy, .*, got 'mcn'. Did you mean 'ncn'?"),
        (
            lambda: ModelSettings.from_dict({"hidden": 4}),
            r"settings of a model must contain its name, got only \['hidden",
        ),
        (
            lambda: build_model("ncn", 4, hiden=8),
            "options of model 'ncn' must be one of hidden, .*, got 'hiden'. Did you mean 'hidden'?",
        ),
        (lambda: build_model("buddy", 4, encoder="gcn"), "options of model 'buddy' must be one of .*, got 'encoder'"),
        (
            lambda: build_model("ncn", 4, encoder="gnc"),
            "encoder must be one of gcn, .*, got 'gnc'. Did you mean 'gcn'",
        ),
        (lambda: build_model("encoder-decoder", 4, decoder="x"), "decoder must be one of concat, .*, got 'x'"),
        (lambda: build_model("elph", 4, hops=4), "hops must be 1, 2 or 3, got 4"),
        (lambda: build_model("ncn", 4, layers=0), "layers must be at least 1, got 0"),
        (lambda: build_model("ncn", 4, encoder_dropout=1.5), "encoder_dropout must be at least 0 and below 1, got 1.5"),
        (lambda: build_model("ncn", 4, linear=True, encoder="pure"), "linear must be False with encoder 'pure'"),
        (lambda: build_model("ncn", 0), "in_channels must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", [GCN, GraphSAGE])
@pytest.mark.parametrize("channels", [5, 40])
def test_an_encoder_gives_the_same_on_an_edge_index_and_an_adjacency(kind, channels):
    torch.manual_seed(0)
    edges = torch.randint(29, (2, 60))  # of 30 nodes: at least one node has no edge
    edges = Adjacency(edges, 30).edge_index
    x = torch.randn(30, channels)
    encoder = kind(channels, 16)
    found = []
    for messages in (edges, Adjacency(edges, 30)):
        inputs = x.clone().requires_grad_()
        out = encoder(inputs, messages)
        encoder.zero_grad()
        out.square().sum().backward()
        found.append([out.detach(), inputs.grad, *(p.grad.clone() for p in encoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_large_graph_is_given_to_every_encoder_as_an_adjacency(monkeypatch):
    graph = block_model(nodes=60, classes=2, degree=6, features=4)
    parts = split_edges(graph, SplitConfig(), 0)
    model = EncoderDecoderSettings(encoder="sage", hidden=8).build(4)
    config = TrainConfig(epochs=2, metric="auc")
    plain = fit(model, graph, parts, config)
    assert isinstance(message_edges(model, parts, 60), torch.Tensor)
    monkeypatch.setattr("suffice.link.train.inputs._LARGE_GRAPH_EDGES", 10)
    assert isinstance(message_edges(model, parts, 60), Adjacency)
    again = fit(EncoderDecoderSettings(encoder="sage", hidden=8).build(4), graph, parts, config)
    assert again.epochs[-1].loss == pytest.approx(plain.epochs[-1].loss, rel=1e-3)


def test_a_new_model_is_one_class_and_its_settings(graph, parts, monkeypatch):
    """A model registered by a user is built, stored, trained, audited and run as an arm of a study like the others."""
    monkeypatch.setattr(MODELS, "_parts", MODELS.entries())

    class FeatureProduct(LinkPredictor):
        uses_adjacency = False

        def __init__(self, in_channels, hidden, norm):
            super().__init__()
            self.encoder = nn.Linear(in_channels, hidden)
            self.norm = make_norm(norm, hidden)
            self.last = nn.Linear(hidden, 1)

        def encode(self, x, edge_index):
            return Encoding(self.encoder(x), x, edge_index)

        def edge_embedding(self, encoding, pairs):
            return torch.relu(self.norm(encoding.nodes[pairs[0]] * encoding.nodes[pairs[1]]))

    @register_model("feature-product")
    @dataclass(frozen=True, kw_only=True)
    class FeatureProductSettings(ModelSettings):
        scale: float = 1.0

        def create(self, in_channels):
            return FeatureProduct(in_channels, int(self.scale * self.hidden), self.decoder_norm)

    assert models()["feature-product"] is FeatureProductSettings
    settings = ModelSettings.from_dict({"name": "feature-product", "scale": 2.0})
    assert settings == FeatureProductSettings(scale=2.0)
    assert settings.with_norms("layer", "none") == FeatureProductSettings(scale=2.0, decoder_norm="none")
    with pytest.raises(ValueError, match=r"must be one of hidden, dropout, decoder_norm, scale, got 'layers'"):
        build_model("feature-product", 4, layers=2)
    complete = CORRECT.complete({"arm": "random/layer", "model": {"name": "feature-product", "scale": 2}})
    run = RunSettings.from_dict(complete)
    assert run.arm.apply_to_model(run.model) == FeatureProductSettings(scale=2.0, decoder_norm="layer")
    model = build_model("feature-product", in_channels=graph.x.size(1), scale=0.5)
    fit(model, graph, parts, TrainConfig(epochs=2, batch_size=128))
    assert audit_trained(model, graph, parts, batch_size=64).verdict.level


def test_a_name_can_be_registered_once():
    with pytest.raises(ValueError, match="model must have a name that is not registered yet, got 'ncn'"):

        @register_model("ncn")
        class OtherSettings(ModelSettings):
            pass


def test_every_file_of_the_package_is_imported():
    """So that a model that is one new file is registered."""
    for module in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        assert module.name in sys.modules
