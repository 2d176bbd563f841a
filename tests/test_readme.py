"""The README's example runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
def test_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "482913" in said
    assert "of the capacity" in said


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`((?:docs|src)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
