"""The documentation: its code runs, its commands, links and error messages exist, and each page is of one kind.

All Python blocks of a page run in one namespace, from top to bottom. A comment before a block says that it does not run
(`<!-- not run: why -->`), or that it needs the default model (`<!-- heavy: why -->`). tests/link/test_docs.py runs the
pages of link prediction, and tests/kv/test_fidelity.py one page on caches.
"""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from suffice.cli import app
from suffice.study import Spec

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
LINK_PAGES = (
    "tutorials/audit-your-first-link-predictor.md",
    "how-to/audit-your-pyg-model.md",
    "how-to/compare-metrics-by-batch.md",
    "how-to/monitor-a-training.md",
    "how-to/correct-composition-bias.md",
    "how-to/train-a-link-predictor.md",
    "how-to/write-a-link-model.md",
    "how-to/coming-from-a-pyg-training-loop.md",
    "explanation/theory-link.md",
    "explanation/models-of-neighborhoods.md",
)
RUN_ELSEWHERE = (*LINK_PAGES, "how-to/measure-fidelity.md")
OTHER_GENERATED = {"reference/policies.md", "reference/models.md", "reference/cli.md", "how-to/contribute.md"}
KINDS = ("tutorials", "how-to", "explanation", "results")
MAX_LINES = 300  # of a page that is not a result
MAX_TABLE_ROWS = 20  # outside of results; longer tables are evidence

_BLOCK = re.compile(r"(?:<!-- (not run|heavy): [^>]+ -->\n)?```python\n(.*?)```", flags=re.DOTALL)
_SHELL = re.compile(r"```sh\n(.*?)```", flags=re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT if page.parent == ROOT else DOCS))


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


# ---- Code ------------------------------------------------------------------------------------------------------------


def pages_with_code():
    for page in PAGES:
        blocks = _BLOCK.findall(TEXTS[page])
        if not blocks or name_of(page) in RUN_ELSEWHERE:
            continue
        needs_model = any(mark == "heavy" for mark, _ in blocks)
        yield pytest.param(name_of(page), blocks, id=name_of(page), marks=[pytest.mark.model] if needs_model else [])


