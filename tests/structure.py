"""The structure of the source code, read from its imports and signatures.

    python tests/structure.py [SOURCE_FOLDER]

prints for each half the number of files, of import levels and of import cycles, the largest constructor, the functions
with more than eight parameters and the public names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "suffice"
MAX_PARAMETERS = 8


def module_names(source: Path) -> dict[str, Path]:
    """Return the files of a package by module name."""
    names = {}
    for file in sorted(source.rglob("*.py")):
        parts = (source.name, *file.relative_to(source).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imports(source: Path) -> dict[str, set[str]]:
    """Return which modules of the package each module imports, anywhere in its file.

    Imports inside functions and under TYPE_CHECKING count too. An `__init__.pyi` counts for its package.
    """
    modules = module_names(source)
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        stub = file.with_suffix(".pyi")
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (file, stub) if path.exists()]
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        targets = {target for tree in trees for target in _imported(tree, package, modules)}
        found[name] = targets - {name}
    return found


def _imported(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parent, *filter(None, [node.module])))
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif base in modules:
                    yield base


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def num_levels(graph: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports; the modules of a cycle count as one."""
    component = {node: node for node in graph}
    for cycle in cycles(graph):
        component |= dict.fromkeys(cycle, cycle[0])
    condensed: dict[str, set[str]] = {}
    for node, targets in graph.items():
        own = condensed.setdefault(component[node], set())
        own |= {component[target] for target in targets if target in component} - {component[node]}
    depth: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((level(target) for target in condensed[node]), default=0)
        return depth[node]

    return max(map(level, condensed))


def within(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """Return the part of a graph that lies in a package; the package's own `__init__` is left out."""
    inside = {name for name in graph if name.startswith(f"{package}.")}
    return {name: graph[name] & inside for name in inside}


def signatures(source: Path) -> Iterator[tuple[str, int]]:
    """Yield the qualified name and the number of parameters of each function, without `self` and `cls`."""
    for name, file in module_names(source).items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            members = node.body if isinstance(node, (ast.ClassDef, ast.Module)) else []
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for member in members:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    a = member.args
                    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
                    yield f"{name}.{owner}{member.name}", len(names)


def main() -> None:
    """Print the table."""
    source = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SOURCE
    graph = imports(source)
    every = list(signatures(source))
    for half in ("kv", "link"):
        package = f"{source.name}.{half}"
        part = within(graph, package)
        own = [(name, count) for name, count in every if name.startswith(f"{package}.")]
        constructor = max((pair for pair in own if pair[0].endswith(".__init__")), key=lambda pair: pair[1])
        many = [name for name, count in own if count > MAX_PARAMETERS]
        print(f"{package}: {len(part)} files, {num_levels(part)} import levels, {len(cycles(part))} import cycles")
        for cycle in cycles(part):
            print(f"  cycle: {', '.join(cycle)}")
        print(f"  largest constructor: {constructor[0]}, {constructor[1]} arguments")
        print(f"  functions with more than {MAX_PARAMETERS} parameters: {len(many)}: {', '.join(many)}")


if __name__ == "__main__":
    main()
