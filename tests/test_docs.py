"""Every block of Python in the documentation runs as it stands, and so do the short examples.

A comment before a block says why it doesn't (`<!-- not run: … -->`), or that it takes the default model
(`<!-- heavy: … -->`). The blocks of results/link.md run in tests/link/test_docs.py, which defines
the names that they use.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(?:<!-- (not run|heavy): [^>]+ -->\n)?```python\n(.*?)```", flags=re.DOTALL)


def blocks():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if page.name == "link.md":
            continue
        for number, (mark, code) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8"))):
            marks = [pytest.mark.model] if mark == "heavy" else []
            yield pytest.param(page.name, code, mark == "not run", id=f"{page.stem}-{number}", marks=marks)


@pytest.mark.parametrize(("page", "code", "read"), list(blocks()))
def test_block_runs(page, code, read, tmp_path, monkeypatch):
    compiled = compile(code, page, "exec")
    if read:
        return
    if "suffice.link" in code:
        pytest.importorskip("torch_geometric")
    monkeypatch.chdir(tmp_path)
    exec(compiled, {"__name__": "docs"})


EXAMPLES = {
    "audit_your_model.py": ([], "unaffected"),
    "correct_it.py": (["--epochs", "2", "--seeds", "2"], "random/batch − fixed/batch"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch_geometric")
    arguments, said = EXAMPLES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert said in capsys.readouterr().out


def test_study_on_ray_runs(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("torch_geometric")
    command = [sys.executable, str(ROOT / "examples" / "study_on_ray.py"), "--ray", "local", "--epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "4 done" in found.stdout


@pytest.mark.model
@pytest.mark.parametrize("name", ["serve_a_document.py", "tune_a_budget.py"])
def test_model_example_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert "482913" in capsys.readouterr().out or name == "tune_a_budget.py"
