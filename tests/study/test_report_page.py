"""Reports of studies, as HTML and Markdown, hold the numbers and how they were made."""

import re

import pytest
from typer.testing import CliRunner

from suffice.cli import app
from suffice.study import PlannedRun, RunKind, Spec, Store, mean_interval, run_study
from suffice.study.report_page import study_report
from tests.study.tiny import SQUARE


def compare_policies(settings, seed, context):
    rows = [{"settings": {"policy": "full", "budget": 1.0}, "values": {"kl": 0.0}}]
    for n, policy in enumerate(("capkv", "<h2o>")):
        for budget in (0.25, 0.5, 0.75):
            rows.append(
                {"settings": {"policy": policy, "budget": budget}, "values": {"kl": n + seed * 0.01 + 1 / budget}}
            )
    return {"rows": rows, "text": "x" * 1000}


KIND = RunKind("policies", "tests.study.test_report_page:compare_policies", {"task": "text"}, compared_setting="policy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ein Bericht ä")
    run_study(place, KIND, Spec("policies", "policies", seeds=4), about={"command": "suffice study run <x>.yaml"})
    return place


def test_html_has_results_curves_differences_and_configuration(folder):
    html = study_report(folder, kinds={"policies": KIND}, command="suffice report x").to_html()
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == ["Results", "By budget", "Differences from capkv", "How it was made"]
    assert html.count("<svg") == html.count("<details>") == 2  # every figure has a table with its numbers
    assert "&lt;h2o&gt; · 0.5" in html
    assert "<h2o>" not in html
    expected = mean_interval([1 / 0.25 + seed * 0.01 for seed in range(4)])
    assert re.search(rf"<td [^>]*>{re.escape(str(expected))}</td>", html)
    assert "1.000 [1.000, 1.000]" in html  # the paired difference has no spread
    assert "suffice study run &lt;x&gt;.yaml" in html
    assert re.search(r"with python 3\.\d+\.\d+, machine .*, suffice ", html)


def test_markdown_has_the_same_content_and_its_figures_as_files(folder, tmp_path):
    target = tmp_path / "mein Bericht.md"
    CliRunner().invoke(app, ["report", str(folder), "--to", str(target)], catch_exceptions=False)
    text = target.read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert len(pictures) == 2
    assert all((tmp_path / one.replace("%20", " ")).read_text().startswith("<?xml") for one in pictures)
    assert "\\<h2o\\> · 0.5" in text
    assert "## Results" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    for table in tables:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1


def test_failed_and_missing_runs_are_reported(tmp_path):
    plan = [PlannedRun(SQUARE.complete({"x": x, "fail": "raise" if x == 2 else ""}), 0) for x in (1, 2)]
    run_study(tmp_path, SQUARE, plan, name="squares")
    html = study_report(tmp_path).to_html()
    assert "1 of 2 runs of square are done" in html
    assert "RuntimeError: no square today" in html
    with Store(tmp_path) as store:
        store.plan("later", SQUARE, [PlannedRun(SQUARE.complete({"x": 7}), 0)])
    assert "0 of 1 runs" in study_report(tmp_path, study="later").to_html()


def test_wrong_arguments_are_named(folder, tmp_path):
    for arguments, message in (
        ({"metrics": ["lk"]}, "metrics must be among kl, got 'lk'"),
        ({"compared_setting": "policy", "baseline": "snapkv"}, "baseline must be one of .*, got 'snapkv'"),
    ):
        with pytest.raises(ValueError, match=message):
            study_report(folder, **arguments)
    with pytest.raises(ValueError, match=r"--to must be a file ending in .html, .htm, .md, got .*x\.pdf'"):
        CliRunner().invoke(app, ["report", str(folder), "--to", str(tmp_path / "x.pdf")], catch_exceptions=False)
