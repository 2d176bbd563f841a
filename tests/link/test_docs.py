"""The pages and the notebook of link prediction run as they are, and print what they show.

All Python blocks of a page run in one namespace, from top to bottom.
"""

import re

import pytest

from suffice.link.models import decoders, encoders, models
from suffice.link.models.decoder import DECODERS
from suffice.link.models.encoder import ENCODERS
from suffice.link.models.registry import MODELS
from tests.test_docs import DOCS, LINK_PAGES, ROOT, notebook_cells

_BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)


@pytest.fixture
def page(monkeypatch, tmp_path):
    """A function that runs a page and returns its namespace; what the page registers is forgotten afterwards."""
    for registry in (MODELS, ENCODERS, DECODERS):
        monkeypatch.setattr(registry, "_parts", registry.entries())
    monkeypatch.chdir(tmp_path)

    def run(name, after_block=lambda shown: None):
        namespace = {"__name__": "docs"}
        for not_run, code, shown in _BLOCK.findall((DOCS / name).read_text(encoding="utf-8")):
            compiled = compile(code, name, "exec")
            if not not_run:
                exec(compiled, namespace)
                after_block(shown)
        return namespace

    return run


CHECKED_BELOW = (
    "tutorials/audit-your-first-link-predictor.md",
    "how-to/audit-your-pyg-model.md",
    "how-to/write-a-link-model.md",
)


@pytest.mark.parametrize("name", [name for name in LINK_PAGES if name not in CHECKED_BELOW])
def test_page_runs(name, page):
    assert len(page(name)) > 2


def test_tutorial_prints_what_it_shows(page, capsys):
    """Numbers agree to 0.1, or to a tenth of the number: another machine rounds in another order."""
    number = re.compile(r"-?\d+\.\d+")

    def compare(shown):
        printed = capsys.readouterr().out.replace("#", "")
        shown = shown.replace("#", "")
        assert number.sub("N", printed).split() == number.sub("N", shown).split()
        assert [float(one) for one in number.findall(printed)] == pytest.approx(
            [float(one) for one in number.findall(shown)], abs=0.1, rel=0.1
        )

    assert page(CHECKED_BELOW[0], compare)["report"].verdict.level == "dominated"


def test_own_model_of_the_guide_is_dominated(page):
    found = page("how-to/audit-your-pyg-model.md")
    assert found["report"].verdict.level == "dominated"
    assert found["report"].parts.keys() == {"heldout", "train"}


def test_parts_of_the_guide_are_registered(page):
    page("how-to/write-a-link-model.md")
    assert "common-neighbor-gnn" in models()
    assert "gat" in encoders()
    assert "difference" in decoders()


def test_notebook_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for code in notebook_cells(ROOT / "examples" / "audit_a_link_predictor.ipynb"):
        exec(compile(code, "audit_a_link_predictor.ipynb", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "usual: dominated" in printed
    assert "LayerNorm: unaffected" in printed
