"""Pages of audits, studies and alignments."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from retain.link.auditing import AuditReport
from retain.link.figures import audit_response, embedding_map, response
from retain.link.study import Study
from retain.report.page import Figure, Page, Table


def audit_page(report: AuditReport, command: str) -> Page:
    """Return the page of an audit: verdict, statistics, response curve, norm layers."""
    page = Page(title="Audit of a link predictor", lead=str(report.verdict), command=command)
    for name, part in report.parts.items():
        rows = [[key, str(value)] for key, value in part.statistics.items()]
        page.add(f"On {name} edges", Table(["statistic", "mean and 95 % interval"], rows))
    page.add(
        "Response to the batch",
        Figure(
            audit_response(report),
            caption="Accuracy of batches by their fraction of positives; an honest model's line is smooth.",
            alt="Accuracy against the fraction of positives in the batch, for each set of edges.",
        ),
    )
    layers = [[layer.name, layer.kind, layer.sees, layer.mixes_rows, layer.frozen] for layer in report.layers]
    if layers:
        page.add("Normalisation layers", Table(["layer", "kind", "sees", "mixes rows", "frozen"], layers))
    return page


def study_page(study: Study, command: str, maps: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Page:
    """Return the page of a study: every arm's metrics, paired differences, response curves."""
    shown = (
        "hits@100",
        "auc",
        "a_pure:heldout",
        "tau:heldout",
        "kappa:heldout",
        "a_pure:train",
        "edge_nmi",
        "edge_trace_ratio",
        "node_nmi",
    )
    page = Page(
        title=f"Composition bias on {study.graph}",
        lead="The same model trained on biased and on corrected batches.",
        command=command,
    )
    table = {(row["arm"], row["encoder_norm"], _name(row)): row for row in study.rows()}
    rows: list[list[str]] = []
    for key in study.runs:
        arm, _, norm = key.partition("/")
        cells = [table.get((arm, norm or "none", name)) for name in shown]
        rows.append([key, *(_cell(cell) for cell in cells)])
    page.add("Arms", Table(["arm", *shown], rows, caption="Mean over seeds and 95 % t interval."))
    paired = [
        [f"{row['of']} − {row['minus']}", _name(row), _cell(row)] for row in study.differences() if _name(row) in shown
    ]
    if paired:
        page.add("Paired differences", Table(["arms", "metric", "difference and 95 % interval"], paired))
    curves = {key: runs[0]["curve"] for key, runs in study.runs.items() if runs[0]["curve"]}
    page.add(
        "Response to the batch",
        Figure(
            response(curves),
            caption="Accuracy on held-out edges by the fraction of positives in the batch, first seed.",
            alt="Accuracy against the fraction of positives in the batch, one line for each arm.",
        ),
    )
    if maps:
        page.add(
            "Embeddings",
            Figure(
                embedding_map(maps),
                caption="t-SNE of incident-edge means, coloured by class.",
                alt="Maps of node embeddings of two trainings side by side.",
            ),
        )
    return page


def _name(row: Mapping[str, object]) -> str:
    return f"{row['metric']}:{row['split']}" if "split" in row else str(row["metric"])


def _cell(row: Mapping[str, float] | None) -> str:
    return "" if row is None else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
