"""The structure of the package: imports point down, no file imports itself in a circle, and no file is too long."""

import subprocess
import sys

import pytest

from tests.structure import SOURCE, cycles, imports, module_names

# What each package may import besides itself; all packages may import the modules of the top level.
ALLOWED = {
    "information": set(),
    "report": set(),
    "study": {"report"},
    "kv": {"information", "report", "study"},
    "link": {"information", "report", "study"},
    "cli": {"information", "report", "study", "kv", "link"},
    "__main__": {"cli"},
}
TOP_LEVEL = {
    "suffice",
    "suffice.arguments",
    "suffice.devices",
    "suffice.environment",
    "suffice.folders",
    "suffice.gpu",
    "suffice.files",
    "suffice.plain_numbers",
}
MAX_LINES = 500  # a file is about one noun; a longer one is about several


@pytest.fixture(scope="module")
def graph():
    return imports(SOURCE)


def test_packages_are_known():
    packages = {name.split(".")[1] for name in module_names(SOURCE) if name not in TOP_LEVEL}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_between_packages_point_down(graph, package):
    for name, targets in graph.items():
        if name.split(".")[1:2] != [package]:
            continue
        others = {target.split(".")[1] for target in targets if target not in TOP_LEVEL} - {package}
        assert others <= ALLOWED[package], f"{name} must not import {others - ALLOWED[package]}"


def test_the_top_level_imports_no_package(graph):
    for name in TOP_LEVEL:
        assert graph[name] <= TOP_LEVEL


def test_no_file_is_part_of_an_import_cycle(graph):
    assert cycles(graph) == []


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_file_is_too_long():
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in module_names(SOURCE).items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(("half", "foreign"), [("suffice.kv", "torch_geometric"), ("suffice.link", "transformers")])
def test_each_half_imports_without_the_libraries_of_the_other(half, foreign):
    pytest.importorskip("transformers" if half.endswith("kv") else "torch_geometric")
    code = (
        f"import sys; sys.modules[{foreign!r}] = None; import {half} as half; import suffice.cli\n"
        "for name in half.__all__: getattr(half, name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
