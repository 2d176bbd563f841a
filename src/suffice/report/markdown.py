"""A page as Markdown for a repository, with its figures as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from suffice.report.blocks import Block, Code, Figure, KeptText, Table, Text
from suffice.report.figures import save

_SPECIAL = "\\`*_[]<>|#~"


def write_markdown(path: Path, sections: Sequence[tuple[str, Sequence[Block]]], facts: Mapping[str, str]) -> None:
    """Write a page as Markdown.

    Args:
        path: of the Markdown file; figures go to a folder of its name beside it.
        sections: headings and blocks.
        facts: `title`, `lead`, `command`, `made`, `versions`.

    """
    parts = [f"# {escape(facts['title'])}", escape(facts["lead"])]
    number = 0
    for heading, blocks in sections:
        parts.append(f"## {escape(heading)}")
        for block in blocks:
            if isinstance(block, Figure):
                number += 1
                picture = path.with_suffix("") / f"{number}.svg"
                picture.parent.mkdir(parents=True, exist_ok=True)
                save(block.figure, str(picture))
                place = f"{picture.parent.name}/{picture.name}".replace(" ", "%20")
                parts.append(f"![{escape(block.alt)}]({place})\n\n*{escape(block.caption)}*")
                parts += [_table(block.numbers)] if block.numbers is not None else []
            else:
                parts.append(_block(block))
    made = f"Made {facts['made']} with {escape(facts['versions'])} by"
    parts.append(f"---\n\n{made}\n\n{_code(facts['command'])}")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def escape(text: object) -> str:
    """Return text that Markdown shows as it is."""
    marked = "".join(f"\\{sign}" if sign in _SPECIAL else sign for sign in str(text))
    return " ".join(marked.split())


def _block(block: Text | Code | Table | KeptText) -> str:
    if isinstance(block, Text):
        return escape(block.text)
    if isinstance(block, Code):
        return _code(block.text)
    if isinstance(block, Table):
        return _table(block)
    kept = "".join(escape_inner(text) if level >= 5 else "·" for level, text in block.spans)
    return f"*{escape(block.caption)} Tokens that fewer than half of the heads kept are a dot.*\n\n> {kept}"


def escape_inner(text: str) -> str:
    """Return text that Markdown shows as it is, its outer spaces kept."""
    lead = " " if text[:1].isspace() else ""
    tail = " " if text[-1:].isspace() else ""
    return lead + escape(text) + tail


def _code(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _table(table: Table) -> str:
    lines = [map(escape, table.columns), ["---"] * len(table.columns), *(map(escape, row) for row in table.rows)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n*{escape(table.caption)}*" if table.caption else rows