@pytest.mark.parametrize(("name", "blocks"), list(pages_with_code()))
def test_code_of_a_page_runs(name, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for mark, code in blocks:
        compiled = compile(code, name, "exec")
        if mark == "not run":
            continue
        if "suffice.link" in code:
            pytest.importorskip("torch_geometric")
        exec(compiled, namespace)


def notebook_cells(path):
    """Return the source of the code cells of a notebook, after a check of its format."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    assert set(notebook) == {"nbformat", "nbformat_minor", "metadata", "cells"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.model
def test_notebook_on_caches_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for code in notebook_cells(ROOT / "examples" / "compress_a_cache.ipynb"):
        exec(compile(code, "compress_a_cache.ipynb", "exec"), namespace)
    assert "482913" in capsys.readouterr().out


EXAMPLES = {
    "audit_your_model.py": ([], "unaffected"),
    "audit_any_shape.py": (["--shape", "two_embeddings"], "two_embeddings with layer norm: unaffected"),
    "correct_it.py": (["--epochs", "2", "--seeds", "2"], "random+balanced/batch − fixed/batch"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch_geometric")
    arguments, expected = EXAMPLES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_study_on_ray_runs(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("torch_geometric")
    command = [sys.executable, str(ROOT / "examples" / "study_on_ray.py"), "--ray", "local", "--epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "4 done" in found.stdout


@pytest.mark.model
@pytest.mark.parametrize("name", ["serve_a_document.py", "tune_a_budget.py"])
def test_example_with_the_default_model_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert "482913" in capsys.readouterr().out or name == "tune_a_budget.py"


# ---- Commands and settings -------------------------------------------------------------------------------------------


def commands():
    """Yield each command of all shell blocks, as a list of words."""
    for page, text in TEXTS.items():
        for block in _SHELL.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield page, words


def options_of(command):
    """Return all option names of a command."""
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def test_commands_exist_with_their_options():
    root = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    seen = 0
    for page, words in commands():
        where = f"{name_of(page)}: {' '.join(words)}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, where
        elif words[0] == "suffice":
            command, rest = root, words[1:]
            while hasattr(command, "list_commands"):
                context = command.make_context("suffice", [], resilient_parsing=True)
                assert {*rest[:1]} & {*command.list_commands(context)}, where
                command, rest = command.get_command(context, rest[0]), rest[1:]
            assert given <= options_of(command), where
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{option}"' in source for option in given), where
        else:
            continue
        seen += 1
    assert seen > 10


def test_studies_are_valid(tmp_path):
    found = [text for page in PAGES for text in re.findall(r"```yaml\n(.*?)```", TEXTS[page], flags=re.DOTALL)]
    assert found
    for number, text in enumerate(found):
        assert "kind" in yaml.safe_load(text)
        (tmp_path / f"{number}.yaml").write_text(text, encoding="utf-8")
        assert Spec.read(tmp_path / f"{number}.yaml")


# ---- Links, navigation and kinds -------------------------------------------------------------------------------------


def navigation(part=None):
    """Yield the pages that mkdocs.yml lists."""
    if part is None:
        part = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    if isinstance(part, str):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from navigation(inner)


def test_navigation_lists_every_page():
    listed = list(navigation())
    assert len(set(listed)) == len(listed)
    generated = {name for name in listed if not (DOCS / name).exists()}
    assert {name_of(page) for page in PAGES} == set(listed) - generated
    for name in generated - OTHER_GENERATED:
        folder = ROOT / "src" / "suffice" / name.removeprefix("reference/").removesuffix(".md").replace("-", "/")
        assert (folder / "__init__.py").exists(), name


def test_pages_of_packages_begin_with_their_main_class(monkeypatch):
    files = ModuleType("mkdocs.structure.files")
    files.File = object  # only used to build the site, whose packages need not be installed here
    for name, module in (("mkdocs", ModuleType("mkdocs")), ("mkdocs.structure", ModuleType("mkdocs.structure"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, files.__name__, files)
    hooks = runpy.run_path(str(DOCS / "hooks" / "reference.py"))
    exported = {
        name for package in ("kv", "link", "information", "study", "report") for name in hooks["_exports"](package)
    }
    for package in hooks["_packages"]():
        first = re.search("^::: (.*)$", hooks["package_page"](package, exported), flags=re.MULTILINE)[1]
        assert first.rpartition(".")[2] == hooks["_MAIN"][package], package


def anchors(text):
    """Return the anchors of the headings of a page, as Python-Markdown makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_exist(page):
    generated = {DOCS / name for name in navigation()}
    for link in _LINK.findall(without_code(TEXTS[page])):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists() or file in generated, link
        if anchor and file in TEXTS:
            assert anchor in anchors(TEXTS[file]), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_is_of_one_kind(page):
    text = TEXTS[page]
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)) == 1
    if page.parent == DOCS:
        assert page.name == "index.md"
        return
    kind = page.parent.name
    assert kind in KINDS
    if kind == "results":
        assert page.name == "index.md" or _SHELL.search(text) or "```\n" in text, "evidence needs its command"
        assert not _BLOCK.search(text), "code to copy belongs into a how-to guide"
        return
    assert len(text.splitlines()) <= MAX_LINES
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert table.count("\n") <= MAX_TABLE_ROWS + 2, "long tables belong into results"
    if kind == "tutorials":
        assert _BLOCK.search(text)
        assert re.search(r"^Next: ", text, flags=re.MULTILINE)
    if kind == "explanation":
        assert not _SHELL.search(text), "commands belong into how-to guides"


# ---- Facts -----------------------------------------------------------------------------------------------------------


def messages_of_the_source():
    """Yield a pattern for each string of suffice.kv and suffice.link; formatted values match anything."""
    source = ROOT / "src" / "suffice"
    for file in sorted([*(source / "kv").rglob("*.py"), *(source / "link").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [part for piece in node.value.split("%s") for part in (piece, None)][:-1]
            else:
                continue
            if sum(len(part) for part in parts if part) > 25:
                yield re.compile("".join(".*" if part is None else re.escape(part) for part in parts), re.DOTALL)


def test_error_messages_exist():
    text = "".join(text for page, text in TEXTS.items() if page.name.startswith("troubleshooting"))
    patterns = list(messages_of_the_source())
    messages = re.findall(r"```text\n(.*?)\n```", text, flags=re.DOTALL)
    assert len(messages) > 20
    for message in messages:
        assert any(pattern.fullmatch(message) for pattern in patterns), message


def test_faq_names_the_tested_families():
    pytest.importorskip("transformers")
    from tests.kv.tiny import FAMILIES

    text = " ".join(TEXTS[DOCS / "how-to" / "faq.md"].split())
    families = re.search(r"models of the families ([\w, ]+) and (\w+)\.", text)
    assert {*families[1].split(", "), families[2]} == set(FAMILIES)
