"""The blocks of a page: main results, paragraphs, code, tables, figures, and texts with shaded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure as MatplotlibFigure

from suffice.arguments import check_choice, check_int
from suffice.report.style import to_svg

_LONG_CELL = 24  # characters


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Result:
    """The main result of a page: a bold word, a sentence, and points.

    Args:
        word: the result in a word or two.
        sentence: what it means.
        points: a label and a text for each point, such as what was measured and what to do.
        tone: `good`, `warning`, `bad` or `neutral`, which decides the color of the border.

    Raises:
        ValueError: the tone is another word.

    """

    word: str
    sentence: str
    points: Sequence[tuple[str, str]] = ()
    tone: str = "neutral"
    kind: ClassVar[str] = "result"

    def __post_init__(self) -> None:
        check_choice("tone", self.tone, ("good", "warning", "bad", "neutral"))


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

    def is_text(self, column: int) -> bool:
        """Return whether a column holds sentences, which are aligned on the left, also its short cells."""
        cells = [row[column] for row in self.rows]
        return any(isinstance(cell, str) and len(cell) > _LONG_CELL for cell in cells)


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
        marked_from: index of the first piece of the marked end of the text, such as a question; None marks nothing.
        marked_as: name of the marked end.

    Raises:
        ValueError: there is not one share from 0 to 1 for each piece, or `marked_from` is no index of a piece.

    """

    pieces: Sequence[str]
    shares: Sequence[float]
    caption: str
    marked_from: int | None = None
    marked_as: str = "question"
    kind: ClassVar[str] = "kept"

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.shares):
            raise ValueError(
                f"shares must hold one value for each of {len(self.pieces)} pieces, got {len(self.shares)}"
            )
        for share in self.shares:
            if not 0 <= share <= 1:
                raise ValueError(f"shares must be from 0 to 1, got {share}")
        if self.marked_from is not None:
            check_int("marked_from", self.marked_from, 0, len(self.pieces) - 1)

    @property
    def spans(self) -> list[tuple[int, str]]:
        """Share in tenths and joined text of each span of consecutive tokens whose shares round to the same tenth."""
        return self._spans(0, len(self.pieces))

    @property
    def parts(self) -> list[tuple[bool, list[tuple[int, str]]]]:
        """Whether a part of the text is marked, and its spans: the text before the marked end, and the marked end."""
        start = len(self.pieces) if self.marked_from is None else self.marked_from
        ends = ((False, 0, start), (True, start, len(self.pieces)))
        return [(is_marked, self._spans(first, end)) for is_marked, first, end in ends if first < end]

    def _spans(self, first: int, end: int) -> list[tuple[int, str]]:
        spans: list[tuple[int, str]] = []
        for piece, share in zip(self.pieces[first:end], self.shares[first:end], strict=True):
            level = round(share * 10)
            if spans and spans[-1][0] == level:
                spans[-1] = (level, spans[-1][1] + piece)
            else:
                spans.append((level, piece))
        return spans


Block = Text | Result | Code | Table | Figure | KeptText
