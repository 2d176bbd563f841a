"""Results on a GPU equal those on the CPU, and the program rarely waits for it; tested on a fake GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_gpu.build import build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++, and a torch without CUDA"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake_gpu"))


def run_script(script, library, *options, interpret):
    """Run a script on the fake GPU, with kernels if `interpret`, and return the JSON lines that it prints."""
    variables = {"FAKE_CUDA_LIBRARY": str(library), "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.fake_gpu.{script}", *options]
    printed = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def waits_per_layer(line, stage):
    return len(line["waits"][stage]) / line["waits"]["layers"]


def test_caches_equal_those_on_the_cpu(library):
    pytest.importorskip("transformers")
    for line in run_script("cache", library, interpret=False):
        assert line.get("equal"), line


def test_caches_with_kernels_equal_those_on_the_cpu(library):
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    lines = run_script("cache", library, interpret=True)
    for line in lines:
        assert line.get("equal"), line
    # Only heads of equal length that evict again are compacted in place.
    assert [line["case"][2:] for line in lines if "compaction_kernel" in line.get("launched", ())] == [
        ["capkv", {"evict": "always", "interval": 3}]
    ]
    default = lines[0]
    assert default["case"][2:] == ["capkv-profile", {}]
    # Scores, capacity and attention over heads of unequal length are computed by kernels.
    assert {
        "key_sums_kernel",
        "key_scores_kernel",
        "gram_kernel",
        "cholesky_kernel",
        "quadratic_form_kernel",
        "attention_parts_kernel",
    } <= set(default["launched"])
    (quantized,) = (line for line in lines if line["case"] == ["quantized entries"])
    assert {"packing_kernel", "quantized_parts_kernel", "combine_parts_kernel"} <= set(quantized["launched"])
    # All conditions of a layer are checked together after the prefill, and decoding checks none.
    assert len(default["waits"]["new cache"]) == 1
    assert waits_per_layer(default, "prefill") == 1
    assert waits_per_layer(default, "decoding") == 0


def test_link_predictors_equal_those_on_the_cpu(library):
    pytest.importorskip("torch_geometric")
    for line in run_script("link", library, interpret=False):
        expected, found = line.get("numbers", [None, line])
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True), line["case"]


def test_benchmark_runs_completely(library):
    pytest.importorskip("torch_geometric")
    pytest.importorskip("triton")
    (result,) = run_script("benchmark", library, "--small", "--seconds", "3600", interpret=True)
    assert result["skipped"] == result["wrong"] == []
    assert all(row["ours"] > 0 for row in result["score"] + result["decoding"])
    assert len(result["quantized"]) == 2
    assert len(result["end_to_end"]) == 5
