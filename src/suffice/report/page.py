"""Pages: self-contained HTML that loads nothing from elsewhere, or Markdown."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import jinja2
from markupsafe import Markup

from suffice.environment import describe_environment, format_environment
from suffice.files import PAGE_SUFFIXES, check_suffix
from suffice.report.blocks import Block
from suffice.report.markdown import write_markdown

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("suffice.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_SCRIPT = (Path(__file__).parent / "templates" / "sort.js").read_text(encoding="utf-8")
# The content security policy of the page allows only the script with this digest.
_SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()


@dataclass
class Page:
    """A page of sections.

    Args:
        title: what the page is about.
        summary: one or two sentences on the result.
        command: the command that generates this page.
        made_with: software and machine with which the results were computed; by default, those of this process.
        sections: heading and blocks of each section.

    Example:
        >>> from suffice.report import Table
        >>> page = Page(title="Two heads", summary="One keeps more.", command="suffice demo")
        >>> page.add("Numbers", Table(["head", "kept"], [["0", 12], ["1", 30]]))
        >>> "<td>30</td>" in page.to_html()
        True

    """

    title: str
    summary: str
    command: str
    made_with: str = ""
    sections: list[tuple[str, tuple[Block, ...]]] = field(default_factory=list)

    def add(self, heading: str, *blocks: Block) -> None:
        """Add a section.

        Args:
            heading: heading of the section.
            blocks: its paragraphs, tables, figures and so on.

        """
        self.sections.append((heading, blocks))

    def to_html(self) -> str:
        """Return the page as HTML."""
        return _ENVIRONMENT.get_template("page.html").render(
            page=self, made=_now(), made_with=self._made_with(), script=Markup(_SCRIPT), script_digest=_SCRIPT_DIGEST
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file and return its path.

        Args:
            path: the file; its folder is created if it is missing. Markdown is written if the file ends in `.md`, with
                the figures as SVG files in a folder beside it; HTML if it ends in `.html` or `.htm`.

        Raises:
            ValueError: the file has another suffix.

        """
        path = Path(path)
        check_suffix(path, PAGE_SUFFIXES)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".md":
            footer = f"Made {_now()} with {self._made_with()} by"
            write_markdown(path, self.title, self.summary, self.sections, footer, self.command)
        else:
            path.write_text(self.to_html(), encoding="utf-8")
        return path

    def _made_with(self) -> str:
        return self.made_with or format_environment(describe_environment())


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
