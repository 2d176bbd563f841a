"""HTML pages and figures of answers and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as MatplotlibFigure

from suffice.kv.cache.report import CacheReport, describe_quantization
from suffice.kv.eval.answer import Answer
from suffice.kv.eval.cache_grid import describe_size, format_size, repair_suffix
from suffice.kv.eval.compare import Comparison, Condition
from suffice.kv.storage.quantization import bits_suffix, format_bits
from suffice.report import Figure, KeptText, LinePoint, Page, Table, Text, line_plot
from suffice.study.results import group_records
from suffice.study.run_key import canonical_json
from suffice.study.store import Record


def answer_page(answer: Answer, report: CacheReport, command: str) -> Page:
    """Return the page of an answer: its text, the prompt tokens that were kept, and the entries kept by each head."""
    size = f"{report}{bits_suffix(answer.bits)}{repair_suffix(answer.repair)}"
    page = Page(
        title="An answer from a compressed cache",
        summary=f"{answer.comparison()} {size}".strip(),
        command=command,
    )
    page.add("Answer", *_answer_blocks(answer.answer, answer.is_complete))
    if answer.full_answer is not None:
        page.add("Answer of the full cache", *_answer_blocks(answer.full_answer, bool(answer.full_is_complete)))
    texts, shares = zip(*answer.token_shares, strict=True)
    settings = f"{answer.policy}, {describe_size(answer.budget, answer.bits, answer.memory, answer.repair)}"
    caption = f"The prompt under {settings}. Darker tokens were kept by more heads."
    page.add("Tokens of the prompt that were kept", KeptText(texts, shares, caption))
    layers = sorted({head.layer for head in report.heads})
    heads = sorted({head.head for head in report.heads})
    kept = {(head.layer, head.head): head.tokens_kept for head in report.heads}
    numbers = Table(
        ["layer", *(f"head {head}" for head in heads)],
        [[str(layer), *(kept[layer, head] for head in heads)] for layer in layers],
        f"Number of entries kept out of {report.tokens_seen}, including those of the answer.",
    )
    page.add(
        "Entries kept by layer and head",
        Figure(
            report.figure(),
            caption="Entries kept and share of the capacity retained, by layer and head.",
            alt="Heat maps of the entries kept; rows are layers, columns are heads.",
            numbers=numbers,
        ),
    )
    page.add("Bytes kept by layer", _bytes_by_layer(report))
    return page


def _answer_blocks(answer: str, is_complete: bool) -> list[Text]:
    """Return the text of an answer and, if it stopped at the limit, a sentence that says so."""
    stopped = Text("The answer stopped at the maximum number of new tokens.")
    return [Text(answer or "(empty)"), *(() if is_complete else (stopped,))]


def _bytes_by_layer(report: CacheReport) -> Table:
    """Return a table of the bytes of each layer and, if entries are quantized, of their bits and errors."""
    is_quantized = any(head.bits is not None for head in report.heads)
    rows: list[list[str]] = []
    for layer in sorted({head.layer for head in report.heads}):
        heads = [head for head in report.heads if head.layer == layer]
        kept, full = sum(head.bytes_kept for head in heads), sum(head.bytes_full for head in heads)
        row = [str(layer), f"{kept:,}", f"{full:,}", f"{kept / full:.1%}"]
        rows.append([*row, *describe_quantization(heads)] if is_quantized else row)
    headers = ["layer", "bytes kept", "bytes of a full cache", "share"]
    if not is_quantized:
        return Table(headers, rows)
    caption = "Bits of keys and values, and the largest relative errors of the quantized keys and values of a head."
    return Table([*headers, "bits", "key error", "value error"], rows, caption)


def comparison_page(comparison: Comparison, command: str) -> Page:
    """Return the page of a comparison: ranks, KL, trade-off curves, scores, capacity and paired differences."""
    best = next(iter(comparison.mean_ranks()))
    page = Page(
        title="How close compressed caches stay to the full cache",
        summary=f"{best} has the best mean rank of {len(comparison.methods)} methods, over "
        f"{len(comparison.conditions)} conditions with {comparison.settings['samples']} samples each.",
        command=command,
    )
    add_comparison(page, comparison)
    return page


def add_records(page: Page, records: Sequence[Record], folder: Path) -> None:
    """Add the finished runs of the kind `kv.compare` to a page; runs that differ only in their tasks form one section.

    Args:
        page: the page of the report.
        records: finished runs.
        folder: the folder of the study; not used.

    """
    comparisons: dict[str, list[Record]] = {}
    for record in records:
        shared = {name: value for name, value in record.settings.items() if name not in ("task", "mode")}
        comparisons.setdefault(canonical_json(shared), []).append(record)
    for members in comparisons.values():
        seeds: dict[tuple[str, str], set[int]] = {}
        for record in members:
            seeds.setdefault((record.settings["task"], record.settings["mode"]), set()).add(record.seed)
        common_seeds = set.intersection(*seeds.values())
        if not common_seeds:
            page.add("Caches", Text("Runs are missing: no seed is finished for all tasks."))
            continue
        groups = group_records(record for record in members if record.seed in common_seeds)
        add_comparison(page, Comparison({**members[0].settings, "samples": len(common_seeds)}, groups))


def add_comparison(page: Page, comparison: Comparison) -> None:
    """Add the sections of a comparison to a page."""
    _add_kl(page, comparison)
    _add_bytes(page, comparison)
    for task, mode in dict.fromkeys((condition.task, condition.mode) for condition in comparison.conditions):
        page.add(
            f"Fidelity against bytes: {task}, {mode}",
            Figure(
                plot_trade_off(comparison, task, mode),
                caption="KL to the full cache against the share of its bytes that is kept; lower left is better.",
                alt=f"KL against bytes kept, one line for each method, on {task}, {mode}.",
            ),
        )
    _add_scores(page, comparison)
    _add_capacity(page, comparison)
    _add_differences(page, comparison)


def plot_trade_off(comparison: Comparison, task: str | None = None, mode: str | None = None) -> MatplotlibFigure:
    """Draw KL against the share of bytes kept, one line for each method and number of bits.

    Args:
        comparison: the result of `compare`.
        task: the task to draw.
        mode: its mode of eviction. If either is None, the first task and mode are drawn.

    """
    if task is None or mode is None:
        task, mode = comparison.conditions[0][:2]
    conditions = [condition for condition in comparison.conditions if condition[:2] == (task, mode)]
    series: dict[str, list[LinePoint]] = {}
    for method in comparison.methods:
        for condition in conditions:
            kl = comparison.group(method, condition).interval("kl")
            point = LinePoint(comparison.share_of_bytes(method, condition), kl.mean, kl.low, kl.high)
            name = method if condition.bits is None else f"{method}/{format_bits(condition.bits)} bits"
            series.setdefault(name, []).append(point)
    return line_plot(
        {name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
        x_label="bytes of the cache kept",
        y_label="KL to the full cache, nats per token",
        title=f"{task}, {mode}",
        percent_x=True,
    )


def _add_kl(page: Page, comparison: Comparison) -> None:
    rows = [
        [
            method,
            *(str(comparison.group(method, condition).interval("kl")) for condition in comparison.conditions),
            f"{rank:.2f}",
        ]
        for method, rank in comparison.mean_ranks().items()
    ]
    caption = f"Nats per token, mean and 95 % t interval of {comparison.settings['samples']} samples."
    headers = ["method", *map(_condition_text, comparison.conditions), "mean rank"]
    page.add("KL to the full cache", Table(headers, rows, caption))


def _add_bytes(page: Page, comparison: Comparison) -> None:
    conditions = comparison.conditions
    rows = [
        [method, *(f"{comparison.share_of_bytes(method, condition):.1%}" for condition in conditions)]
        for method in comparison.mean_ranks()
    ]
    caption = "Everything that the cache holds, as a share of the keys and values of the full cache."
    page.add("Bytes kept", Table(["method", *map(_condition_text, conditions)], rows, caption))


def _add_scores(page: Page, comparison: Comparison) -> None:
    best = next(iter(comparison.mean_ranks()))
    scored = [condition for condition in comparison.conditions if "score" in comparison.group(best, condition).values]
    if not scored:
        return
    groups = [comparison.group(best, condition) for condition in scored]
    rows = [
        [method, *(str(comparison.group(method, condition).interval("score")) for condition in scored)]
        for method in comparison.methods
    ]
    rows.append(["full cache", *(str(group.interval("full_score")) for group in groups)])
    rows.append(["chance", *(f"{group.interval('chance').mean:.3f}" for group in groups)])
    caption = "Share of the references that the generated answer contains."
    page.add("Score of the answers", Table(["method", *map(_condition_text, scored)], rows, caption))


def _add_capacity(page: Page, comparison: Comparison) -> None:
    rows = [
        [row["task"], row["mode"], format_size(row["budget"], row["bits"], row["memory"]), f"{row['spearman']:+.2f}"]
        for row in comparison.capacity_correlations()
    ]
    if rows:
        caption = "Spearman's correlation between retained capacity and KL, over methods."
        page.add("Capacity and fidelity", Table(["task", "mode", "budget", "Spearman"], rows, caption))


def _add_differences(page: Page, comparison: Comparison) -> None:
    best = next(iter(comparison.mean_ranks()))
    rows = [
        [
            f"{row['method']} − {row['baseline']}",
            row["task"],
            row["mode"],
            format_size(row["budget"], row["bits"], row["memory"]),
            f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
        ]
        for row in comparison.differences(best)
    ]
    if rows:
        caption = "Paired by sample, with 95 % t interval."
        page.add("Paired differences of KL", Table(["methods", "task", "mode", "budget", "difference"], rows, caption))


def _condition_text(condition: Condition) -> str:
    return f"{condition.task} {condition.mode} {format_size(*condition[2:])}"
