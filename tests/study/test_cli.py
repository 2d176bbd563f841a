"""`suffice study`, from a YAML file to tables, JSON and exported files."""

import csv
import json

import pytest
from typer.testing import CliRunner

from suffice.cli import app
from suffice.study import StoreError

YAML = """
kind: tests.study.tiny:SQUARE
settings: {{fail: "{fail}"}}
grid:
  x: [1, 2, 3]
seeds: 2
"""


def suffice(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "mein Gitter ß.yaml"
    path.write_text(YAML.format(fail=""), encoding="utf-8")
    return path


def test_run_status_show_export(spec, tmp_path):
    found = json.loads(suffice("study", "run", spec, "--workers", "0", "--json"))
    assert (found["done"], found["new"], found["failed"]) == (6, 6, 0)
    assert (spec.with_suffix("") / "study.db").exists()
    assert "6 done, 0 failed" in suffice("study", "status", spec)
    assert json.loads(suffice("study", "status", spec, "--json"))["studies"][0]["done"] == 6
    rows = json.loads(suffice("study", "show", spec.with_suffix(""), "--metric", "y", "--json"))["rows"]
    assert [(row["x"], row["mean"], row["seeds"]) for row in rows] == [(1, 1.5, 2), (2, 4.5, 2), (3, 9.5, 2)]
    table = suffice("study", "show", spec, "--where", "x=2")
    assert "4.500" in table
    assert "9.500" not in table
    assert "2 more rows" in suffice("study", "show", spec, "--limit", "1")
    for ending in ("csv", "jsonl", "json", "parquet"):
        suffice("study", "export", spec, "--to", tmp_path / f"rows.{ending}")
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    whole = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert [float(row["y"]) for row in table] == [line["y"] for line in lines] == list(frame["y"])
    assert [run["result"]["values"]["y"] for run in whole["runs"]] == [1, 4, 9, 2, 5, 10]
    assert whole["command"].startswith("suffice")


def test_failures_are_shown_and_retried(spec):
    spec.write_text(YAML.format(fail="raise"), encoding="utf-8")
    suffice("study", "run", spec, "--workers", "0", "--quiet", status=1)
    output = suffice("study", "status", spec)
    assert "6 failed" in output
    assert "RuntimeError: no square today" in output
    failures = json.loads(suffice("study", "status", spec, "--json"))["studies"][0]["failures"]
    assert "Traceback" in failures[0]["error"]
    suffice("study", "run", spec, "--workers", "0", "--retry", status=1)


def test_quiet_prints_nothing(spec):
    result = CliRunner().invoke(app, ["study", "run", str(spec), "--workers", "1", "--quiet"])
    assert result.output == ""


def test_plain_lines_without_a_terminal(spec):
    result = CliRunner().invoke(app, ["study", "run", str(spec), "--workers", "1"])
    lines = [line for line in result.stderr.splitlines() if "squaring" in line]
    assert len(lines) == 6
    assert "6 of 6 done" in lines[-1]
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["show", "{}", "--metric", "z"], ValueError, "--metric must be among y, threads, got 'z'"),
        (["show", "{}", "--where", "y=1"], ValueError, r"where must name settings that vary \(x\), got 'y'"),
        (["show", "{}", "--where", "x"], ValueError, "--where must be NAME=VALUE, got 'x'"),
        (["export", "{}", "--to", "rows.xls"], ValueError, "path must be a file ending in .*, got 'rows.xls'"),
        (["status", "nowhere"], StoreError, "holds no study"),
        (["show", "{}", "--study", "mine"], StoreError, "study must be one of mein Gitter ß in .*, got 'mine'"),
        (["run", "{}", "--ray", "nowhere:1"], ValueError, "ray must be .*, got 'nowhere:1'"),
    ],
)
def test_wrong_arguments_are_named(spec, arguments, error, message):
    suffice("study", "run", spec, "--workers", "0", "--quiet")
    with pytest.raises(error, match=message):
        suffice("study", *(argument.format(spec) for argument in arguments))


def test_kinds_are_listed():
    pytest.importorskip("torch_geometric")
    found = json.loads(suffice("study", "kinds", "--json"))
    assert found["link.correct"]["settings"]["data.name"] == "digits"
    assert "link.correct" in suffice("study", "kinds")
