"""Pages and report sections of audits and studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from suffice.link.auditing.audit import AuditReport
from suffice.link.auditing.kappa_tau import LABELS, MEANINGS
from suffice.link.auditing.metric_comparison import WAYS
from suffice.link.study.correct import load_stored_representations
from suffice.link.study.demo import DemoResults, describe_results
from suffice.link.study.figures import plot_audit, plot_embeddings, plot_response_curves
from suffice.link.study.results import StudyResults, arm_key, collect_study, limit_interval
from suffice.link.study.run_settings import REFERENCES
from suffice.report import Figure, Page, Result, Table, Text
from suffice.study.results import Interval
from suffice.study.store import Record

_MAX_STUDIES = 4  # combinations of settings that a report shows

_TONES = {
    "unaffected": "good",
    "no skill": "warning",
    "undecided": "warning",
    "affected": "warning",
    "dominated": "bad",
}

_TABLE_METRICS = (
    "hits@100",
    "auc",
    "a_pure:heldout",
    "tau:heldout",
    "kappa:heldout",
    "a_pure:train",
    "tau:train",
    "kappa:train",
    "auc_eval:train",
    "edge_nmi",
    "edge_trace_ratio",
    "node_nmi",
)
_DIFFERENCE_METRICS = (
    "hits@100",
    "auc",
    "a_pure:heldout",
    "kappa:heldout",
    "edge_nmi",
    "edge_trace_ratio",
    "node_nmi",
)

COLUMNS_EXPLAINED = (
    "A_pure: accuracy in batches of only positives or only negatives. κ: how far the scores of the same edges move as "
    "their batch fills with positives, divided by the gap between positives and negatives; 0 without composition bias. "
    "Edge NMI: agreement of clusters of edge embeddings with the node classes. AUC: in eval mode, on test edges."
)
"""Explains the most important metrics of a study."""

Representations = Mapping[str, tuple[Tensor, Tensor]]
"""Embeddings [items, channels] and classes [items] by arm."""


def audit_page(report: AuditReport, command: str) -> Page:
    """Return the page of an audit: verdict, statistics, response curve, norm layers and what couples the edges.

    Args:
        report: result of the audit.
        command: command that makes the page.

    """
    verdict = report.verdict
    page = Page(
        title="Audit of a link predictor",
        summary="How much does the score of an edge depend on the rest of its batch? Edges were scored in batches of "
        f"up to {report.batch_size} edges with 0 to 100 % positives, {report.repeats} times.",
        command=command,
    )
    page.add(
        "Verdict",
        Result(
            f"{verdict.level[0].upper()}{verdict.level[1:]}.", verdict.headline, report.points(), _TONES[verdict.level]
        ),
        Figure(
            plot_audit(report),
            caption="Accuracy against the fraction of positives in the batch. A model that judges each edge alone "
            "gives a nearly straight line; one that bends down at both ends reads the batch.",
            alt="Accuracy against the fraction of positives in the batch, one line for each set of edges.",
            numbers=_response_table(report),
        ),
    )
    for name, part in report.parts.items():
        rows = [[LABELS.get(key, key), str(value), MEANINGS[key]] for key, value in part.statistics.items()]
        page.add(f"Statistics on {name} edges", Table(["statistic", "mean and 95 % interval", "meaning"], rows))
        if compared := report.metrics.get(name):
            rows = [[WAYS[way], *map(str, values.values())] for way, values in compared.items()]
            page.add(f"Metrics of {name} edges", Table(["scored in", *next(iter(compared.values()))], rows))
    layers = [[layer.name, layer.kind, layer.input_rows, layer.mixes_rows, layer.frozen] for layer in report.layers]
    if layers:
        page.add("Normalization layers", Table(["layer", "class", "input rows", "mixes rows", "frozen"], layers))
    couplings = [[each.name, each.kind, each.is_norm_layer] for each in report.couplings]
    if couplings:
        page.add("What couples the edges of a batch", Table(["module", "class", "norm layer"], couplings))
    return page


def _response_table(report: AuditReport) -> Table:
    """Return the accuracy of each edge set at each fraction of positives."""
    curves = [part.curve for part in report.parts.values()]
    rows = [
        [f"{points[0].fraction:.0%}", *(str(point.accuracy) for point in points)]
        for points in zip(*curves, strict=True)
    ]
    columns = ["positives in the batch", *(f"accuracy on {name} edges" for name in report.parts)]
    return Table(columns, rows, "Mean and 95 % interval.")


def metrics_page(title: str, graph: str, rows: Sequence[Mapping[str, object]], command: str) -> Page:
    """Return the page of a table of metrics.

    Args:
        title: title of the page.
        graph: name of the graph.
        rows: rows of the table by column; all have the same columns.
        command: command that makes the page.

    """
    page = Page(title=title, summary=f"On {graph}.", command=command)
    page.add("Results", Table(list(rows[0]), [[_format_cell(cell) for cell in row.values()] for row in rows]))
    return page


def _format_cell(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def results_page(results: StudyResults, command: str, representations: Representations | None = None) -> Page:
    """Return the page of a study: metrics of every arm, paired differences, response curves and embeddings.

    Args:
        results: results of the study.
        command: command that makes the page.
        representations: edge representations to plot by arm, if any.

    """
    page = Page(title=f"Composition bias on {results.graph}", summary=summarize_arms(results), command=command)
    add_results(page, results, representations)
    return page


def add_results(page: Page, results: StudyResults, representations: Representations | None = None) -> None:
    """Add the sections of a study to a page.

    Args:
        page: page to add to.
        results: results of the study.
        representations: edge representations to plot by arm, if any.

    """
    graph, num_seeds = results.graph, len(results.settings["seeds"])
    interval_caption = f"Mean and 95 % t interval over {num_seeds} seeds."
    caption = f"{interval_caption} {results.describe_learning_rates()}".rstrip()
    page.add(f"{graph}: arms", Table(*table_of_arms(results), caption=caption))
    columns, differences = table_of_differences(results)
    if differences:
        caption = "Paired by seed, with 95 % t interval."
        if any(row[0].startswith("(") for row in differences):
            caption += (
                " A difference of differences is the gain of an arm under BatchNorm minus its gain under LayerNorm, "
                "whose output does not depend on the batch."
            )
        page.add(f"{graph}: paired differences", Table(columns, differences, caption))
    curves = {arm: arm_results.response_curve() for arm, arm_results in results.arms.items()}
    numbers = [[arm, f"{x:.2f}", str(accuracy)] for arm, curve in curves.items() for x, accuracy in curve]
    page.add(
        f"{graph}: response to the composition of the batch",
        Figure(
            plot_response_curves(curves),
            caption="Accuracy on held-out edges against the fraction of positives in the batch, mean over seeds.",
            alt="Accuracy against the fraction of positives in the batch, one line for each arm.",
            numbers=Table(["arm", "fraction of positives", "accuracy"], numbers, interval_caption),
        ),
    )
    if representations:
        page.add(
            f"{graph}: embeddings",
            Figure(
                plot_embeddings(representations),
                caption="t-SNE of the mean embedding of the edges at each node (last hidden layer of the decoder), "
                "colored by class.",
                alt="Maps of node embeddings, one panel for each arm.",
            ),
        )


def add_demo(page: Page, demo: Sequence[DemoResults]) -> None:
    """Add the sections of the demonstration to a page."""
    sentences = [Text(sentence) for sentence in describe_results(demo)]
    page.add("Link prediction: the score of an edge depends on its batch", *sentences)
    for example in demo:
        add_results(page, example.results, example.representations)
    page.add("Meaning of the columns", Text(COLUMNS_EXPLAINED))


def add_records(page: Page, records: Sequence[Record], folder: Path) -> None:
    """Add finished runs of the kind `link.correct` to a report.

    Args:
        page: page of the report.
        records: finished runs. Runs that differ in more than arm and seed are reported as separate studies.
        folder: folder of the store, with the checkpoints.

    """
    for number, (title, study_records) in enumerate(_group_by_settings(records).items()):
        if number == _MAX_STUDIES:
            text = f"Only the first {_MAX_STUDIES} combinations of settings are plotted; the table lists all of them."
            page.add("More combinations", Text(text))
            break
        results = _collect_complete_seeds(study_records)
        if results is None:
            page.add(title or "Arms", Text("No seed is finished in every arm yet."))
            continue
        representations = load_stored_representations(study_records, folder) if number == 0 else {}
        add_results(page, replace(results, graph=f"{results.graph}{title}"), representations)


def table_of_arms(results: StudyResults) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of arms, references and verdicts."""
    metrics = [name for name in _TABLE_METRICS if any(name in arm.group.values for arm in results.arms.values())]
    groups = {key: arm.group for key, arm in results.arms.items()} | results.references
    verdicts = {
        key: ", ".join(f"{count} {level}" for level, count in arm.verdict_counts().items())
        for key, arm in results.arms.items()
    }
    rows = [
        [
            key,
            *(
                str(limit_interval(metric, group.interval(metric))) if metric in group.values else ""
                for metric in metrics
            ),
            verdicts.get(key, ""),
        ]
        for key, group in groups.items()
    ]
    return ["arm", *metrics, "verdicts"], rows


