"""The house: ground rooms know nothing of the halves, the halves nothing of each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "suffice"
FORBIDDEN = {
    "information": {"kv", "link", "report", "cli", "study"},
    "report": {"kv", "link", "cli", "study", "information"},
    "kv": {"link", "cli"},
    "link": {"kv", "cli"},
    "study": {"kv", "link", "cli", "information"},
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_point_downwards(room):
    for file in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            rooms = {name.split(".")[1] for name in names if name.startswith("suffice.")}
            assert not rooms & FORBIDDEN[room], f"{file.name} imports {rooms & FORBIDDEN[room]}"


@pytest.mark.parametrize(("half", "stranger"), [("suffice.kv", "torch_geometric"), ("suffice.link", "transformers")])
def test_each_half_imports_without_the_others_libraries(half, stranger):
    pytest.importorskip("transformers" if half.endswith("kv") else "torch_geometric")
    code = f"import sys; sys.modules[{stranger!r}] = None; import {half}; import suffice.cli"
    subprocess.run([sys.executable, "-c", code], check=True)
