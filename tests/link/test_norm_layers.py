"""Normalization layers of every kind are found and replaced, however a module holds and calls them."""

import copy

import pytest
import torch
import torch_geometric.nn as pyg
from torch import nn

from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.corrections import NoNorm, freeze_statistics, replace_batch_norm

CHANNELS = 8
KINDS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(CHANNELS),
    "BatchNorm1d without affine": lambda: nn.BatchNorm1d(CHANNELS, affine=False),
    "BatchNorm1d without statistics": lambda: nn.BatchNorm1d(CHANNELS, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(CHANNELS),
    "pyg.BatchNorm": lambda: pyg.BatchNorm(CHANNELS),
    "GraphNorm": lambda: pyg.GraphNorm(CHANNELS),
    "InstanceNorm": lambda: pyg.InstanceNorm(CHANNELS),
    "DiffGroupNorm": lambda: pyg.DiffGroupNorm(CHANNELS, 2),
    "pyg.LayerNorm": lambda: pyg.LayerNorm(CHANNELS, mode="graph"),
    "PairNorm": lambda: pyg.PairNorm(),
    "MeanSubtractionNorm": lambda: pyg.MeanSubtractionNorm(),
}
WITHOUT_CHANNELS = ("PairNorm", "MeanSubtractionNorm")


class Decoder(nn.Module):
    """A norm between two linear layers, called as the function `call` does."""

    def __init__(self, norm, call=lambda norm, x: norm(x)):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("z", torch.randn(100, CHANNELS))
        self.first, self.norm, self.last = nn.Linear(CHANNELS, CHANNELS), norm, nn.Linear(CHANNELS, 1)
        self.call = call

    def forward(self, pairs):
        hidden = self.first(self.z[pairs[0]] * self.z[pairs[1]])
        return self.last(self.call(self.norm, hidden).relu()).squeeze(-1)


def _pairs(count=200):
    return torch.randint(100, (2, count), generator=torch.Generator().manual_seed(0))


def _depends_on_other_pairs(model):
    """Compare the scores of pairs alone with those in a larger batch, in training mode."""
    pairs = _pairs()
    with torch.no_grad():
        return not torch.allclose(model.train()(pairs)[:50], model(pairs[:, :50]), atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_replaced(kind, norm):
    if kind == "SyncBatchNorm" and not torch.cuda.is_available():
        model = nn.Sequential(KINDS[kind]())  # cannot be called on a CPU
        assert [change.name for change in replace_batch_norm(model, norm)] == ["0"]
        assert isinstance(model[0], nn.LayerNorm if norm == "layer" else nn.Identity)
        return
    model = Decoder(KINDS[kind]())
    assert _depends_on_other_pairs(model)
    if norm == "layer" and kind in WITHOUT_CHANNELS:
        before = repr(model)
        with pytest.raises(ValueError, match=rf"norm must be none for norm, because {kind} does not know"):
            replace_batch_norm(model, norm)
        assert repr(model) == before
        return
    changes = replace_batch_norm(model, norm)
    assert [(change.name, change.before) for change in changes] == [("norm", kind.split()[0].removeprefix("pyg."))]
    assert not _depends_on_other_pairs(model)
    hidden = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.layer_norm(hidden, (CHANNELS,)) if norm == "layer" else hidden
    assert torch.allclose(model.norm(hidden), expected, atol=1e-5)
    assert replace_batch_norm(model, norm) == ()


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("GraphNorm", lambda norm, x: norm(x=x)),
        ("GraphNorm", lambda norm, x: norm(x, torch.zeros(len(x), dtype=torch.long), batch_size=1)),
        ("InstanceNorm", lambda norm, x: norm(batch=None, x=x)),
        ("pyg.BatchNorm", lambda norm, x: norm(x=x)),
        ("BatchNorm1d", lambda norm, x: norm(input=x)),
    ],
)
def test_calls_by_keyword_are_found_and_still_work_after_a_replacement(kind, call, norm):
    model = Decoder(KINDS[kind](), call)
    pairs = _pairs()
    report = audit(model, EdgeSet(pairs[:, :100], pairs[:, 100:]), batch_size=50, repeats=2)
    assert [(layer.name, layer.input_rows, layer.mixes_edges) for layer in report.layers] == [("norm", "edges", True)]
    replace_batch_norm(model, norm)
    assert not _depends_on_other_pairs(model)


