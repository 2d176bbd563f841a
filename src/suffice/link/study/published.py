"""Hits@100 as the models' authors print it, and how a study of ours compares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from suffice.link.study.reproduction import Cell

# Mean and standard deviation over ten splits, in percent: 2209.15486, table 2 (GCN, GraphSAGE, Neo-GNN, ELPH, BUDDY),
# and 2302.00890, table 2 (NCN, NCNC).
HITS_AT_100: dict[tuple[str, str], tuple[float, float]] = {
    ("Cora", "gcn"): (66.79, 1.65),
    ("Cora", "sage"): (55.02, 4.03),
    ("Cora", "neognn"): (80.42, 1.31),
    ("Cora", "elph"): (87.72, 2.13),
    ("Cora", "buddy"): (88.00, 0.44),
    ("Cora", "ncn"): (89.05, 0.96),
    ("Cora", "ncnc"): (89.65, 1.36),
    ("CiteSeer", "gcn"): (67.08, 2.94),
    ("CiteSeer", "sage"): (57.01, 3.74),
    ("CiteSeer", "neognn"): (84.67, 2.16),
    ("CiteSeer", "elph"): (93.44, 0.53),
    ("CiteSeer", "buddy"): (92.93, 0.27),
    ("CiteSeer", "ncn"): (91.56, 1.43),
    ("CiteSeer", "ncnc"): (93.47, 0.95),
}
OWN = "fixed own/"  # begins the key of an arm that trains with a model's own norms


def compared(cells: Sequence[Cell]) -> list[tuple[str, str, float, float, float, float]]:
    """Return data set, model, our mean and standard deviation of Hits@100, and the published ones, all in percent.

    Only of models trained as their authors do, with the norms of their own settings.
    """
    rows: list[tuple[str, str, float, float, float, float]] = []
    for cell in cells:
        known = HITS_AT_100.get((cell.data, cell.model))
        values = list(cell.group.values.get("hits@100", {}).values())
        if known is None or not cell.arm.startswith(OWN) or not values:
            continue
        spread = stdev(values) if len(values) > 1 else 0.0
        rows.append((cell.data, cell.model, 100 * fmean(values), 100 * spread, *known))
    return rows


def lines(cells: Sequence[Cell]) -> list[str]:
    """Return the comparison as a table in Markdown; nothing if there is nothing to compare."""
    rows = compared(cells)
    if not rows:
        return []
    found = ["### Hits@100 as published", "", "| data | model | here | published | gap | in standard deviations |"]
    found.append("| --- | --- | --- | --- | --- | --- |")
    for data, model, mean, spread, known, deviation in rows:
        gap = mean - known
        here, there = f"{mean:.1f} ± {spread:.1f}", f"{known:.1f} ± {deviation:.1f}"
        found.append(f"| {data} | {model} | {here} | {there} | {gap:+.1f} | {gap / deviation:+.1f} |")
    within = sum(abs(mean - known) <= 2 * deviation for *_, mean, _, known, deviation in rows)
    found += ["", f"Within two published standard deviations: {within} of {len(rows)}.", ""]
    return found
