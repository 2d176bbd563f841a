"""What of the paper's study replicates, in words and tables made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suffice.link.study import published
from suffice.link.study.arms import OWN
from suffice.link.study.reproduction import Cell
from suffice.study.results import Interval

COLUMNS = (
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
COMPARED = ("hits@100", "a_pure:heldout", "tau:heldout", "edge_trace_ratio", "edge_nmi", "node_nmi")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: how a metric under one way of training differs from it under another.

    Args:
        text: what is claimed.
        metric: which metric.
        sign: 1 if it is said to be higher, -1 if lower.

    """

    text: str
    metric: str
    sign: int


CLAIMS = (
    Claim("Pure batches keep more of the accuracy under random fractions", "a_pure:heldout", 1),
    Claim("Predictions follow the batch less: τ is higher under random fractions", "tau:heldout", 1),
    Claim("The Trace Ratio of edge embeddings rises", "edge_trace_ratio", 1),
    Claim("The NMI of edge embeddings with the classes rises", "edge_nmi", 1),
    Claim("The NMI of node embeddings with the classes rises", "node_nmi", 1),
    Claim("Hits@100 falls", "hits@100", -1),
)


def difference(one: Cell, other: Cell, metric: str) -> Interval | None:
    """Return the paired difference of two cells over the seeds that both have; None if there are none."""
    found = one.group.difference(other.group, metric)
    return None if found is None else found.interval


def sentences(cells: Sequence[Cell], corrected: str = "random/batch", biased: str = "fixed/batch") -> list[str]:
    """Say of each claim where it replicates, where the opposite holds, and where intervals include 0.

    Args:
        cells: of a study.
        corrected: the way of training that is said to correct, by random fractions.
        biased: the one it is compared with.

    """
    pairs = _pairs(cells, corrected, biased)
    found: list[str] = []
    for claim in CLAIMS:
        sides: dict[str, list[tuple[str, str]]] = {"yes": [], "no": [], "open": []}
        for (data, model), (one, other) in pairs.items():
            gap = difference(one, other, claim.metric)
            if gap is None or not gap.has_bounds:
                continue
            low, high = sorted((claim.sign * gap.low, claim.sign * gap.high))
            sides["yes" if low > 0 else "no" if high < 0 else "open"].append((data, model))
        total = sum(map(len, sides.values()))
        if not total:
            continue
        text = f"{claim.text}: in {_count(sides['yes'], total)}"
        text += f"; the opposite in {_count(sides['no'], total)}" if sides["no"] else ""
        text += f"; the interval includes 0 in {_count(sides['open'], total)}" if sides["open"] else ""
        found.append(text + ".")
    return found


def verdicts(cells: Sequence[Cell]) -> list[str]:
    """Say for each way of training how its models were judged."""
    arms: dict[str, dict[str, int]] = {}
    for cell in cells:
        for verdict, count in cell.verdicts.items():
            counts = arms.setdefault(cell.arm, {})
            counts[verdict] = counts.get(verdict, 0) + count
    return [
        f"{arm}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + "."
        for arm, counts in arms.items()
    ]


def compared(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Return which ways of training to compare, of and minus.

    Each is compared with the usual batches under the same norms, and these under other norms with BatchNorm.
    """
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    found: list[tuple[str, str]] = []
    for arm in arms:
        name, _, norms = arm.partition("/")
        own = f" {OWN}" if name.endswith(f" {OWN}") else ""
        minus = "fixed/batch" if name == "fixed" else f"fixed{own}/{norms}"
        if minus != arm and minus in arms:
            found.append((arm, minus))
    return found


def markdown(cells: Sequence[Cell]) -> str:
    """Return tables of every data set, paired differences, and what replicates, as Markdown."""
    arms = compared(cells)
    parts: list[str] = []
    for data in dict.fromkeys(cell.data for cell in cells):
        own = [cell for cell in cells if cell.data == data]
        parts += [f"### {data}", "", _row(("model", "arm", "seeds", *COLUMNS, "verdicts"))]
        parts.append(_row(["---"] * (len(COLUMNS) + 4)))
        for cell in own:
            values = [_spread(cell, metric) for metric in COLUMNS]
            seeds = str(len(next(iter(cell.group.values.values()))))
            judged = ", ".join(f"{count} {verdict}" for verdict, count in sorted(cell.verdicts.items()))
            parts.append(_row((cell.model, cell.arm, seeds, *values, judged)))
        differences = [
            _row((model, f"{of} − {minus}", *(_gap(difference(one, other, metric)) for metric in COMPARED)))
            for of, minus in arms
            for (_, model), (one, other) in _pairs(own, of, minus).items()
        ]
        if differences:
            parts += ["", _row(("model", "difference", *COMPARED)), _row(["---"] * (len(COMPARED) + 2)), *differences]
        parts.append("")
    # The paper claims nothing of other ways of training.
    claims = [(of, minus, sentences(cells, of, minus)) for of, minus in arms if of.startswith("random")]
    parts += ["### What replicates", ""] if claims else []
    for of, minus, said in claims:
        parts += [f"{of} against {minus}:", "", *(f"* {text}" for text in said), ""] if said else []
    parts += published.lines(cells)
    parts += ["How trainings were judged:", "", *(f"* {text}" for text in verdicts(cells)), ""]
    return "\n".join(parts)


def _pairs(cells: Sequence[Cell], of: str, minus: str) -> dict[tuple[str, str], tuple[Cell, Cell]]:
    by = {(cell.data, cell.model, cell.arm): cell for cell in cells}
    found: dict[tuple[str, str], tuple[Cell, Cell]] = {}
    for data, model, _ in by:
        one, other = by.get((data, model, of)), by.get((data, model, minus))
        if one is not None and other is not None:
            found[data, model] = one, other
    return found


def _spread(cell: Cell, metric: str) -> str:
    if metric not in cell.group.values:
        return ""
    found = cell.group.interval(metric)
    half = "" if not found.has_bounds else f" ± {(found.high - found.low) / 2:.3f}"
    return f"{found.mean:.3f}{half}"


def _gap(gap: Interval | None) -> str:
    if gap is None:
        return ""
    return f"{gap.mean:+.3f}" + ("" if not gap.has_bounds else f" [{gap.low:+.3f}, {gap.high:+.3f}]")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _count(found: Sequence[tuple[str, str]], total: int) -> str:
    """Say how many of all, and which models on which data sets unless it is all or none."""
    if len(found) in (0, total):
        return f"all {total}" if found else f"none of {total}"
    models: dict[str, list[str]] = {}
    for data, model in found:
        models.setdefault(data, []).append(model)
    named = "; ".join(f"{data}: {', '.join(own)}" for data, own in models.items())
    return f"{len(found)} of {total} ({named})"
