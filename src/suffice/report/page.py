"""One self-contained page: text, tables and figures, with nothing loaded from elsewhere; HTML or Markdown."""

from __future__ import annotations

import base64
import hashlib
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
from markupsafe import Markup

from suffice.report.blocks import Block, Code, Figure, KeptText, Table, Text
from suffice.report.markdown import write_markdown

__all__ = ["Block", "Code", "Figure", "KeptText", "Page", "Table", "Text", "versions"]

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("suffice.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

_SCRIPT = (Path(__file__).parent / "templates" / "sort.js").read_text(encoding="utf-8")
# The page's policy allows this script and no other.
_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()


@dataclass
class Page:
    """A page under construction.

    Args:
        title: what the page is about.
        lead: one or two sentences on what it found.
        command: the command that makes this page again.
        made_with: versions and machine of the numbers, where they were made before the page; else those of now.

    Example:
        >>> page = Page(title="Two heads", lead="One keeps more.", command="suffice demo")
        >>> page.add("Numbers", Table(["head", "kept"], [["0", 12], ["1", 30]]))
        >>> "<td>30</td>" in page.html()
        True

    """

    title: str
    lead: str
    command: str
    made_with: str = ""
    sections: list[tuple[str, tuple[Block, ...]]] = field(default_factory=list)

    def add(self, heading: str, *blocks: Block) -> None:
        """Add a section."""
        self.sections.append((heading, blocks))

    def html(self) -> str:
        """Return the page as HTML."""
        return _ENVIRONMENT.get_template("page.html").render(
            page=self, versions=self.made_with or versions(), made=_now(), script=Markup(_SCRIPT), digest=_DIGEST
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, its folder made if it is missing, and return the path.

        A path that ends in `.md` gets Markdown, its figures as SVG files in a folder beside it.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            facts = {"title": self.title, "lead": self.lead, "command": self.command}
            write_markdown(target, self.sections, {**facts, "made": _now(), "versions": self.made_with or versions()})
        else:
            target.write_text(self.html(), encoding="utf-8")
        return target


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> str:
    """Return what the numbers were made with: versions of the packages, Python and the machine's kind."""
    found = [f"Python {platform.python_version()}", platform.machine()]
    for package in ("suffice", "torch", "transformers", "torch-geometric"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
