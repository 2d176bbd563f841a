"""What mkdocs makes of the registries and docstrings: pages of policies, models and modules; formulas as MathML."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_SOURCE = Path(__file__).parents[2] / "src" / "suffice"
_ROOMS = ("information", "kv", "link", "study", "report")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {"reference/policies.md": policies(), "reference/models.md": models()}
    pages |= {f"reference/{room}.md": reference(room) for room in _ROOMS}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script; code stays as it is."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    for number in range(0, len(parts), 2):
        text = re.sub(
            r"\$\$(.+?)\$\$",
            lambda m: f"<p>{convert(m[1].strip(), display='block')}</p>",
            parts[number],
            flags=re.DOTALL,
        )
        parts[number] = re.sub(r"(?<!\$)\$([^$\n](?:[^$]*?[^$\s])?)\$", lambda m: convert(m[1]), text)
    return "".join(parts)


def policies() -> str:
    """Return the page of policies: their parts, and what the docstrings of the parts say."""
    from suffice.kv.policy.registry import policies as named

    lines = ["# Each policy", "A policy is weights × directions × estimator; the parts say what they compute."]
    for policy in named().values():
        parts = policy.describe()
        lines.append(f"## {policy.name}")
        if parts.get("paper"):
            lines.append(f"[arXiv {parts['paper']}](https://arxiv.org/abs/{parts['paper']})")
        lines.append(
            "| part | |\n|---|---|\n"
            + "\n".join(f"| {k} | `{v}` |" for k, v in parts.items() if k not in ("name", "paper"))
        )
        for part in (policy.weights, policy.directions, policy.estimator):
            lines += [f"`{type(one).__name__}`: {_first(one)}" for one in _flat(part)]
        lines.append(
            f"```python\nfrom suffice.kv import CompressedCache\n\ncache = CompressedCache(model, policy={policy.name!r}, budget=0.25)\n```"
        )
    return "\n\n".join(lines)


def models() -> str:
    """Return the page of link predictors: what their docstrings say, and where they are."""
    from suffice.link.models import decoders, encoders
    from suffice.link.models import models as registered

    lines = ["# Each model", "An option of every command of `suffice link` (`--model`, `--encoder`, `--decoder`)."]
    for title, names in (("Encoders", encoders()), ("Decoders", decoders())):
        lines.append(f"## {title}")
        lines += [f"### {name}\n\n{_whole(kind)}" for name, kind in names.items()]
    lines.append("## Models")
    for name, settings in registered().items():
        about = " ".join((sys.modules[settings.__module__].__doc__ or "").split())
        lines.append(f"### {name}\n\n{about}\n\n`{settings.__module__}.{settings.__name__}`")
    return "\n\n".join(lines)


def reference(room: str) -> str:
    """Return the page of a room: every public module that says something of itself."""
    lines = [f"# suffice.{room}"]
    for file in sorted((_SOURCE / room).rglob("*.py")):
        module = ".".join(("suffice", *file.relative_to(_SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        public = [
            n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
        ]
        if any(not node.name.startswith("_") for node in public) and not file.stem.startswith("_"):
            lines.append(f"::: {module}")
    return "\n\n".join(lines)


def _flat(part: Any) -> list[Any]:
    inner = [getattr(part, name) for name in getattr(part, "__dataclass_fields__", ())]
    nested = [
        one
        for value in inner
        for one in (value if isinstance(value, tuple) else (value,))
        if hasattr(one, "__dataclass_fields__")
    ]
    return [part, *(one for found in nested for one in _flat(found))]


def _first(part: Any) -> str:
    return (type(part).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _whole(kind: Any) -> str:
    text = (kind.__doc__ or "").strip().split("Args:")[0]
    return " ".join(text.split()) + f"\n\n`{kind.__module__}.{kind.__name__}`"
