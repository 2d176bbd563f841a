"""All kernels compile for a GPU, on machines without one, and the analysis of their machine code gives numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytest.importorskip("torch_geometric")
ROOT = Path(__file__).parents[1]


def test_every_kernel_compiles(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")  # the interpreter accepts code that the compiler does not
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "gpu_ceiling.py", "--dims", "64"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    result = json.loads(printed.splitlines()[-1])["64"]
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "src" / "suffice").glob("**/kernels/*.py")]
    launched = [name for source in sources for name in re.findall(r"launch\(\s*(\w+),", source)]
    assert set(result["compiled"]) == set(launched)
    for name, row in result["kernels"].items():
        assert 0 < row["ceiling"] <= 1, name
        assert row["issue"] > 0, name
        assert (row["matrix"] > 0) == (name != "packing_kernel"), name
