"""Turn the formulas of a page into MathML, which browsers draw without a script."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.DOTALL)
_BLOCK_FORMULA = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)
_INLINE_FORMULA = re.compile(r"(?<!\$)\$([^$\n](?:[^$]*?[^$\s])?)\$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Convert `$…$` and `$$…$$` outside of code."""
    parts = _CODE.split(markdown)
    parts[::2] = [_convert_formulas(text) for text in parts[::2]]
    return "".join(parts)


def _convert_formulas(text: str) -> str:
    text = _BLOCK_FORMULA.sub(
        lambda match: f'<p class="formula">{convert(match[1].strip(), display="block")}</p>', text
    )
    # Without the span, Markdown would take a formula at the start of a line for a block of its own.
    return _INLINE_FORMULA.sub(lambda match: f"<span>{convert(match[1])}</span>", text)
