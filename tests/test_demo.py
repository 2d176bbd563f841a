"""The demo runs the parts of the package whose libraries are installed, and names the parts that it skips."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from suffice.cli import app

pytest.importorskip("torch_geometric")


@pytest.fixture
def without(monkeypatch):
    find = importlib.util.find_spec

    def hide(*packages):
        util = SimpleNamespace(find_spec=lambda name: None if name in packages else find(name))
        monkeypatch.setattr(importlib.import_module("suffice.cli.demo"), "importlib", SimpleNamespace(util=util))

    return hide


def test_link_prediction_alone(without, tmp_path):
    without("transformers")
    page = tmp_path / "demo.html"
    arguments = ["demo", "--epochs", "1", "--json", "--report", str(page)]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert [study["graph"] for study in found["link"]] == ["digits", "block-model"]
    assert "rows" not in found
    assert "pip install 'suffice[kv]'" in found["skipped"][0]
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 4  # response curves and embeddings of each graph
    assert "suffice[kv]" in html
    separate = [row for row in found["link"][0]["rows"] if row["arm"] == "separate"]
    assert {row["edge_set"] for row in separate if row["metric"] == "a_pure"} == {"heldout", "train"}


def test_no_part_is_installed(without, tmp_path):
    without("transformers", "torch_geometric")
    result = CliRunner().invoke(app, ["demo", "--report", str(tmp_path / "demo.html")], catch_exceptions=False)
    assert "pip install 'suffice[kv]'" in result.stdout
    assert "pip install 'suffice[graph]'" in result.stdout
    assert "torch-geometric" in (tmp_path / "demo.html").read_text(encoding="utf-8")
