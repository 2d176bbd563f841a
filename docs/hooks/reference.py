"""Generate pages: the registries, the command line, one page for each public package, and how to contribute.

A generated page that `nav` of mkdocs.yml does not list is a warning, which fails a strict build.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_SOURCE = Path(__file__).parents[2] / "src" / "suffice"
_CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
# Packages that users do not import from: the command line, the registries' folders of data, and what only the GPU needs.
_INTERNAL = {"suffice", "suffice.cli", "suffice.kv.kernels", "suffice.kv.backend", "suffice.link.sparse.kernels"}
# The class or function that a page starts with.
_MAIN = {
    "suffice.information": "capacity",
    "suffice.kv": "CompressedCache",
    "suffice.kv.attention": "AttentionHook",
    "suffice.kv.budget": "Allocation",
    "suffice.kv.cache": "CompressedLayer",
    "suffice.kv.document": "CacheOptions",
    "suffice.kv.eval": "Comparison",
    "suffice.kv.eval.tasks": "make_example",
    "suffice.kv.hf": "PackagedModel",
    "suffice.kv.policy": "AttentionStats",
    "suffice.kv.policy.weights": "Weights",
    "suffice.kv.storage": "Storage",
    "suffice.link": "audit",
    "suffice.link.auditing": "AuditReport",
    "suffice.link.batches": "Composition",
    "suffice.link.data": "Graph",
    "suffice.link.models": "LinkPredictor",
    "suffice.link.sparse": "Adjacency",
    "suffice.link.study": "Experiment",
    "suffice.link.train": "TrainResult",
    "suffice.study": "Spec",
    "suffice.report": "Page",
}
_log = logging.getLogger("mkdocs.hooks.reference")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages that the navigation lists."""
    listed = set(_pages_of(config["nav"]))
    pages: dict[str, Callable[[], str]] = {
        "reference/policies.md": policies_page,
        "reference/models.md": models_page,
        "reference/cli.md": cli_page,
        "how-to/contribute.md": contribute_page,
    }
    exported = {name for package in ("kv", "link", "information", "study", "report") for name in _exports(package)}
    for package in _packages():
        pages[package_file(package)] = lambda package=package: package_page(package, exported)
    for name in sorted(set(pages) - listed):
        _log.warning("%s is generated, but missing in nav of mkdocs.yml", name)
    for name in sorted(listed & set(pages)):
        files.append(File.generated(config, name, content=pages[name]()))
    return files


def _pages_of(nav: Any) -> Iterator[str]:
    """Yield the files of all pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages_of(part)


# ---- Registries ------------------------------------------------------------------------------------------------------


def policies_page() -> str:
    """Return the page of policies and allocations, from the registry."""
    from suffice.kv import DEFAULT_POLICY, allocations, policies
    from suffice.kv.policy.names import POLICY_USES

    described = [(policy, policy.describe()) for policy in policies().values()]
    lines = [
        "# Policies and allocations",
        "## Which one?",
        f"Start with `{DEFAULT_POLICY}`, the default. [Choose a policy and a budget]"
        "(../how-to/choose-policy-and-budget.md) decides in five questions.",
        "| policy | when to use it |\n|---|---|\n"
        + "\n".join(f"| [`{name}`](#{_anchor(name)}) | {POLICY_USES[name]} |" for name in policies()),
        "## Parts",
        "A policy selects the entries of a KV cache that are kept. It is a product of *weights* (how likely is an "
        "entry to be read?), *directions* (how does it move the output?) and an *estimator* (how is its share of the "
        f"capacity approximated?). The default is `{DEFAULT_POLICY}`. "
        "[Theory of KV caches](../explanation/theory-kv.md) explains the parts, "
        "[Write a policy](../how-to/write-a-policy.md) shows how to make a new one.",
        "| policy | weights | directions | estimator | allocation | paper |\n|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| [`{policy.name}`](#{_anchor(policy.name)}) | {parts['weights']} | {parts['directions']} | {parts['estimator']} "
            f"| {parts['allocation']} | {_paper_link(parts['paper'])} |"
            for policy, parts in described
        ),
    ]
    for policy, _ in described:
        lines.append(f"## {policy.name}")
        lines.append("\n".join(_parts_of_a_policy(policy)))
    lines.append(
        "## Allocations\n\nAn allocation splits the budget over layers and heads: "
        "`CompressedCache(model, policy, budget, allocation=…)`. The total is the same for all allocations."
    )
    rows = [
        f"| `{name}` | `{type(one).__name__}` | {_first_paragraph(type(one))} |" for name, one in allocations().items()
    ]
    lines.append("| name | class | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(lines)


def models_page() -> str:
    """Return the page of link predictors, from the registry."""
    from suffice.link.models import decoders, encoders, get_model_settings, models

    lines = [
        "# Models of link prediction",
        "Each name is accepted by `build_model` and by the option `--model` of `suffice link` (encoders: `--encoder`, "
        "decoders: `--decoder`).",
        "## Models",
    ]
    for name, settings in models().items():
        about = " ".join((inspect.getmodule(settings).__doc__ or "").split())
        options = ", ".join(f"`{option}`" for option in get_model_settings(name).option_names())
        lines.append(f"### {name}\n\n{about}\n\nOptions: {options}.")
    for title, named in (("Encoders", encoders()), ("Decoders", decoders())):
        lines.append(f"## {title}")
        lines += [f"### {name}\n\n{_first_paragraph(kind)} (`{kind.__module__}`)" for name, kind in named.items()]
    return "\n\n".join(lines)


def _parts_of_a_policy(policy: Any) -> Iterator[str]:
    """Yield a list of the parts of a policy, as they are written in Python, with what they compute."""
    from suffice.kv.budget.allocation import Equal
    from suffice.kv.policy.selection import TopK

    if policy.keep_all:
        yield "* Nothing is evicted."
        return
    for factor, term in getattr(policy.weights, "terms", ((1.0, policy.weights),)):
        times = "" if factor == 1 else f"{factor:g} × "
        yield f"* weights: {times}`{term!r}`. {_first_paragraph(type(term))}"
    for name, part in (("directions", policy.directions), ("estimator", policy.estimator)):
        yield f"* {name}: `{part!r}`. {_first_paragraph(type(part))}"
    for name, part, default in (("selection", policy.selection, TopK), ("allocation", policy.allocation, Equal)):
        if not isinstance(part, default):
            yield f"* {name}: `{part!r}`. {_first_paragraph(type(part))}"
    if policy.window is not None:
        yield f"* The last {policy.window} tokens are always kept."


def _anchor(name: str) -> str:
    """Return the anchor of a heading. That of `kvzip+` would be that of `kvzip`, so the second one gets a number."""
    return name.replace("+", "_1")


def _paper_link(number: str) -> str:
    """Return a link to a paper, whose number is that of arXiv or `openreview:` and that of OpenReview."""
    kind, _, name = number.rpartition(":")
    address = f"https://openreview.net/forum?id={name}" if kind else f"https://arxiv.org/abs/{name}"
    return f"[{name}]({address})" if name else ""


def _first_paragraph(kind: Any) -> str:
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def contribute_page() -> str:
    """Return CONTRIBUTING.md as a page of the site."""
    return _CONTRIBUTING.read_text(encoding="utf-8").replace("](docs/", "](../")


# ---- Command line ----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Return the page of the command `suffice`: all subcommands with their options."""
    import typer

    from suffice.cli import app

    root = typer.main.get_command(app)
    lines = ["# Command line", "All commands and options of `suffice`. `suffice COMMAND --help` prints the same."]
    for words, command in _commands(root, ("suffice",)):
        lines.append(f"## {' '.join(words)}")
        lines.append((command.help or "").split("\f")[0].strip())
        rows = [
            f"| {_option_names(option)} | {_table_text(option.help)} | {_table_text(_default(option))} |"
            for option in command.params
            if getattr(option, "help", None) and "--help" not in option.opts
        ]
        if rows:
            lines.append("| option | | default |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(lines)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all subcommands with the words that call them."""
    if not hasattr(command, "list_commands"):
        yield words, command
        return
    context = command.make_context(words[-1], [], resilient_parsing=True)
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), (*words, name))


