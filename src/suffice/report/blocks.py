"""The blocks of a page: paragraphs, code, tables, figures, and texts with shaded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure as MatplotlibFigure

from suffice.report.style import to_svg


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """Preformatted text, such as a command, a prompt or an answer."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """A table that readers can sort by any column; the first column names the rows.

    Args:
        columns: headers.
        rows: cells of each row.
        caption: text below the table.

    Raises:
        ValueError: a row does not have one cell for each column.

    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{number}] must have {len(self.columns)} cells, got {len(row)}")


@dataclass(frozen=True)
class Figure:
    """A figure, shown as SVG.

    Args:
        figure: the matplotlib figure.
        caption: text below the figure.
        alt: description for screen readers.
        numbers: table of the numbers that are drawn.

    """

    figure: MatplotlibFigure
    caption: str
    alt: str
    numbers: Table | None = None
    kind: ClassVar[str] = "figure"

    @property
    def svg(self) -> Markup:
        """SVG element of the figure, marked as safe because matplotlib escapes its text."""
        return Markup(to_svg(self.figure))


@dataclass(frozen=True)
class KeptText:
    """A text whose tokens are shaded by the fraction of heads that kept them.

    Args:
        pieces: text of each token.
        shares: fraction of layers and heads that kept each token, 0 to 1.
        caption: text below the tokens.

    Raises:
        ValueError: there is not one share from 0 to 1 for each piece.

    """

    pieces: Sequence[str]
    shares: Sequence[float]
    caption: str
    kind: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.shares):
            raise ValueError(
                f"shares must hold one value for each of {len(self.pieces)} pieces, got {len(self.shares)}"
            )
        for share in self.shares:
            if not 0 <= share <= 1:
                raise ValueError(f"shares must be from 0 to 1, got {share}")

    @property
    def spans(self) -> list[tuple[int, str]]:
        """Share in tenths and joined text of each span of consecutive tokens whose shares round to the same tenth."""
        spans: list[tuple[int, str]] = []
        for piece, share in zip(self.pieces, self.shares, strict=True):
            level = round(share * 10)
            if spans and spans[-1][0] == level:
                spans[-1] = (level, spans[-1][1] + piece)
            else:
                spans.append((level, piece))
        return spans


Block = Text | Code | Table | Figure | KeptText
