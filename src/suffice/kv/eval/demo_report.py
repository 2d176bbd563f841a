"""The result of the demonstration as text, as a table, as a figure and as sections of an HTML page."""

from __future__ import annotations

from matplotlib.figure import Figure as MatplotlibFigure

from suffice.kv.eval.demo import DemoResult, DemoRow
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.report import Code, Figure, LinePoint, Page, Table, Text, line_plot

MODES = {
    "agnostic": "agnostic: evicted before the question is seen",
    "aware": "aware: evicted after the question is seen",
}
"""Titles of the modes of eviction."""

COLUMNS = ("policy", "budget", "correct", "KL", "MB", "capacity", "seconds")
COLUMNS_EXPLAINED = (
    "Correct: answers that contain the value. KL: divergence from the full cache, nats per answer token. "
    "MB, capacity: bytes kept and share of the capacity retained. Seconds: time for scoring, eviction and measuring "
    "the capacity."
)


def demo_table(result: DemoResult, mode: str) -> list[list[str]]:
    """Return a row of text for each cache in one mode of eviction, with the columns `COLUMNS`."""
    return [
        [
            row.policy,
            f"{row.budget:.0%}",
            f"{sum(row.correct)} of {len(row.correct)}",
            f"{row.mean_kl:.3f}",
            f"{row.bytes_kept / 1e6:.1f}",
            f"{row.capacity_retained or 0:.1%}",
            f"{row.seconds:.2f}",
        ]
        for row in _rows(result, mode)
    ]


def describe_results(result: DemoResult) -> list[str]:
    """Return sentences about the result, which also say where another policy is closer than the default."""
    lines: list[str] = []
    for mode in MODES:
        full, *rows = _rows(result, mode)
        lines.append(
            f"{mode}: the full cache answers {sum(full.correct)} of {len(full.correct)} questions correctly "
            f"and holds {full.bytes_kept / 1e6:.1f} MB."
        )
        for budget in sorted({row.budget for row in rows}, reverse=True):
            ranked = sorted((row for row in rows if row.budget == budget), key=lambda row: row.mean_kl)
            own = next((row for row in ranked if row.policy == DEFAULT_POLICY), None)
            best = ranked[0]
            if own is None:
                continue
            if own is best:
                rank = f"the closest to the full cache; next is {ranked[1].policy} at {ranked[1].mean_kl:.3f}"
            else:
                rank = f"rank {ranked.index(own) + 1} of {len(ranked)}; {best.policy} is closer at {best.mean_kl:.3f}"
            lines.append(
                f"{mode} at {budget:.0%}: {own.policy} answers {sum(own.correct)} of {len(own.correct)} correctly "
                f"with KL {own.mean_kl:.3f}, {rank}."
            )
    lines.append(f"{len(result.examples)} questions about one document are too few to rank similar policies.")
    return lines


def plot_demo(result: DemoResult, mode: str) -> MatplotlibFigure:
    """Draw the KL divergence from the full cache against the budget, one line for each policy."""
    rows = _rows(result, mode)[1:]
    series = {
        policy: [LinePoint(row.budget, row.mean_kl) for row in rows if row.policy == policy]
        for policy in dict.fromkeys(row.policy for row in rows)
    }
    return line_plot(
        series,
        title=MODES[mode],
        x_label="budget, share of the prompt's tokens",
        y_label="KL to the full cache, nats/token",
        percent_x=True,
    )


def add_demo(page: Page, result: DemoResult) -> None:
    """Add the sections of the demonstration to a page."""
    sentences = [Text(sentence) for sentence in describe_results(result)]
    page.add(f"KV cache: questions about a document of {result.tokens} tokens", *sentences)
    for mode, title in MODES.items():
        caption = "Lower is closer to the full cache. Mean over the questions, on the tokens of the right answer."
        page.add(
            title,
            Figure(plot_demo(result, mode), caption, "KL divergence against budget, one line for each policy"),
            Table(COLUMNS, demo_table(result, mode), COLUMNS_EXPLAINED),
        )
    budget = min(row.budget for row in result.rows)
    page.add(
        f"Entries kept by {result.document_report.policy}, by layer and head",
        Figure(
            result.document_report.figure(),
            f"At a budget of {budget:.0%} of the document, split over the heads by the policy's allocation.",
            "Entries kept and share of the capacity retained, by layer and KV head",
        ),
    )
    for index, example in enumerate(result.examples):
        answers = [[row.policy, f"{row.budget:.0%}", row.mode, row.answers[index]] for row in result.rows]
        table = Table(["policy", "budget", "mode", "answer"], answers)
        page.add(example.question or "", Code(example.answer), table)


def _rows(result: DemoResult, mode: str) -> list[DemoRow]:
    return [row for row in result.rows if row.mode == mode]