def _option_names(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return "<br>".join(f"`{name if name.startswith('-') else name.upper()}`" for name in names)


def _default(option: Any) -> str:
    default = option.default
    if default is None or default is ... or default == () or isinstance(default, bool) or callable(default):
        return ""
    return f"`{default}`"


def _table_text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- Packages --------------------------------------------------------------------------------------------------------


def package_file(package: str) -> str:
    """Return the file of the page of a package."""
    return f"reference/{package.removeprefix('suffice.').replace('.', '-')}.md"


def package_page(package: str, exported: set[str]) -> str:
    """Return the page of a package: its exported names, or else all public classes and functions of its modules.

    Args:
        package: the package.
        exported: full names of what top packages export; each is shown on the page of that package only.

    """
    folder = _SOURCE.joinpath(*package.split(".")[1:])
    about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    lines = [f"# {package}", about]
    own_exports = _exports(package.removeprefix("suffice."))
    names = list(own_exports) or [name for name in _public_names(package, folder) if name not in exported]
    main = _MAIN.get(package)
    names.sort(key=lambda name: name.rpartition(".")[2] != main)
    shown = own_exports.get
    lines += [f"::: {shown(name, name)}" for name in names]
    return "\n\n".join(lines)


def _packages() -> Iterator[str]:
    for file in sorted(_SOURCE.rglob("__init__.py")):
        package = ".".join(("suffice", *file.parent.relative_to(_SOURCE).parts))
        if package not in _INTERNAL:
            yield package


def _exports(package: str) -> dict[str, str]:
    """Return the exported names of a top package: where each is defined, and the name to document it by."""
    folder = _SOURCE.joinpath(*package.split("."))
    if "." in package or not folder.is_dir():
        return {}
    stub = folder / "__init__.pyi"
    tree = ast.parse((stub if stub.exists() else folder / "__init__.py").read_text(encoding="utf-8"))
    public = _all_names(tree)
    imports = [node for node in _statements(tree.body) if isinstance(node, ast.ImportFrom) and node.module]
    found: dict[str, str] = {}
    for node in imports:
        module = f"suffice.{package}.{node.module}" if node.level else str(node.module)
        for alias in node.names:
            name = alias.asname or alias.name
            if module.startswith("suffice.") and (public is None or name in public):
                found[f"{module}.{alias.name}"] = f"suffice.{package}.{name}"
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, and those under `if TYPE_CHECKING:`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            yield from node.body


def _all_names(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def _public_names(package: str, folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if is_public and ast.get_docstring(node):
                module = package if file.stem == "__init__" else f"{package}.{file.stem}"
                yield f"{module}.{node.name}"
