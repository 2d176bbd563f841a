"""Memory of trainings: those that do not fit, and the reuse of freed memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import EncoderDecoderSettings
from suffice.link.train import trainer
from suffice.link.train.config import TrainConfig
from suffice.link.train.memory import (
    NotEnoughMemoryError,
    available_bytes,
    check_memory,
    explain_out_of_memory,
    min_training_bytes,
    reuse_freed_memory,
)
from suffice.link.train.trainer import fit

GRAPH = block_model(nodes=120, classes=2, degree=6, features=8)
SPLIT = split_edges(GRAPH, SplitConfig(), 0)

# Reuse of freed memory is tested in subprocesses, because the setting holds for a whole process.
_COUNT_PAGE_FAULTS = """
import resource, sys
import torch
from suffice.link.train.memory import reuse_freed_memory
changed = reuse_freed_memory(int(sys.argv[1]), 64)
x = torch.zeros(200_000, 64)
for _ in range(20):
    x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x + 1
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def small_model(hidden: int = 8):
    return EncoderDecoderSettings(hidden=hidden).build(GRAPH.x.size(1))


def test_a_training_that_cannot_fit_is_refused_before_any_work():
    huge = torch.empty(1, 1).expand(10**11, 4)  # 1.6 TB of features, none of them allocated
    with pytest.raises(NotEnoughMemoryError, match=r"0000 nodes with 4 features and 5 edges needs at least .* on cpu"):
        check_memory(huge, 5, small_model())
    check_memory(GRAPH.x, SPLIT.train.size(1), small_model())


def test_the_lower_bound_against_a_count_by_hand():
    model = small_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = 480 + 16 * num_parameters + 8 * 120 * 8
    assert min_training_bytes(GRAPH.x, 10, model) == expected
    assert min_training_bytes(GRAPH.x.to("meta"), 10, model) == expected + 4 * GRAPH.x.numel()
    available = available_bytes(torch.device("cpu"))
    assert available is None or available > 2**20


def test_running_out_of_memory_is_explained_and_finished_epochs_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "kept.safetensors"
    config = TrainConfig(epochs=4, batch_size=64, metric="auc")
    uninterrupted = small_model()
    fit(uninterrupted, GRAPH, SPLIT, config)
    run_epoch = trainer._Training.run_epoch

    def run_out_of_memory_in_third_epoch(training, number):
        if number == 2:
            torch.empty(2**60)  # raises torch's own error
        return run_epoch(training, number)

    monkeypatch.setattr(trainer._Training, "run_epoch", run_out_of_memory_in_third_epoch)
    with pytest.raises(NotEnoughMemoryError, match=r"ran out .*Finished epochs are kept in .*kept.safetensors"):
        fit(small_model(), GRAPH, SPLIT, config, checkpoint=file)
    monkeypatch.undo()
    resumed = small_model()
    assert len(fit(resumed, GRAPH, SPLIT, config, checkpoint=file).epochs) == 4
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_model_that_does_not_fit_is_explained():
    with pytest.raises(NotEnoughMemoryError, match=r"ran out \(.* GiB more were requested\). Use a smaller batch_size"):
        small_model(10**11)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory():
        raise RuntimeError("shape")
    with pytest.raises(NotEnoughMemoryError, match=r"memory ran out\. Use a smaller"), explain_out_of_memory():
        raise MemoryError


def test_a_missing_checkpoint_is_not_mentioned(tmp_path):
    with pytest.raises(NotEnoughMemoryError) as caught, explain_out_of_memory(tmp_path / "none"):
        torch.empty(2**60)
    assert "kept" not in str(caught.value)


def count_page_faults(num_nodes: int) -> tuple[str, int]:
    changed, count = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGE_FAULTS, str(num_nodes)], capture_output=True, text=True, check=True
    ).stdout.split()
    return changed, int(count)


def test_small_graphs_change_nothing():
    assert reuse_freed_memory(1_000, 64) is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is a function of glibc")
def test_a_large_tensor_reuses_the_pages_of_the_previous_one():
    changed, with_reuse = count_page_faults(200_000)
    if changed == "False":
        pytest.skip("the C library is not glibc")
    # The heap needs some tensors to settle, so that a few page faults remain.
    assert with_reuse * 2 < count_page_faults(1_000)[1]
