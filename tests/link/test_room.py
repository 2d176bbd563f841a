"""Graphs that do not fit."""

from __future__ import annotations

import pytest
import torch

from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import EncoderDecoderSettings
from suffice.link.train import trainer as training
from suffice.link.train.memory_check import DoesNotFitError, check_room, free_bytes, least_bytes, named_shortage
from suffice.link.train.trainer import TrainSettings, fit

GRAPH = block_model(nodes=120, classes=2, degree=6, features=8)
PARTS = split_edges(GRAPH, SplitConfig(), 0)


def small(hidden: int = 8):
    return EncoderDecoderSettings(hidden=hidden).build(GRAPH.x.size(1))


def test_what_cannot_fit_is_refused_before_any_work():
    huge = torch.empty(1, 1).expand(10**11, 4)  # 1.6 TB, none of it real
    with pytest.raises(DoesNotFitError, match=r"0000 nodes of 4 features and 5 edges need at least .* GiB on cpu"):
        check_room(huge, 5, small())
    check_room(GRAPH.x, PARTS.train.size(1), small())


def test_the_bound_is_below_what_a_training_holds():
    model = small()
    weights = sum(part.numel() for part in model.parameters())
    assert least_bytes(GRAPH.x, 10, model) == 480 + 16 * weights + 8 * 120 * 8
    assert least_bytes(GRAPH.x.to("meta"), 10, model) == least_bytes(GRAPH.x, 10, model) + 4 * GRAPH.x.numel()
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20


def test_memory_that_runs_out_is_named_and_finished_epochs_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "kept.safetensors"
    settings = TrainSettings(epochs=4, batch_size=64)
    whole = small()
    fit(whole, GRAPH, PARTS, settings)
    real, calls = training._run_epoch, []

    def short(*arguments):
        calls.append(1)
        if len(calls) == 3:
            torch.empty(2**60)  # the allocator's own words
        return real(*arguments)

    monkeypatch.setattr(training, "_run_epoch", short)
    with pytest.raises(DoesNotFitError, match=r"ran out .*finished epochs are kept in .*kept.safetensors"):
        fit(small(), GRAPH, PARTS, settings, checkpoint=file)
    monkeypatch.undo()
    resumed = small()
    assert len(fit(resumed, GRAPH, PARTS, settings, checkpoint=file).epochs) == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(DoesNotFitError, match=r"ran out \(.* GiB more were asked for\); a smaller"):
        small(10**11)


def test_other_errors_keep_their_words():
    with pytest.raises(RuntimeError, match="shape"), named_shortage():
        raise RuntimeError("shape")
    with pytest.raises(DoesNotFitError, match="memory ran out; a smaller"), named_shortage():
        raise MemoryError


def test_the_message_says_nothing_of_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(DoesNotFitError) as found, named_shortage(tmp_path / "none"):
        torch.empty(2**60)
    assert "kept" not in str(found.value)
