"""The demo's first half: what a part of the cache still answers, as tables and as sections of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table as RichTable

from suffice.cli.console import out
from suffice.kv.policy.registry import DEFAULT_POLICY
from suffice.report import Code, Figure, LinePoint, Page, Table, Text, line_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from suffice.kv.eval.demo import Demo, Row

_SETTING = {False: "agnostic: evicted before the question is seen", True: "aware: evicted after the question"}


def show(found: Demo) -> None:
    """Print the tables and what follows from them."""
    for aware in (False, True):
        out.print(_table(found, aware))
    out.print(_COLUMNS_MEAN, highlight=False, style="dim")
    for line in conclusions(found):
        out.print(line, highlight=False)


def _of(found: Demo, aware: bool) -> list[Row]:
    return [row for row in found.rows if row.aware == aware]


def numbers(row: Row) -> dict[str, object]:
    """Return a row as JSON holds it."""
    return {
        "policy": row.policy,
        "budget": row.budget,
        "aware": row.aware,
        "kl": row.kl,
        "correct": row.correct,
        "answers": row.answers,
        "bytes_kept": row.report.bytes_kept,
        "bytes_full": row.report.bytes_full,
        "capacity_retained": row.report.capacity_retained,
        "seconds": row.seconds,
    }


_COLUMNS = ("policy", "budget", "right", "KL", "MB", "capacity", "seconds")


_COLUMNS_MEAN = (
    "Right: answers that hold the value asked for. KL: to the full cache, nats per token of the right answer. MB and "
    "capacity: what is kept. Seconds: to score and evict, the measuring of the capacity included."
)


def _cells(found: Demo, aware: bool) -> list[list[str]]:
    return [
        [
            row.policy,
            f"{row.budget:.0%}",
            f"{sum(row.correct)} of {len(row.correct)}",
            f"{row.mean_kl:.3f}",
            f"{row.report.bytes_kept / 1e6:.1f}",
            f"{row.report.capacity_retained or 0:.1%}",
            f"{row.seconds:.2f}",
        ]
        for row in _of(found, aware)
    ]


def _table(found: Demo, aware: bool) -> RichTable:
    table = RichTable(title=f"{_SETTING[aware]} ({found.tokens} tokens)")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for cells in _cells(found, aware):
        table.add_row(*cells, end_section=cells[0] == "full")
    return table


def conclusions(found: Demo) -> list[str]:
    """Say what happened, in words made from the numbers, also where CapKV loses."""
    lines: list[str] = []
    for aware in (False, True):
        rows = _of(found, aware)
        full = rows[0]
        name = "aware" if aware else "agnostic"
        lines.append(
            f"{name}: the full cache answers {sum(full.correct)} of {len(full.correct)} "
            f"and holds {full.report.bytes_kept / 1e6:.1f} MB."
        )
        for budget in sorted({row.budget for row in rows[1:]}, reverse=True):
            ranked = sorted((row for row in rows[1:] if row.budget == budget), key=lambda row: row.mean_kl)
            own = next((row for row in ranked if row.policy == DEFAULT_POLICY), None)
            best = ranked[0]
            if own is None:
                continue
            if own is best:
                tail = f"the closest to the full cache; next is {ranked[1].policy} at {ranked[1].mean_kl:.3f}"
            else:
                tail = f"number {ranked.index(own) + 1} of {len(ranked)}; {best.policy} is closer at {best.mean_kl:.3f}"
            lines.append(
                f"{name} at {budget:.0%}: {own.policy} answers {sum(own.correct)} of {len(own.correct)} "
                f"with KL {own.mean_kl:.3f}, {tail}."
            )
    lines.append(
        f"{len(found.facts)} questions and one document: enough to look at, not to rank policies that are close."
    )
    return lines


def trade_off(found: Demo, aware: bool) -> MatplotlibFigure:
    """Draw the divergence from the full cache against the budget, one line for each policy."""
    rows = _of(found, aware)[1:]
    series = {
        policy: [LinePoint(row.budget, row.mean_kl) for row in rows if row.policy == policy]
        for policy in dict.fromkeys(row.policy for row in rows)
    }
    return line_plot(
        series,
        title=_SETTING[aware],
        x_label="budget, share of the prompt's tokens",
        y_label="KL to the full cache, nats/token",
        percent_x=True,
    )


def add(page: Page, found: Demo) -> None:
    """Add the sections of this half to a page."""
    page.add(
        f"KV cache: what a part of {found.tokens} tokens still knows", *(Text(line) for line in conclusions(found))
    )
    for aware in (False, True):
        figure = trade_off(found, aware)
        caption = "Lower is closer to the full cache. Mean over the questions, on the tokens of the right answer."
        page.add(
            _SETTING[aware],
            Figure(figure, caption, "KL divergence against budget, one line for each policy"),
            Table(_COLUMNS, _cells(found, aware), _COLUMNS_MEAN),
        )
    quarter = next(row for row in found.rows if row.policy == DEFAULT_POLICY and row.budget < 0.5)
    page.add(
        f"What {quarter.policy} kept, layer by layer",
        Figure(
            quarter.report.figure(),
            f"At a budget of {quarter.budget:.0%}, split over the heads by what each of them reads.",
            "Tokens kept and share of capacity retained by layer and KV head",
        ),
    )
    for number, fact in enumerate(found.facts):
        answers = [
            [row.policy, f"{row.budget:.0%}", "aware" if row.aware else "agnostic", row.answers[number]]
            for row in found.rows
        ]
        page.add(fact.question, Code(fact.sentence), Table(["policy", "budget", "setting", "answer"], answers))
