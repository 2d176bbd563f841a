"""A monitor measures what an audit measures, changes nothing, and leaves one row for each epoch."""

import csv
import itertools
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from suffice.link import CompositionMonitor, assert_composition_invariant, audit, encode_once
from suffice.link.auditing.monitor import STATISTICS
from tests.link.pixels import EDGES, GRAPH, PixelDecoder, train_steps
from tests.wrong_arguments import each_wrong_argument, expect_error

QUICK = {"batch_size": 128, "repeats": 2}


class Writer:
    """Has the method of TensorBoard's `SummaryWriter`."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


class Run:
    """Has the method of a run of W&B."""

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((values, step))


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def _train(model, monitor, epochs, first=0):
    """Train epochs of ten steps; those before `first` are trained without the monitor."""
    for epoch in range(epochs):
        for _ in train_steps(model, steps=10, seed=epoch):
            pass
        if epoch >= first:
            monitor(epoch)


def test_values_equal_those_of_an_audit():
    model, expected = PixelDecoder(), {}
    monitor = CompositionMonitor(model, EDGES, every=2, **QUICK)
    for epoch in range(4):
        for _ in train_steps(model, steps=20, seed=epoch):
            pass
        if (row := monitor.step(epoch)) is None:
            continue
        report = audit(model, EDGES, **QUICK)
        statistics = report.parts["heldout"].statistics
        expected[epoch] = {name: statistics[name].mean for name in STATISTICS}
        assert row == {"epoch": epoch, **expected[epoch], "level": report.verdict.level}
        assert monitor.verdict == report.verdict
    assert [row["epoch"] for row in monitor.history] == [0, 2]
    assert monitor.history[-1]["level"] == "dominated"
    assert monitor.history[-1]["kappa"] < -0.8


def _state(model):
    return [value.clone() for value in model.state_dict().values()], [part.training for part in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training):
    model = PixelDecoder().train(training)
    values, modes = _state(model)
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    CompositionMonitor(model, EDGES, **QUICK).step(0)
    assert _state(model)[1] == modes
    assert all(map(torch.equal, _state(model)[0], values))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()  # noqa: NPY002
    assert random.getstate() == generators[2]


def test_training_is_the_same_with_and_without_a_monitor():
    with_monitor, without = PixelDecoder(), PixelDecoder()
    _train(with_monitor, CompositionMonitor(with_monitor, EDGES, every=1, **QUICK), 3)
    _train(without, lambda epoch: None, 3)
    assert all(map(torch.equal, _state(with_monitor)[0], _state(without)[0]))


def test_loggers_get_every_statistic():
    writer, run = Writer(), Run()
    monitor = CompositionMonitor(PixelDecoder(), EDGES, loggers=[writer, run], prefix="bias", **QUICK)
    monitor.step(0)
    monitor.step(5, global_step=300)
    for row, step in zip(monitor.history, (0, 300), strict=True):
        values = {f"bias/{name}": row[name] for name in STATISTICS}
        assert [item for item in writer.scalars if item[2] == step] == [(*item, step) for item in values.items()]
        assert (values, step) in run.logged
    assert len(run.logged) == 2


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        monitor = CompositionMonitor(PixelDecoder(), EDGES, every=1, loggers=[writer], **QUICK)
        for epoch in range(2):
            monitor.step(epoch)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("composition/kappa")
    assert [event.step for event in events] == [0, 1]
    assert [event.value for event in events] == pytest.approx([row["kappa"] for row in monitor.history], rel=1e-6)


def test_file_of_a_killed_training_is_continued(tmp_path):
    whole, resumed = tmp_path / "whole.csv", tmp_path / "new" / "resumed.csv"
    model = PixelDecoder()
    _train(model, CompositionMonitor(model, EDGES, every=1, csv=whole, **QUICK), 4)
    # The training is killed after epoch 2, and resumed from a checkpoint of epoch 0: epochs 1 and 2 come again.
    model = PixelDecoder()
    _train(model, CompositionMonitor(model, EDGES, every=1, csv=resumed, **QUICK), 3)
    model = PixelDecoder()
    monitor = CompositionMonitor(model, EDGES, every=1, csv=resumed, **QUICK)
    assert [row["epoch"] for row in monitor.history] == [0, 1, 2]
    _train(model, monitor, 4, first=1)
    assert [row[0] for row in _rows(resumed)] == ["epoch", "0", "1", "2", "3"]
    assert resumed.read_bytes() == whole.read_bytes()
    assert CompositionMonitor(model, EDGES, csv=whole).history == monitor.history
    assert [path.name for path in resumed.parent.iterdir()] == ["resumed.csv"]


def test_rows_are_written_as_they_come(tmp_path):
    path = tmp_path / "log.csv"
    monitor = CompositionMonitor(PixelDecoder(), EDGES, every=1, csv=path, **QUICK)
    assert not path.exists()
    for epoch in range(2):
        monitor.step(epoch)
        assert len(_rows(path)) == epoch + 2


def test_file_of_something_else_is_kept(tmp_path):
    path = tmp_path / "edges.csv"
    path.write_text("source,target\n0,1\n")
    with pytest.raises(
        ValueError, match=r"csv must be a new file or one of a CompositionMonitor, .*line 1 is 'source,"
    ):
        CompositionMonitor(PixelDecoder(), EDGES, csv=path)
    assert path.read_text() == "source,target\n0,1\n"


@pytest.mark.parametrize("training", [True, False])
def test_encode_once_encodes_once_in_each_mode(training):
    calls = itertools.count()  # an audit would restore a list

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(GRAPH.x.size(1), 16), nn.BatchNorm1d(16))
            self.decoder = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 1))

        def encode(self):
            next(calls)
            return self.encoder(GRAPH.x)

        def decode(self, z, pairs):
            return self.decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)

        def forward(self, pairs):
            return self.decode(self.encode(), pairs)

    model = Model().train(training)
    plain = audit(model, EDGES, **QUICK)
    before = next(calls)
    score = encode_once(model.encode, model.decode)
    assert audit(score, EDGES, module=model, **QUICK) == plain
    assert next(calls) - before - 1 == 2
    monitor = CompositionMonitor(score, EDGES, module=model, every=1, **QUICK)
    monitor.step(0)
    with torch.no_grad():
        model.encoder[0].weight += 1
    assert monitor.step(1)["kappa"] == audit(model, EDGES, **QUICK).parts["heldout"].statistics["kappa"].mean
    assert score(EDGES.positives).requires_grad  # outside of an audit, a training may use it


def test_encode_once_restores_the_mode_that_encode_changes():
    model = PixelDecoder()
    for _ in train_steps(model):
        pass

    def encode():
        model.eval()
        return model.x

    def decode(x, pairs):
        return model(pairs)

    report = audit(encode_once(encode, decode), EDGES, **QUICK)
    assert (report.tested, report.verdict.level) == ("training mode", "dominated")
    assert report.parts == audit(model, EDGES, **QUICK).parts


CALLS = {
    "CompositionMonitor": lambda **own: CompositionMonitor(**{"score": _not_run, "edges": EDGES, **own}),
    "step": CompositionMonitor(lambda pairs: pairs[0], EDGES).step,
    "assert_composition_invariant": lambda **own: assert_composition_invariant(_not_run, EDGES, **own),
    "encode_once": lambda **own: encode_once(**{"encode": _not_run, "decode": _not_run, **own}),
}


def _not_run(*_):
    pytest.fail("a model was run")


@each_wrong_argument(
    [
        ("CompositionMonitor", "score", 3, TypeError, "score must be a function, got 3"),
        ("CompositionMonitor", "edges", 3, TypeError, "edges must be an EdgeSet, such as .*, got 3"),
        ("CompositionMonitor", "every", 0, ValueError, "every must be at least 1 epochs, got 0"),
        ("CompositionMonitor", "every", 1.5, TypeError, "every must be an int, at least 1 epochs, got 1.5"),
        ("CompositionMonitor", "repeats", 1, ValueError, "repeats must be at least 2, got 1"),
        ("CompositionMonitor", "threshold", "x", TypeError, "threshold must be a number, got 'x'"),
        ("CompositionMonitor", "frozen", "norm", TypeError, "frozen must be a list of names of layers, .*got 'norm'"),
        ("CompositionMonitor", "module", 3, TypeError, "module must be a module, a list of modules or None, got 3"),
        ("CompositionMonitor", "module", ["x"], TypeError, "module must be a module, .*, got 'x' as item 0"),
        ("CompositionMonitor", "csv", "log.txt", ValueError, "csv must be a file ending in .csv, got 'log.txt'"),
        ("CompositionMonitor", "csv", 3, TypeError, "csv must be a path .*, got 3"),
        ("CompositionMonitor", "loggers", 3, TypeError, r"loggers must be a list of loggers, such as .*, got 3"),
        ("CompositionMonitor", "loggers", [3], TypeError, r"loggers\[0\] must have a method add_scalar, .*, got int"),
        (
            "CompositionMonitor",
            "csv",
            __file__ + "/log.csv",
            ValueError,
            "csv must be a file in a folder, .* is a file",
        ),
        ("CompositionMonitor", "prefix", 3, TypeError, "prefix must be a string, got 3"),
        ("CompositionMonitor", "prefix", "", ValueError, "prefix must contain text, got ''"),
        ("CompositionMonitor", "seed", -1, ValueError, "seed must be from 0 to .*, got -1"),
        ("step", "epoch", -1, ValueError, "epoch must be at least 0, got -1"),
        ("step", "epoch", "1", TypeError, "epoch must be an int, at least 0, got '1'"),
        ("assert_composition_invariant", "tolerance", -1, ValueError, "tolerance must be at least 0, got -1"),
        ("assert_composition_invariant", "tolerance", "x", TypeError, "tolerance must be a number, .*, got 'x'"),
        ("assert_composition_invariant", "repeats", 1, ValueError, "repeats must be at least 2, got 1"),
        ("encode_once", "encode", 3, TypeError, "encode must be a function, got 3"),
        ("encode_once", "decode", 3, TypeError, "decode must be a function, got 3"),
    ]
)
def test_a_wrong_argument_is_named_before_any_work(call, argument, value, error, words):
    expect_error(CALLS[call], argument, value, error, words)


def test_lightning_is_needed_for_its_callback_only(monkeypatch):
    monitor = CompositionMonitor(PixelDecoder(), EDGES, **QUICK)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="lightning_callback needs PyTorch Lightning: pip install lightning"):
        monitor.lightning_callback()


@pytest.mark.parametrize("given", ["score", "module"])
def test_unknown_frozen_layers_are_named_before_the_first_measurement(given):
    model = PixelDecoder()
    score, module = (model, None) if given == "score" else (model.forward, model)
    with pytest.raises(ValueError, match=r"frozen must contain names of BatchNorm layers .*norm.*, got \['other'\]"):
        CompositionMonitor(score, EDGES, module=module, frozen=["other"])


@pytest.mark.parametrize("epochs", [(0, 0), (5, 0), (-1,)])
def test_file_with_epochs_that_do_not_grow_is_refused(tmp_path, epochs):
    path = tmp_path / "log.csv"
    CompositionMonitor(PixelDecoder(), EDGES, csv=path, **QUICK).step(0)
    header, row = path.read_text().splitlines()
    path.write_text("\n".join([header, *(f"{epoch}{row[1:]}" for epoch in epochs)]))
    with pytest.raises(
        ValueError, match=rf"csv must be .* growing epochs, got .* line {len(epochs) + 1} is '{epochs[-1]}"
    ):
        CompositionMonitor(PixelDecoder(), EDGES, csv=path)


def test_decode_may_write_into_the_encoding():
    """The scores do not depend on the batch, but the encoding would change from batch to batch if it were kept."""

    def encode():
        return [GRAPH.x[:, :4].clone()]

    def decode(z, pairs):
        z[0].sub_(0.5)
        return (z[0][pairs[0]] * z[0][pairs[1]]).sum(1)

    report = audit(encode_once(encode, decode), EDGES, **QUICK)
    assert report == audit(lambda pairs: decode(encode(), pairs), EDGES, **QUICK)
    assert report.parts["heldout"].statistics["kappa"].mean == pytest.approx(0, abs=1e-6)
