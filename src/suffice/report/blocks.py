"""What a page is made of: text, code, tables, figures, and a text of which parts were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure as MatplotlibFigure

from suffice.report.figures import to_svg


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
    """A table; the first column names the row, numbers stand to the right. A reader may sort it by any column."""

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
    """A figure drawn as SVG, with a description for those who don't see it and a table of its numbers."""

    figure: MatplotlibFigure
    caption: str
    alt: str
    numbers: Table | None = None
    kind: str = "figure"

    @property
    def svg(self) -> Markup:
        """The figure's own markup; our drawing code made it, so it is not escaped again."""
        return Markup(to_svg(self.figure))


@dataclass(frozen=True)
class KeptText:
    """A text whose tokens are shaded by the share of heads that kept them.

    Args:
        pieces: the text of each token.
        shares: the share of layers and heads that kept it, 0 to 1.
        caption: what was kept, and by what.

    Raises:
        ValueError: there is not one share, from 0 to 1, for each piece.

    """

    pieces: Sequence[str]
    shares: Sequence[float]
    caption: str
    kind: str = "kept"

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.shares) or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(
                f"pieces, shares hold {len(self.pieces)}, {len(self.shares)} values; accepted: as many shares, 0 to 1"
            )

    @property
    def spans(self) -> list[tuple[int, str]]:
        """Runs of tokens of the same tenth of shares, and their text."""
        found: list[tuple[int, str]] = []
        for piece, share in zip(self.pieces, self.shares, strict=True):
            level = round(share * 10)
            if found and found[-1][0] == level:
                found[-1] = (level, found[-1][1] + piece)
            else:
                found.append((level, piece))
        return found


Block = Text | Code | Table | Figure | KeptText
