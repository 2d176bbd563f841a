"""Published Hits@100 of the models, and their comparison with a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from suffice.link.study.results import ArmResults

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
"""Mean and standard deviation over ten splits, in percent, by data set and model.

Sources: arXiv 2209.15486, Table 2 (GCN, GraphSAGE, Neo-GNN, ELPH, BUDDY) and arXiv 2302.00890, Table 2 (NCN, NCNC).
"""

_PUBLISHED_ARM = "fixed own/"  # prefix of the arm that trains as the authors do, with the model's own norms


@dataclass(frozen=True)
class PublishedComparison:
    """Hits@100 of a study and the published Hits@100, in percent.

    Args:
        graph: name of the data set.
        model: name of the model.
        mean: mean of the study.
        deviation: standard deviation over the splits of the study; 0 for a single split.
        published_mean: published mean.
        published_deviation: published standard deviation.

    """

    graph: str
    model: str
    mean: float
    deviation: float
    published_mean: float
    published_deviation: float

    @property
    def gap(self) -> float:
        """Mean of the study minus the published mean."""
        return self.mean - self.published_mean


def compare_to_published(results: Sequence[ArmResults]) -> list[PublishedComparison]:
    """Compare Hits@100 with the published numbers, for models that were trained with their own norms."""
    comparisons: list[PublishedComparison] = []
    for arm in results:
        published = HITS_AT_100.get((arm.graph, arm.model))
        values = list(arm.group.values.get("hits@100", {}).values())
        if published is not None and values and arm.arm.startswith(_PUBLISHED_ARM):
            deviation = stdev(values) if len(values) > 1 else 0.0
            comparisons.append(
                PublishedComparison(arm.graph, arm.model, 100 * fmean(values), 100 * deviation, *published)
            )
    return comparisons


def published_table(results: Sequence[ArmResults]) -> list[str]:
    """Return the comparison as lines of Markdown; empty if there is nothing to compare."""
    comparisons = compare_to_published(results)
    if not comparisons:
        return []
    lines = ["### Hits@100 as published", ""]
    lines += ["| data | model | here | published | gap | gap in standard deviations |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for found in comparisons:
        here = f"{found.mean:.1f} ± {found.deviation:.1f}"
        published = f"{found.published_mean:.1f} ± {found.published_deviation:.1f}"
        gaps = f"{found.gap:+.1f} | {found.gap / found.published_deviation:+.1f}"
        lines.append(f"| {found.graph} | {found.model} | {here} | {published} | {gaps} |")
    num_close = sum(abs(found.gap) <= 2 * found.published_deviation for found in comparisons)
    return [*lines, "", f"{num_close} of {len(comparisons)} are within two published standard deviations.", ""]
