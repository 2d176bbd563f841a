"""The kernels compile for a GPU, without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytest.importorskip("torch_geometric")
SOURCE = Path(__file__).parents[1] / "src" / "retain"


def test_every_kernel_compiles(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("ahead.py"), "64", "bfloat16"]
    compiled = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    sources = [file.read_text(encoding="utf-8") for file in SOURCE.glob("*/kernels/*.py")]
    launched = [name for source in sources for name in re.findall(r"launch\(\s*(\w+),", source)]
    assert set(compiled) == set(launched)
