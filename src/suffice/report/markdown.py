"""Pages as Markdown files, with their figures as SVG files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from suffice.report.blocks import Block, Code, Figure, KeptText, Result, Table, Text
from suffice.report.style import save_figure

_SPECIAL_CHARACTERS = "\\`*_[]<>|#~"


def write_markdown(
    path: Path, title: str, summary: str, sections: Sequence[tuple[str, Sequence[Block]]], footer: str, command: str
) -> None:
    """Write a page as a Markdown file.

    Args:
        path: the file; figures are written to a folder of the same name without suffix.
        title: title of the page.
        summary: first paragraph.
        sections: heading and blocks of each section.
        footer: text below the sections, before the command.
        command: the command that generates the page.

    """
    folder = path.with_suffix("")
    parts = [f"# {escape(title)}", escape(summary)]
    num_figures = 0
    for heading, blocks in sections:
        parts.append(f"## {escape(heading)}")
        for block in blocks:
            if isinstance(block, Figure):
                num_figures += 1
                parts.append(_figure(block, folder / f"{num_figures}.svg"))
            else:
                parts.append(_block(block))
    parts.append(f"---\n\n{escape(footer)}\n\n{_code_block(command)}")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def escape(text: object) -> str:
    """Return text with all special characters of Markdown escaped and its whitespace collapsed."""
    escaped = "".join(f"\\{character}" if character in _SPECIAL_CHARACTERS else character for character in str(text))
    return " ".join(escaped.split())


def _figure(block: Figure, file: Path) -> str:
    """Write a figure to a file, and return its image, its caption and the table of its numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(block.figure, file)
    link = f"{file.parent.name}/{file.name}".replace(" ", "%20")
    image = f"![{escape(block.alt)}]({link})\n\n*{escape(block.caption)}*"
    return image if block.numbers is None else f"{image}\n\n{_table(block.numbers)}"


def _block(block: Text | Result | Code | Table | KeptText) -> str:
    if isinstance(block, Text):
        return escape(block.text)
    if isinstance(block, Result):
        points = "\n".join(f"* **{escape(label)}:** {escape(text)}" for label, text in block.points)
        return f"**{escape(block.word)}** {escape(block.sentence)}" + (f"\n\n{points}" if points else "")
    if isinstance(block, Code):
        return _code_block(block.text)
    if isinstance(block, Table):
        return _table(block)
    parts = [
        (f"**{escape(block.marked_as)}:** " if is_marked else "")
        + "".join(_escape_span(text) if level >= 5 else "·" for level, text in spans)
        for is_marked, spans in block.parts
    ]
    kept = "\n>\n> ".join(parts)
    return f"*{escape(block.caption)} Tokens that fewer than half of the heads kept are shown as a dot.*\n\n> {kept}"


def _escape_span(text: str) -> str:
    """Return escaped text with a leading and a trailing space where it had whitespace."""
    lead = " " if text[:1].isspace() else ""
    tail = " " if text[-1:].isspace() else ""
    return lead + escape(text) + tail


def _code_block(text: str) -> str:
    """Return text as a fenced code block."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _table(table: Table) -> str:
    lines = [map(escape, table.columns), ["---"] * len(table.columns), *(map(escape, row) for row in table.rows)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n*{escape(table.caption)}*" if table.caption else rows
