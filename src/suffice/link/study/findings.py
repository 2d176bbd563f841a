"""Findings of a reproduction: which claims of arXiv 2604.25978 hold, as sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suffice.link.names import OWN_NORM
from suffice.link.study.published import published_table
from suffice.link.study.results import ArmResults
from suffice.study.results import Interval

METRICS = (
    "hits@100",
    "auc",
    "accuracy_balanced:heldout",
    "a_pure:heldout",
    "tau:heldout",
    "kappa:heldout",
    "edge_trace_ratio",
    "edge_nmi",
    "edge_probe",
    "node_trace_ratio",
    "node_nmi",
    "node_probe",
)
"""Columns of the table of means."""

DIFFERENCE_METRICS = ("hits@100", "a_pure:heldout", "tau:heldout", "edge_trace_ratio", "edge_nmi", "node_nmi")
"""Columns of the table of paired differences."""


@dataclass(frozen=True)
class Claim:
    """A claim of arXiv 2604.25978 that random fractions change a metric in one direction.

    Args:
        text: the claim as a sentence without a full stop.
        metric: name of the metric.
        sign: 1 if the metric is claimed to be higher with random fractions, -1 if lower.

    """

    text: str
    metric: str
    sign: int


CLAIMS = (
    Claim("Accuracy in pure batches (A_pure) is higher with random fractions", "a_pure:heldout", 1),
    Claim("Predictions follow the edge rather than the batch (τ is higher)", "tau:heldout", 1),
    Claim("The Trace Ratio of edge embeddings is higher", "edge_trace_ratio", 1),
    Claim("The NMI of edge embeddings with the classes is higher", "edge_nmi", 1),
    Claim("The NMI of node embeddings with the classes is higher", "node_nmi", 1),
    Claim("Hits@100 is lower", "hits@100", -1),
)


def describe_claims(
    results: Sequence[ArmResults], arm: str = "random/batch", baseline: str = "fixed/batch"
) -> list[str]:
    """Return a sentence for each claim: where it is confirmed, where its opposite is, and where neither is.

    A claim holds for a model on a data set if the 95 % interval of the paired difference is on the claimed side of 0.

    Args:
        results: results of a study.
        arm: arm with random fractions.
        baseline: arm to which it is compared.

    """
    pairs = _find_pairs(results, arm, baseline)
    sentences: list[str] = []
    for claim in CLAIMS:
        holds: list[ArmResults] = []
        opposite: list[ArmResults] = []
        undecided: list[ArmResults] = []
        for arm_results, baseline_results in pairs:
            interval = paired_interval(arm_results, baseline_results, claim.metric)
            if interval is None or not interval.has_bounds:
                continue
            low, high = sorted((claim.sign * interval.low, claim.sign * interval.high))
            (holds if low > 0 else opposite if high < 0 else undecided).append(arm_results)
        total = len(holds) + len(opposite) + len(undecided)
        if total == 0:
            continue
        text = f"{claim.text}: confirmed in {_count(holds, total)}"
        text += f"; the opposite is found in {_count(opposite, total)}" if opposite else ""
        text += f"; undecided (the interval contains 0) in {_count(undecided, total)}" if undecided else ""
        sentences.append(f"{text}.")
    return sentences


def describe_verdicts(results: Sequence[ArmResults]) -> list[str]:
    """Return a sentence for each arm with the number of models that got each verdict."""
    counts: dict[str, dict[str, int]] = {}
    for arm in results:
        arm_counts = counts.setdefault(arm.arm, {})
        for verdict, count in arm.verdict_counts().items():
            arm_counts[verdict] = arm_counts.get(verdict, 0) + count
    return [f"{arm}: {_list_counts(arm_counts)}." for arm, arm_counts in counts.items()]


def find_compared_arms(results: Sequence[ArmResults]) -> list[tuple[str, str]]:
    """Return the arms to compare, each with its baseline.

    The baseline is the arm with fixed fractions and the same norms. The baseline of other arms with fixed fractions is
    `fixed/batch`.
    """
    arms = list(dict.fromkeys(arm.arm for arm in results))
    compared: list[tuple[str, str]] = []
    for arm in arms:
        name, _, norms = arm.partition("/")
        own = f" {OWN_NORM}" if name.endswith(f" {OWN_NORM}") else ""
        baseline = "fixed/batch" if name == "fixed" else f"fixed{own}/{norms}"
        if baseline != arm and baseline in arms:
            compared.append((arm, baseline))
    return compared


def paired_interval(arm: ArmResults, baseline: ArmResults, metric: str) -> Interval | None:
    """Return the difference of a metric between two arms, paired by seed; None without a common seed."""
    difference = arm.group.difference(baseline.group, metric)
    return None if difference is None else difference.interval


def to_markdown(results: Sequence[ArmResults]) -> str:
    """Return means and paired differences of every data set, and the findings, as Markdown."""
    compared = find_compared_arms(results)
    lines: list[str] = []
    for graph in dict.fromkeys(arm.graph for arm in results):
        graph_results = [arm for arm in results if arm.graph == graph]
        tables = [*_table_of_means(graph_results), *_table_of_differences(graph_results, compared)]
        lines += [f"### {graph}", "", *tables, ""]
    # The paper makes claims about random fractions alone.
    claims = [(arm, baseline, describe_claims(results, arm, baseline)) for arm, baseline in compared]
    claims = [claim for claim in claims if claim[0].startswith("random")]
    lines += ["### Claims of the paper", ""] if claims else []
    for arm, baseline, sentences in claims:
        lines += [f"{arm} compared with {baseline}:", "", *_bullets(sentences), ""] if sentences else []
    lines += published_table(results)
    lines += ["Verdicts of the audits:", "", *_bullets(describe_verdicts(results)), ""]
    return "\n".join(lines)


def _table_of_means(results: Sequence[ArmResults]) -> list[str]:
    lines = [_row(["model", "arm", "seeds", *METRICS, "verdicts"]), _row(["---"] * (len(METRICS) + 4))]
    for arm in results:
        num_seeds = len(next(iter(arm.group.values.values())))
        means = [_format_mean(arm, metric) for metric in METRICS]
        lines.append(_row([arm.model, arm.arm, str(num_seeds), *means, _list_counts(arm.verdict_counts())]))
    return lines


def _table_of_differences(results: Sequence[ArmResults], compared: Sequence[tuple[str, str]]) -> list[str]:
    rows = [
        _row(
            [
                arm.model,
                f"{arm.arm} − {baseline.arm}",
                *(_format_difference(paired_interval(arm, baseline, metric)) for metric in DIFFERENCE_METRICS),
            ]
        )
        for pair in compared
        for arm, baseline in _find_pairs(results, *pair)
    ]
    header = [_row(["model", "difference", *DIFFERENCE_METRICS]), _row(["---"] * (len(DIFFERENCE_METRICS) + 2))]
    return ["", *header, *rows] if rows else []


def _find_pairs(results: Sequence[ArmResults], arm: str, baseline: str) -> list[tuple[ArmResults, ArmResults]]:
    """Return the results of an arm and of its baseline for each data set and model that has both."""
    by_name = {(item.graph, item.model, item.arm): item for item in results}
    pairs: list[tuple[ArmResults, ArmResults]] = []
    for graph, model in dict.fromkeys((graph, model) for graph, model, _ in by_name):
        arm_results, baseline_results = by_name.get((graph, model, arm)), by_name.get((graph, model, baseline))
        if arm_results is not None and baseline_results is not None:
            pairs.append((arm_results, baseline_results))
    return pairs


def _format_mean(arm: ArmResults, metric: str) -> str:
    if metric not in arm.group.values:
        return ""
    interval = arm.group.interval(metric)
    half_width = f" ± {(interval.high - interval.low) / 2:.3f}" if interval.has_bounds else ""
    return f"{interval.mean:.3f}{half_width}"


def _format_difference(interval: Interval | None) -> str:
    if interval is None:
        return ""
    bounds = f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval.has_bounds else ""
    return f"{interval.mean:+.3f}{bounds}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _bullets(sentences: Sequence[str]) -> list[str]:
    return [f"* {sentence}" for sentence in sentences]


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


def _count(results: Sequence[ArmResults], total: int) -> str:
    """Return the number of results out of a total, with data sets and models unless it is all or none."""
    if len(results) in (0, total):
        return f"all {total}" if results else f"none of {total}"
    models: dict[str, list[str]] = {}
    for arm in results:
        models.setdefault(arm.graph, []).append(arm.model)
    names = "; ".join(f"{graph}: {', '.join(graph_models)}" for graph, graph_models in models.items())
    return f"{len(results)} of {total} ({names})"
