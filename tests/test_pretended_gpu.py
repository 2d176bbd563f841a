"""On a GPU everything gives what it gives on the CPU, and waits for it seldom: shown on a pretended one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pretended.build import build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++, and a torch without CUDA"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pretended"))


def lines(script, library, *options, interpret):
    own = {"PRETENDED_CUDA": str(library), "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.pretended.{script}", *options]
    printed = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def waits_by_layer(line, part):
    return len(line["waits"][part]) / line["waits"]["layers"]


def test_caches_answer_alike(library):
    pytest.importorskip("transformers")
    for line in lines("cache", library, interpret=False):
        assert line.get("same"), line


def test_caches_answer_alike_by_kernels(library):
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    found = lines("cache", library, interpret=True)
    for line in found:
        assert line.get("same"), line
    # Heads of equal length stay in their buffers when they evict again.
    assert [line["case"][2:] for line in found if "compaction_kernel" in line.get("launched", ())] == [
        ["capkv", {"evict": "always", "interval": 3}]
    ]
    default = found[0]
    assert default["case"][2:] == ["capkv-profile", {}]
    # Scores by kernel, and so the capacity, and decoding over heads of unequal length.
    assert {
        "key_sums_kernel",
        "key_scores_kernel",
        "gram_kernel",
        "cholesky_kernel",
        "quadratic_form_kernel",
        "attention_parts_kernel",
    } <= set(default["launched"])
    # All that must hold of a layer is asked at once, and of a step nothing.
    assert len(default["waits"]["made"]) == 1
    assert waits_by_layer(default, "prefill") == 1
    assert waits_by_layer(default, "steps") == 0


def test_link_predictors_train_and_audit_alike(library):
    pytest.importorskip("torch_geometric")
    for line in lines("link", library, interpret=False):
        expected, found = line.get("numbers", [None, line])
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True), line["case"]


def test_the_benchmark_measures_everything(library):
    pytest.importorskip("torch_geometric")
    pytest.importorskip("triton")
    (found,) = lines("benchmark", library, "--small", interpret=True)
    assert found["skipped"] == found["wrong"] == []
    assert all(row["ours"] > 0 for row in found["score"] + found["decoding"])
    assert len(found["end_to_end"]) == 5
