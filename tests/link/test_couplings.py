"""The modules that couple the edges of a batch are named, whatever their class is, and no others."""

import numpy
import pytest
import torch
import torch_geometric.nn as pyg
from torch import nn
from torch.nn import functional
from torch_geometric.data import Batch, Data

from suffice.link.auditing.audit import audit
from suffice.link.auditing.couplings import Coupling
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.norm_layers import FrozenBatchNorm

CHANNELS = 8
NODES = 60
GENERATOR = numpy.random.default_rng(0)


def _pairs():
    return torch.randint(NODES, (2, 120), generator=torch.Generator().manual_seed(0))


EDGES = EdgeSet(_pairs()[:, :60], _pairs()[:, 60:])


class Decoder(nn.Module):
    """Something between two linear layers, over the products of fixed node embeddings."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("z", torch.randn(NODES, CHANNELS))
        self.first, self.middle, self.last = nn.Linear(CHANNELS, CHANNELS), middle, nn.Linear(CHANNELS, 1)

    def forward(self, pairs):
        return self.last(self.middle(self.first(self.z[pairs[0]] * self.z[pairs[1]])).relu()).squeeze(-1)


class Apply(nn.Module):
    """A function of a submodule and of the input."""

    def __init__(self, call, part=None):
        super().__init__()
        self.call, self.part = call, part

    def forward(self, x):
        return self.call(self.part, x)


def _audit(score, **options):
    return audit(score, EDGES, batch_size=40, repeats=2, **options)


def _couplings(score, **options):
    return [(each.name, each.kind, each.is_norm_layer) for each in _audit(score, **options).couplings]


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(CHANNELS),
    "BatchNorm1d without statistics": lambda: nn.BatchNorm1d(CHANNELS, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(CHANNELS),  # BatchNorm1d without a process group
    "BatchNorm": lambda: pyg.BatchNorm(CHANNELS),
    "GraphNorm": lambda: pyg.GraphNorm(CHANNELS),
    "InstanceNorm": lambda: pyg.InstanceNorm(CHANNELS),
    "DiffGroupNorm": lambda: pyg.DiffGroupNorm(CHANNELS, 2),
    "LayerNorm over the graph": lambda: pyg.LayerNorm(CHANNELS, mode="graph"),
    "PairNorm": lambda: pyg.PairNorm(),
    "MeanSubtractionNorm": lambda: pyg.MeanSubtractionNorm(),
}


@pytest.mark.parametrize("kind", NORMS)
def test_known_norm_layers_over_edges_are_named(kind):
    assert _couplings(Decoder(NORMS[kind]())) == [("middle", kind.split()[0], True)]


def test_synchronized_batch_norm_of_one_process_is_audited_as_batch_norm():
    reports = [_audit(Decoder(norm(CHANNELS))) for norm in (nn.SyncBatchNorm, nn.BatchNorm1d)]
    assert reports[0].parts == reports[1].parts
    assert reports[0].verdict.level == reports[1].verdict.level
    assert [layer.kind for layer in reports[0].layers] == ["SyncBatchNorm"]


def test_synchronized_batch_norm_in_a_group_on_a_cpu_raises_what_torch_raises():
    """In a process group, torch synchronizes on GPUs only; the audit leaves the model as it was."""
    model = Decoder(nn.SyncBatchNorm(CHANNELS)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            _audit(model)
    finally:
        torch.distributed.destroy_process_group()
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm needs a GPU")
def test_batch_norm_that_is_synchronized_is_named():
    model = Decoder(nn.SyncBatchNorm(CHANNELS)).cuda()
    edges = EdgeSet(EDGES.positives.cuda(), EDGES.negatives.cuda())
    report = audit(model, edges, batch_size=40, repeats=2)
    assert report.couplings == (Coupling("middle", "SyncBatchNorm", is_norm_layer=True),)


def _attend(attention, x):
    return attention(x, x, x, need_weights=False)[0]


def _attend_to_earlier(attention, x):
    mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


OTHERS = {
    "softmax": (lambda: nn.Softmax(dim=0), ("middle", "Softmax")),
    "mean by hand": (lambda: Apply(lambda _, x: x - x.mean(0)), ("middle", "Apply")),
    "largest by hand": (lambda: Apply(lambda _, x: x / x.abs().amax(0)), ("middle", "Apply")),
    "functional batch norm": (
        lambda: Apply(lambda _, x: functional.batch_norm(x, None, None, training=True)),
        ("middle", "Apply"),
    ),
    "mean of earlier rows": (
        lambda: Apply(lambda _, x: x - x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]),
        ("middle", "Apply"),
    ),
    "causal attention": (
        lambda: Apply(lambda part, x: x + _attend_to_earlier(part, x), nn.MultiheadAttention(CHANNELS, 1)),
        ("middle.part", "MultiheadAttention"),
    ),
    "recurrence over edges": (
        lambda: Apply(lambda part, x: part(x)[0], nn.GRU(CHANNELS, CHANNELS)),
        ("middle.part", "GRU"),
    ),
    "mean between submodules": (
        lambda: Apply(lambda part, x: part(part(x) - x.mean(0)), nn.Linear(CHANNELS, CHANNELS)),
        ("middle", "Apply"),
    ),
    "attention": (
        lambda: Apply(_attend, nn.MultiheadAttention(CHANNELS, 2)),
        ("middle.part", "MultiheadAttention"),
    ),
    "attention with a dimension for batches": (
        lambda: Apply(lambda part, x: _attend(part, x[None])[0], nn.MultiheadAttention(CHANNELS, 2, batch_first=True)),
        ("middle.part", "MultiheadAttention"),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(CHANNELS, 2, 16, dropout=0.5),
        ("middle.self_attn", "MultiheadAttention"),
    ),
    "recurrence in both directions": (
        lambda: Apply(lambda part, x: part(x)[0], nn.GRU(CHANNELS, CHANNELS // 2, bidirectional=True)),
        ("middle.part", "GRU"),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_modules_are_named(kind):
    make, expected = OTHERS[kind]
    report = _audit(Decoder(make()))
    assert report.couplings == (Coupling(*expected, is_norm_layer=False),)
    assert not report.layers or kind == "transformer"
    assert f"depends on the other edges of its batch: {expected[0]} ({expected[1]})." in report.verdict.why


UNCOUPLED = {
    "nothing": lambda: nn.Identity(),
    "LayerNorm": lambda: nn.LayerNorm(CHANNELS),
    "GroupNorm": lambda: nn.GroupNorm(2, CHANNELS),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout that ignores the mode": lambda: Apply(lambda _, x: functional.dropout(x, 0.5)),
    "noise": lambda: Apply(lambda _, x: x + torch.randn_like(x)),
    "noise of NumPy": lambda: Apply(lambda _, x: x + torch.tensor(GENERATOR.standard_normal(x.shape)).to(x)),
    "frozen BatchNorm": lambda: FrozenBatchNorm(nn.BatchNorm1d(CHANNELS)),
    "softmax over channels": lambda: nn.Softmax(dim=1),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(CHANNELS, CHANNELS)),
    "half precision": lambda: Apply(
        lambda part, x: part(x.bfloat16()).float(), nn.Linear(CHANNELS, CHANNELS).bfloat16()
    ),
}


@pytest.mark.parametrize("kind", UNCOUPLED)
def test_modules_that_treat_each_edge_alone_are_not_named(kind):
    report = _audit(Decoder(UNCOUPLED[kind]()))
    assert report.couplings == ()
    assert "depends on the other edges" not in report.verdict.why


class EncoderDecoder(nn.Module):
    """A GCN over all nodes with a norm, and a decoder with another."""

    def __init__(self, encoder_norm, decoder_norm):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("x", torch.randn(NODES, CHANNELS))
        self.register_buffer("edge_index", torch.randint(NODES, (2, 200)))
        self.convolution = pyg.GCNConv(CHANNELS, CHANNELS)
        self.encoder_norm = encoder_norm
        self.decoder = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), decoder_norm, nn.ReLU(), nn.Linear(CHANNELS, 1))

    def forward(self, pairs):
        z = self.encoder_norm(self.convolution(self.x, self.edge_index))
        return self.decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)


@pytest.mark.parametrize("norm", ["BatchNorm1d", "GraphNorm", "PairNorm"])
def test_norm_layers_over_nodes_are_told_from_those_over_edges(norm):
    assert _couplings(EncoderDecoder(NORMS[norm](), nn.LayerNorm(CHANNELS))) == []
    assert _couplings(EncoderDecoder(NORMS[norm](), NORMS[norm]())) == [("decoder.1", norm, True)]


def test_a_graph_with_as_many_nodes_as_edges_in_a_batch_is_no_batch():
    pairs = torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    model = EncoderDecoder(nn.BatchNorm1d(CHANNELS), nn.Identity())
    model.x = torch.randn(64, CHANNELS)  # 16 probes and 48 others
    assert audit(model, EdgeSet(pairs[:, :100], pairs[:, 100:]), batch_size=64, repeats=2).couplings == ()


def test_only_the_first_of_two_in_a_row_is_named_and_both_of_two_side_by_side():
    in_a_row = nn.Sequential(nn.Softmax(dim=0), nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS))
    assert _couplings(Decoder(in_a_row)) == [("middle.0", "Softmax", False)]

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Softmax(dim=0), nn.BatchNorm1d(CHANNELS)

        def forward(self, x):
            return self.left(x) + self.right(x)

    assert _couplings(Decoder(Branches())) == [
        ("middle.left", "Softmax", False),
        ("middle.right", "BatchNorm1d", True),
    ]


def test_a_layer_over_the_source_and_target_nodes_of_a_batch_is_named():
    class Endpoints(Decoder):
        def forward(self, pairs):
            source, target = self.middle(self.z[torch.cat([pairs[0], pairs[1]])]).chunk(2)
            return (source * target).sum(1)

    assert _couplings(Endpoints(nn.Softmax(dim=0))) == [("middle", "Softmax", False)]
    assert _couplings(Endpoints(nn.Linear(CHANNELS, CHANNELS))) == []


class Subgraphs(nn.Module):
    """Score each pair by a subgraph of its own, of a size that depends on the pair, as SEAL does."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("z", torch.randn(NODES, CHANNELS))
        self.convolution, self.norm, self.last = pyg.SAGEConv(CHANNELS, CHANNELS), norm, nn.Linear(CHANNELS, 1)

    def forward(self, batch):
        hidden = self.norm(self.convolution(batch.x, batch.edge_index))
        return self.last(pyg.global_mean_pool(hidden, batch.batch)).squeeze(-1)

    def score(self, pairs):
        graphs = []
        for source, target in pairs.T.tolist():
            nodes = torch.tensor([source, target, *range(source % 5)])
            ring = torch.arange(len(nodes))
            graphs.append(Data(x=self.z[nodes], edge_index=torch.stack([ring, ring.roll(1)])))
        return self(Batch.from_data_list(graphs))


