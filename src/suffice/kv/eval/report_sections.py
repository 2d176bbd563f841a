"""HTML pages and figures of answers and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as MatplotlibFigure

from suffice.kv.cache.report import CacheReport, describe_quantization
from suffice.kv.eval.answer import Answer
from suffice.kv.eval.cache_grid import describe_size, format_size, repair_suffix
from suffice.kv.eval.cache_scores import cache_scores, main_result, samples_warning
from suffice.kv.eval.compare import Comparison, Condition, metric_interval
from suffice.kv.eval.tuning_result import TuningResult
from suffice.kv.storage.quantization import bits_suffix, format_bits
from suffice.report import Code, Figure, KeptText, LinePoint, Page, Result, Table, Text, line_plot
from suffice.study.results import group_records
from suffice.study.run_key import canonical_json
from suffice.study.store import Record


def answer_page(answer: Answer, report: CacheReport, command: str) -> Page:
    """Return the page of an answer: its text, the prompt tokens that were kept, and the entries kept by each head."""
    page = Page(
        title="An answer from a compressed cache",
        summary=f"{report}{bits_suffix(answer.bits)}{repair_suffix(answer.repair)}",
        command=command,
    )
    news: list[Result] = []
    if answer.differs is not None:
        word, tone = ("Another answer.", "warning") if answer.differs else ("The same answer.", "good")
        news = [Result(word, answer.comparison(), tone=tone)]
    page.add("Answer", *news, *_answer_blocks(answer.answer, answer.is_complete))
    if answer.full_answer is not None:
        page.add("Answer of the full cache", *_answer_blocks(answer.full_answer, bool(answer.full_is_complete)))
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
            caption="A cell is a head of a layer. Yellow cells have the largest numbers, dark blue cells the smallest: "
            "above, the number of entries kept; below, if it was measured, the share of the capacity that they carry.",
            alt="Heat maps of the entries kept; rows are layers, columns are heads.",
            numbers=numbers,
        ),
    )
    page.add("Bytes kept by layer", _bytes_by_layer(report))
    # At the end, because the whole prompt is shown, whatever its length.
    texts, shares = zip(*answer.token_shares, strict=True)
    settings = f"{answer.policy}, {describe_size(answer.budget, answer.bits, answer.memory, answer.repair)}"
    caption = f"The whole prompt under {settings}. The stronger the shade of a token, the more heads kept it."
    page.add("Tokens of the prompt that were kept", KeptText(texts, shares, caption, answer.question_start))
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
    samples = comparison.settings["samples"]
    page = Page(
        title="Which cache answers right at which bytes",
        summary=f"{len(comparison.methods)} methods under {len(comparison.conditions)} conditions, with {samples} "
        f"sample{'s' * (samples != 1)} each.",
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
    """Add the sections of a comparison to a page; which cache answers right at which bytes comes first."""
    _add_main_result(page, comparison)
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


def _add_main_result(page: Page, comparison: Comparison) -> None:
    scores = cache_scores(comparison)
    ranks = comparison.mean_ranks()
    best, rank = next(iter(ranks.items()))
    points = [
        ("Closest to the full cache", f"{best}, with a mean rank of {rank:.1f} among {len(ranks)} methods by KL.")
    ]
    if warning := samples_warning(comparison):
        points.append(("Few samples", warning))
    has_answer = any(score.is_as_good for score in scores)
    word = "Found." if has_answer else "No." if scores[0].score is not None else "Closest."
    tone = "warning" if warning or not has_answer else "good"
    columns = ["cache", "bytes kept", "answers right", "full cache", "KL"]
    rows = [
        [
            score.name,
            f"{score.share_of_bytes:.1%}",
            "" if score.score is None else f"{score.score:.0%}",
            "" if score.full_score is None else f"{score.full_score:.0%}",
            f"{score.kl:.3f}",
        ]
        for score in scores
    ]
    caption = (
        "From the fewest bytes to the most. Answers right: share of the references that the answers contain. KL: "
        "divergence from the full cache, nats per token. All are means over the tasks."
    )
    page.add(
        "Which cache answers right?",
        Result(word, main_result(comparison), points, tone),
        Table(columns, rows, caption),
    )


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
            kl = metric_interval(comparison.group(method, condition), "kl")
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


def tuning_page(result: TuningResult, command: str) -> Page:
    """Return the page of `tune`: the recommended cache and its program, a row for each policy, and all trials."""
    page = Page(
        title="The smallest cache that is close enough",
        summary=f"Caches on {result.num_prompts} of your prompts, at a target of {result.describe_target()}.",
        command=command,
    )
    points = [("Few prompts", result.warning())] if result.warning() else []
    word, tone = ("No cache.", "bad") if result.best is None else ("Found.", "warning" if points else "good")
    blocks = [] if result.best is None else [Code(result.code())]
    page.add("Recommended cache", Result(word, result.verdict(), points, tone), *blocks)
    page.add("The smallest safe cache of each policy", Table(*result.policy_rows(), caption=result.explain_columns()))
    page.add("All caches that were tried", Table(*result.trial_rows()))
    return page


def _add_kl(page: Page, comparison: Comparison) -> None:
    rows = [
        [
            method,
            *(str(metric_interval(comparison.group(method, condition), "kl")) for condition in comparison.conditions),
            f"{rank:.2f}",
        ]
        for method, rank in comparison.mean_ranks().items()
    ]
    caption = f"Nats per token, mean and 95 % bootstrap interval of {comparison.settings['samples']} samples."
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
        [method, *(str(metric_interval(comparison.group(method, condition), "score")) for condition in scored)]
        for method in comparison.methods
    ]
    rows.append(["full cache", *(str(metric_interval(group, "full_score")) for group in groups)])
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
