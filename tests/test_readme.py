"""The examples of the README run unchanged, and the commands and files that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
_EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_link_example_runs(capsys):
    pytest.importorskip("torch_geometric")
    code = next(code for code in _EXAMPLES if "suffice.link" in code)
    exec(compile(code, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("fixed:0.5 dominated")
    assert second.startswith("random:0.05,0.95 affected")


@pytest.mark.model
def test_kv_example_runs(capsys):
    namespace = {}
    outputs = []
    for code in (code for code in _EXAMPLES if "suffice.kv" in code):
        exec(compile(code, "README.md", "exec"), namespace)
        outputs.append(capsys.readouterr().out)
    assert ["482913" in output for output in outputs] == [True, True]
    assert "of the capacity" in outputs[1]


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"`((?:docs|src)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
