"""Pages and figures of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as MatplotlibFigure

from suffice.kv.cache.report import CacheReport
from suffice.kv.eval.answer import Answer
from suffice.kv.eval.compare import Comparison
from suffice.report import Figure, KeptText, LinePoint, Page, Table, Text, line_plot
from suffice.study.keys import canonical_json
from suffice.study.results import group_records
from suffice.study.store import Record


def answer_page(found: Answer, report: CacheReport, command: str) -> Page:
    """Return the page of one answer: what was said, which words of the prompt survived, what each head kept."""
    page = Page(title="An answer from a part of the cache", summary=str(report), command=command)
    page.add("Answer", Text(found.answer or "(nothing)"))
    pieces, shares = zip(*found.kept, strict=True)
    caption = f"The prompt under {found.policy}, budget {found.budget:g}: the darker, the more heads kept it."
    page.add("What was kept of the prompt", KeptText(pieces, shares, caption))
    layers = sorted({head.layer for head in report.heads})
    heads = sorted({head.head for head in report.heads})
    kept = {(head.layer, head.head): head.tokens_kept for head in report.heads}
    numbers = Table(
        ["layer", *(f"head {head}" for head in heads)],
        [[str(layer), *(kept[layer, head] for head in heads)] for layer in layers],
        f"Entries kept of {report.tokens_seen}, the answer's included.",
    )
    page.add(
        "Budget by layer and head",
        Figure(
            report.figure(),
            caption="Entries kept and share of the capacity retained, by layer and head.",
            alt="Maps of entries kept, layers from top to bottom, heads from left to right.",
            numbers=numbers,
        ),
    )
    return page


def comparison_page(found: Comparison, command: str) -> Page:
    """Return the page of a comparison: ranks, every cell, trade-off curves, capacity, scores, differences."""
    best = next(iter(found.ranks()))
    samples = found.settings["samples"]
    page = Page(
        title="How close parts of the cache stay to the whole",
        summary=f"Best mean rank of {len(found.contestants)}: {best}, over {len(found.cells)} cells of {samples} "
        "samples.",
        command=command,
    )
    add_comparison(page, found)
    return page


def add_records(page: Page, records: Sequence[Record], folder: Path) -> None:
    """Add finished runs of the kind `kv.compare`, of which those that differ in their tasks alone belong together.

    Args:
        page: of the report.
        records: finished runs.
        folder: of the store; not needed here.

    """
    together: dict[str, list[Record]] = {}
    for record in records:
        shared = {name: value for name, value in record.settings.items() if name not in ("task", "mode")}
        together.setdefault(canonical_json(shared), []).append(record)
    for own in together.values():
        seeds: dict[tuple[str, str], set[int]] = {}
        for record in own:
            seeds.setdefault((record.settings["task"], record.settings["mode"]), set()).add(record.seed)
        whole = set.intersection(*seeds.values())
        if not whole:
            page.add("Caches", Text("Runs are still missing: there is no seed that every task has."))
            continue
        groups = group_records(record for record in own if record.seed in whole)
        add_comparison(page, Comparison({**own[0].settings, "samples": len(whole)}, groups))


def add_comparison(page: Page, found: Comparison) -> None:
    """Add the sections of a comparison to a page."""
    best = next(iter(found.ranks()))
    samples = found.settings["samples"]
    columns = [f"{task} {mode} {_budget(budget)}" for task, mode, budget in found.cells]
    rows = [
        [name, *(str(found.find(name, cell).interval("kl")) for cell in found.cells), f"{rank:.2f}"]
        for name, rank in found.ranks().items()
    ]
    page.add(
        "KL to the full cache",
        Table(["policy", *columns, "mean rank"], rows, f"Nats a token, mean and 95 % t interval of {samples} samples."),
    )
    for task, mode in dict.fromkeys((task, mode) for task, mode, _ in found.cells):
        page.add(
            f"Fidelity against bytes: {task}, {mode}",
            Figure(
                trade_off(found, task, mode),
                caption="KL to the full cache against the share of its bytes that is kept; lower left is better.",
                alt=f"KL against bytes kept, one line for each policy, on {task}, {mode}.",
            ),
        )
    scored = [cell for cell in found.cells if "score" in found.find(best, cell).values]
    if scored:
        rows = [
            [name, *(str(found.find(name, cell).interval("score")) for cell in scored)] for name in found.contestants
        ]
        rows.append(["full cache", *(str(found.find(best, cell).interval("full_score")) for cell in scored)])
        rows.append(["chance", *(f"{found.find(best, cell).interval('chance').mean:.3f}" for cell in scored)])
        columns = [f"{task} {mode} {_budget(budget)}" for task, mode, budget in scored]
        page.add("Score of the answers", Table(["policy", *columns], rows, "Share of what a right answer holds."))
    capacity = [
        [row["task"], row["mode"], _budget(row["budget"]), f"{row['spearman']:+.2f}"] for row in found.capacity()
    ]
    if capacity:
        page.add(
            "Capacity and fidelity",
            Table(["task", "mode", "budget", "Spearman"], capacity, "Capacity kept against KL, over caches."),
        )
    rows = [
        [
            f"{row['of']} − {row['minus']}",
            row["task"],
            row["mode"],
            _budget(row["budget"]),
            f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
        ]
        for row in found.against(best)
    ]
    if rows:
        page.add(
            "Paired differences of KL",
            Table(["of", "task", "mode", "budget", "difference"], rows, "Sample by sample, 95 % t interval."),
        )


def trade_off(found: Comparison, task: str | None = None, mode: str | None = None) -> MatplotlibFigure:
    """Draw KL against the share of bytes kept, a line for each contestant; without a task, of the first."""
    if task is None or mode is None:
        task, mode, _ = found.cells[0]
    cells = [cell for cell in found.cells if cell[:2] == (task, mode)]
    series: dict[str, list[LinePoint]] = {}
    for name in found.contestants:
        points: list[LinePoint] = []
        for cell in cells:
            one = found.find(name, cell)
            share = one.interval("bytes_kept").mean / one.interval("bytes_full").mean
            kl = one.interval("kl")
            points.append(LinePoint(share, kl.mean, kl.low, kl.high))
        series[name] = sorted(points, key=lambda point: point.x)
    return line_plot(
        series,
        x_label="bytes of the cache kept",
        y_label="KL to the full cache, nats a token",
        title=f"{task}, {mode}",
        percent_x=True,
    )


def _budget(budget: float) -> str:
    return f"{budget:.0%}" if isinstance(budget, float) else str(budget)