class Shared(nn.Module):
    """Two names for one BatchNorm, and a block with a BatchNorm that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.BatchNorm1d(CHANNELS)
        self.block = nn.ModuleDict({"inner": nn.ModuleList([nn.Sequential(nn.BatchNorm1d(CHANNELS))])})
        self.again = self.block
        self.register_buffer("z", torch.randn(100, CHANNELS))

    def forward(self, pairs):
        x = self.z[pairs[0]] * self.z[pairs[1]]
        return self.again["inner"][0](self.second(x)).sum(1)


SHARED_NAMES = ["first", "second", "block.inner.0.0", "again.inner.0.0"]


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_layer_is_replaced_under_all_of_its_names(norm):
    model = Shared()
    changes = replace_batch_norm(model, norm)
    assert [change.name for change in changes] == SHARED_NAMES
    assert model.first is model.second
    assert not any(isinstance(part, nn.BatchNorm1d) for part in model.modules())
    assert not _depends_on_other_pairs(model)


@pytest.mark.parametrize("name", ["first", "second"])
def test_one_name_chooses_the_layer_and_no_other(name):
    model = Shared()
    assert [change.name for change in replace_batch_norm(model, names=[name])] == ["first", "second"]
    assert isinstance(model.block["inner"][0][0], nn.BatchNorm1d)


def test_a_layer_is_frozen_under_all_of_its_names():
    model = Shared().train()
    changes = freeze_statistics(model, model, _pairs(), 100)
    assert [change.name for change in changes] == SHARED_NAMES
    assert not _depends_on_other_pairs(model)


def test_batch_norm_without_statistics_is_frozen_with_means_over_the_batches():
    model = Decoder(KINDS["BatchNorm1d without statistics"]())
    seen = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    freeze_statistics(model, model, _pairs(), 100, batch_size=64)
    assert torch.allclose(model.norm.running_mean, torch.stack([rows.mean(0) for rows in seen]).mean(0), atol=1e-5)
    assert not _depends_on_other_pairs(model)


def test_the_names_of_a_wrapper_and_of_its_content_are_accepted():
    for name in ("norm", "norm.module"):
        model = Decoder(pyg.BatchNorm(CHANNELS))
        assert [change.name for change in replace_batch_norm(model, names=[name])] == ["norm"]


def test_channels_that_are_not_the_last_dimension_are_normalized_by_row():
    model = nn.Sequential(nn.BatchNorm2d(4))
    x = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    replace_batch_norm(model)
    assert torch.allclose(model(x), nn.functional.layer_norm(x, x.shape[1:]), atol=1e-5)


def test_device_dtype_and_mode_are_kept():
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS, affine=False), pyg.GraphNorm(CHANNELS)).double().eval()
    replace_batch_norm(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(part.training for part in model.modules())


def test_lazy_norms_are_refused_until_they_are_initialized():
    model = nn.Sequential(nn.Linear(3, 5), nn.LazyBatchNorm1d())
    for change in (lambda: replace_batch_norm(model), lambda: freeze_statistics(model, model, _pairs(), 100)):
        with pytest.raises(ValueError, match="module must be initialized, but 1 is not: score a batch first"):
            change()
    model(torch.zeros(4, 3))
    replace_batch_norm(model)
    assert model[1].normalized_shape == (5,)


def test_row_wise_norms_stay():
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), pyg.LayerNorm(4, mode="node"), NoNorm())
    before = copy.deepcopy(model)
    assert replace_batch_norm(model) == ()
    assert repr(model) == repr(before)


def test_a_perceptron_of_pyg_works_after_the_replacement():
    """PyG's perceptron passes `batch` to norms that accept it."""
    for norm in ("batch_norm", "graph_norm", "instance_norm", "layer_norm"):
        model = pyg.MLP([CHANNELS, CHANNELS, 1], norm=norm, dropout=0.0)
        x = torch.randn(60, CHANNELS, generator=torch.Generator().manual_seed(0))
        replace_batch_norm(model)
        assert torch.allclose(model(x, batch=torch.zeros(60, dtype=torch.long))[:20], model(x[:20]), atol=1e-5)
