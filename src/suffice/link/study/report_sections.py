"""Pages of audits, studies and alignments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from suffice.link.auditing.audit import AuditReport
from suffice.link.study.correct import stored_maps, whole_study
from suffice.link.study.figures import audit_response, embedding_map, response
from suffice.link.study.results import Study
from suffice.report import Figure, Page, Table, Text
from suffice.study.results import Interval
from suffice.study.store import Record


def audit_page(report: AuditReport, command: str) -> Page:
    """Return the page of an audit: verdict, statistics, response curve, norm layers."""
    page = Page(title="Audit of a link predictor", summary=str(report.verdict), command=command)
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
    layers = [[layer.name, layer.kind, layer.input_rows, layer.mixes_rows, layer.frozen] for layer in report.layers]
    if layers:
        page.add("Normalisation layers", Table(["layer", "kind", "input rows", "mixes rows", "frozen"], layers))
    return page


_MOST_STUDIES = 4
SHOWN = (
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


def study_page(study: Study, command: str, maps: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Page:
    """Return the page of a study: every arm's metrics, paired differences, response curves, embeddings."""
    page = Page(title=f"Composition bias on {study.graph}", summary=conclusion(study), command=command)
    add_study(page, study, maps)
    return page


def add_study(page: Page, study: Study, maps: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
    """Add the sections of a study to a page."""
    seeds = len(study.settings["seeds"])
    page.add(f"{study.graph}: arms", Table(*arm_table(study), caption=f"Mean and 95 % t interval over {seeds} seeds."))
    columns, differences = difference_table(study)
    if differences:
        page.add(
            f"{study.graph}: paired differences",
            Table(columns, differences, "Seed by seed, 95 % t interval. The last ones: what BatchNorm adds."),
        )
    page.add(
        f"{study.graph}: response to the batch",
        Figure(
            response(study.curves()),
            caption="Accuracy on held-out edges by the fraction of positives in the batch, mean over seeds.",
            alt="Accuracy against the fraction of positives in the batch, one line for each arm.",
            numbers=Table(
                ["arm", "fraction of positives", "accuracy"],
                [[key, f"{x:.2f}", str(y)] for key, curve in study.curves().items() for x, y in curve],
                "Mean and 95 % t interval over seeds.",
            ),
        ),
    )
    if maps:
        page.add(
            f"{study.graph}: embeddings",
            Figure(
                embedding_map(maps),
                caption="t-SNE of incident-edge means of the decoder's hidden layer, coloured by class.",
                alt="Maps of node embeddings, side by side for each training.",
            ),
        )


def add_records(page: Page, records: Sequence[Record], folder: Path) -> None:
    """Add finished runs of the kind `link.correct`: audits, response curves, embeddings of two arms.

    Args:
        page: of the report.
        records: finished runs; each combination of settings beside the arm is a study of its own.
        folder: of the store, with the checkpoints.

    """
    for number, (title, own) in enumerate(_by_settings(records).items()):
        if number == _MOST_STUDIES:
            page.add("More", Text(f"The first {_MOST_STUDIES} combinations of settings are drawn; the table has all."))
            break
        study = whole_study(own)
        if study is None:
            page.add(title or "Arms", Text("Runs are still missing: there is no seed that every arm has."))
            continue
        maps = stored_maps(own, folder) if number == 0 else {}
        add_study(page, replace(study, graph=f"{study.graph}{title}"), maps)


def arm_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of arms, references and verdicts."""
    kept = [name for name in SHOWN if any(name in runs[0]["values"] for runs in study.runs.values())]
    rows = [
        [
            key,
            *(str(study.mean(key, name)) if name in runs[0]["values"] else "" for name in kept),
            ", ".join(f"{n} {level}" for level, n in Counter(run["verdict"] for run in runs).items()),
        ]
        for key, runs in study.runs.items()
    ]
    for of in study.references:
        cells = {row["metric"]: row for row in study.reference_rows() if row["of"] == of}
        rows.append([of, *(_cell(cells[name]) if name in cells else "" for name in kept), ""])
    return ["arm", *kept, "verdicts"], rows


def difference_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of paired differences."""
    shown = ("hits@100", "auc", "a_pure:heldout", "kappa:heldout", "edge_nmi", "edge_trace_ratio", "node_nmi")
    rows = [
        [f"{row['of']} − {row['minus']}", name, _cell(row)]
        for row in study.differences()
        if (name := f"{row['metric']}:{row['split']}" if "split" in row else row["metric"]) in shown
    ]
    return ["arms", "metric", "difference"], rows


def _by_settings(records: Sequence[Record]) -> dict[str, list[Record]]:
    every_name = dict.fromkeys(name for record in records for name in record.flat_settings)
    names = [n for n in every_name if n != "arm" and len({repr(r.flat_settings.get(n)) for r in records}) > 1]
    found: dict[str, list[Record]] = {}
    for record in records:
        varying = "".join(f", {name} {record.flat_settings.get(name)}" for name in names)
        found.setdefault(varying, []).append(record)
    return found


def conclusion(study: Study) -> str:
    """Say in words made from the numbers what the study found."""
    said = [
        f"{key}: {', '.join(sorted({run['verdict'] for run in runs}))} "
        f"(A_pure {study.mean(key, 'a_pure:heldout').mean:.2f}, κ {study.mean(key, 'kappa:heldout').mean:.2f})"
        for key, runs in study.runs.items()
    ]
    return "; ".join(said) + "."


def _cell(row: Mapping[str, float]) -> str:
    return str(Interval(row["mean"], row["low"], row["high"]))
