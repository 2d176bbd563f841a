"""One self-contained HTML page: text, tables and figures, with nothing loaded from elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure as MatplotlibFigure

from retain.report.figures import to_svg

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("retain.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Preformatted text: a command, a prompt, an answer."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, numbers stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    kind: str = "table"

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{number}] has {len(row)} cells; accepted: {len(self.columns)}")


@dataclass(frozen=True)
class Figure:
    """A figure drawn as SVG, with a description for those who don't see it."""

    figure: MatplotlibFigure
    caption: str
    alt: str
    kind: str = "figure"

    @property
    def svg(self) -> Markup:
        """The figure's own markup; our drawing code made it, so it is not escaped again."""
        return Markup(to_svg(self.figure))


Block = Text | Code | Table | Figure


@dataclass
class Page:
    """A page under construction.

    Args:
        title: what the page is about.
        lead: one or two sentences on what it found.
        command: the command that makes this page again.

    Example:
        >>> page = Page(title="Two heads", lead="One keeps more.", command="retain demo")
        >>> page.add("Numbers", Table(["head", "kept"], [["0", 12], ["1", 30]]))
        >>> "<td>30</td>" in page.html()
        True

    """

    title: str
    lead: str
    command: str
    sections: list[tuple[str, tuple[Block, ...]]] = field(default_factory=list)

    def add(self, heading: str, *blocks: Block) -> None:
        """Add a section."""
        self.sections.append((heading, blocks))

    def html(self) -> str:
        """Return the page."""
        return _ENVIRONMENT.get_template("page.html").render(
            page=self, versions=versions(), made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, its folder made if it is missing, and return the path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.html(), encoding="utf-8")
        return target


def versions() -> str:
    """Return what the numbers were made with: versions of the packages, Python and the machine's kind."""
    found = [f"Python {platform.python_version()}", platform.machine()]
    for package in ("retain", "torch", "transformers", "torch-geometric"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