def table_of_differences(results: StudyResults) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of paired differences."""
    rows: list[list[str]] = []
    for row in results.differences():
        metric = f"{row['metric']}:{row['edge_set']}" if "edge_set" in row else row["metric"]
        if metric in _DIFFERENCE_METRICS:
            rows.append([f"{row['of']} − {row['minus']}", metric, str(Interval(row["mean"], row["low"], row["high"]))])
    return ["arms", "metric", "difference"], rows


def summarize_arms(results: StudyResults) -> str:
    """Return a sentence with verdict, A_pure and κ of every arm."""
    parts = [
        f"{key}: {', '.join(sorted(set(arm.verdicts.values())))} "
        f"(A_pure {results.mean(key, 'a_pure:heldout').mean:.2f}, κ {results.mean(key, 'kappa:heldout').mean:.2f})"
        for key, arm in results.arms.items()
    ]
    return "; ".join(parts) + "."


def _group_by_settings(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group runs by all settings other than the arm, with the settings that vary as title of each group."""
    all_names = dict.fromkeys(name for record in records for name in record.flat_settings)
    names = [
        name
        for name in all_names
        if name != "arm" and len({repr(record.flat_settings.get(name)) for record in records}) > 1
    ]
    groups: dict[str, list[Record]] = {}
    for record in records:
        title = "".join(f", {name} {record.flat_settings.get(name)}" for name in names)
        groups.setdefault(title, []).append(record)
    return groups


def _collect_complete_seeds(records: Sequence[Record]) -> StudyResults | None:
    """Return the results of the seeds that are finished in every arm, or None if there are none."""
    seeds_of_arms: dict[str, set[int]] = {}
    for record in records:
        if record.settings["arm"] not in REFERENCES:
            seeds_of_arms.setdefault(arm_key(record), set()).add(record.seed)
    seeds = sorted(set[int].intersection(*seeds_of_arms.values())) if seeds_of_arms else []
    if not seeds:
        return None
    raw_features = REFERENCES[0]  # measured for one seed only
    kept = [record for record in records if record.seed in seeds or record.settings["arm"] == raw_features]
    kept.sort(key=lambda record: record.seed)
    graph = next(record.result["graph"]["name"] for record in kept if record.settings["arm"] not in REFERENCES)
    return collect_study(graph, {"seeds": seeds}, kept)
