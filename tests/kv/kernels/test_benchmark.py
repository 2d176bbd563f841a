"""The GPU benchmark also runs on a machine without a GPU, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


def test_small_run_without_a_gpu_reports_what_it_skips(tmp_path):
    command = [sys.executable, "-W", "ignore", SCRIPT, "--small", "--json", tmp_path / "gpu.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET")
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {"score_of_copy_bandwidth", "score_percent_of_prefill_32k", "ragged_of_flash"} <= set(result)
    assert set(result["largest_batch"]["128"]) == {"full", "25% uniform", "25% ragged", "10% uniform", "10% ragged"}
    assert result["machine"]["torch"]
    if "gpu" not in result["machine"]:
        assert any("no kernel for this device" in line for line in result["skipped"])
        assert all(row["ours"] is None and row["torch"] > 0 for row in result["score"])