def test_norm_layers_over_the_nodes_of_subgraphs_are_named():
    assert _couplings(Subgraphs(nn.BatchNorm1d(CHANNELS)).score) == [("norm", "BatchNorm1d", True)]
    assert _couplings(Subgraphs(nn.Softmax(dim=0)).score) == [("norm", "Softmax", False)]
    for norm in (nn.LayerNorm(CHANNELS), nn.Identity()):
        assert _couplings(Subgraphs(norm).score) == []


class InBatchContrast(nn.Module):
    """Score a pair by the softmax over all targets of the batch, as contrastive losses do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("z", torch.randn(NODES, CHANNELS))
        self.project = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, pairs):
        logits = self.project(self.z[pairs[0]]) @ self.project(self.z[pairs[1]]).T
        return logits.log_softmax(1).diagonal()


def test_scores_relative_to_the_batch_are_named_by_the_module_that_computes_them():
    model = InBatchContrast()
    assert _couplings(model, module=[model]) == [("", "InBatchContrast", False)]
    assert "of its batch: InBatchContrast." in _audit(model, module=[model]).verdict.why
    wrapped = nn.Sequential(model)
    assert _couplings(wrapped) == [("0", "InBatchContrast", False)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_named_as_a_whole():
    assert _couplings(torch.jit.script(Decoder(nn.Softmax(dim=0)))) == [("", "Decoder", False)]
    assert _couplings(torch.jit.script(Decoder(nn.Identity()))) == []


@pytest.mark.parametrize("with_module", [True, False])
def test_what_the_function_itself_couples_is_told_from_modules(with_module):
    model = Decoder(nn.LayerNorm(CHANNELS))

    def score(pairs):
        logits = model(pairs)
        return logits - logits.mean()

    report = _audit(score) if with_module else _audit(score, module=())
    assert report.couplings == (Coupling("score", "function", is_norm_layer=False),)
    assert "what couples them is in the function score" in report.verdict.why


def test_a_norm_that_the_function_applies_before_the_module_is_not_blamed_on_the_module():
    model = Decoder(nn.Identity())

    def score(pairs):
        products = model.z[pairs[0]] * model.z[pairs[1]]
        return model.last(model.first(products - products.mean(0))).squeeze(-1)

    assert _couplings(score, module=model) == [("score", "function", False)]


@pytest.mark.parametrize("training", [True, False])
def test_modes_statistics_and_hooks_are_as_before(training):
    model = Decoder(nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Dropout(0.5))).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _audit(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {part.training for part in model.modules()} == {training}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_scoring_function_with_a_memory_is_scored_in_the_same_state():
    """Each pass would see what the pass before has left."""
    model, seen = Decoder(nn.Identity()), [0.0]

    def score(pairs):
        seen[0] += 1.0
        return model(pairs) + seen[0]

    assert _couplings(score) == []
    assert seen == [0.0]


def test_a_change_of_the_graph_with_the_batch_is_not_blamed_on_the_decoder():
    """The pairs of the batch are removed from the graph, so that the embeddings of all nodes change."""

    class Masked(EncoderDecoder):
        def forward(self, pairs):
            kept = ~torch.isin(self.edge_index[0], pairs[0])
            z = self.convolution(self.x, self.edge_index[:, kept])
            return self.decode(z, pairs)

        def decode(self, z, pairs):
            return self.decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)

    model = nn.Sequential(Masked(nn.Identity(), nn.Identity()))
    assert _couplings(model) == [("0", "Masked", False)]


def test_the_report_is_json():
    report = _audit(Decoder(nn.Softmax(dim=0)))
    assert report.to_dict()["couplings"] == ({"name": "middle", "kind": "Softmax", "is_norm_layer": False},)
