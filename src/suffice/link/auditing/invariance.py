"""An assertion for test suites: the scores of a model do not depend on the composition of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from suffice.arguments import check_number
from suffice.link.auditing.audit import AuditReport, EdgeSetReport, audit
from suffice.link.auditing.couplings import FUNCTION
from suffice.link.auditing.edge_set import EdgeSet, Score

_ACCURACY_TOLERANCE = 0.1  # smallest one: pure and balanced batches consist of different edges, so accuracies vary


def assert_composition_invariant(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    tolerance: float = 0.05,
    module: nn.Module | Sequence[nn.Module] | None = None,
    batch_size: int = 512,
    num_probes: int = 32,
    repeats: int = 16,
    threshold: float | None = None,
    frozen: Sequence[str] = (),
    seed: int = 0,
) -> AuditReport:
    """Raise an AssertionError if the scores of a model depend on the composition of the batch, in training mode.

    The model is audited (see `audit`), and the assertion fails if one of these exceeds the tolerance on a set of edges:

    * |κ|, the change of the probes' median score, in units of the score gap, as the fraction of positives in the batch
      goes from 0 to 1;
    * the rank change, the fraction of pairs of probes that are ordered differently at fractions 0.1 and 0.9;
    * half the difference between the accuracies of pure and balanced batches. Differences of up to 0.1 are accepted at
      any tolerance, because the two kinds of batches consist of different edges.

    What noise alone causes, such as dropout that ignores the mode, is subtracted from |κ| and the rank change. With the
    default tolerance, these are the limits of the verdict `unaffected`.

    If the audit cannot judge the model, the assertion still fails if a statistic exceeds the tolerance. So an untrained
    model (`no skill`) with BatchNorm over the edge batch fails, and one with LayerNorm passes. The assertion also fails
    if `score` switches the model to eval mode itself, because then training mode was not tested (`undecided`). Layers
    with frozen statistics pass.

    Args:
        score: scoring function, as for `audit`.
        edges: edges on which the model is audited, or several sets of edges by name. 100 positives and 100 negatives
            or more are recommended.
        tolerance: largest accepted |κ| and rank change, at least 0. For models whose scores do not depend on the batch,
            both are 0 up to rounding.
        module: module behind `score`, or several, as for `audit`.
        batch_size: edges in a batch; use the batch size of the training.
        num_probes: number of probe edges.
        repeats: number of random draws.
        threshold: score above which an edge is predicted to be positive, as for `audit`.
        frozen: names of BatchNorm layers that kept their running statistics in training.
        seed: seed of all draws.

    Returns:
        the report of the audit.

    Raises:
        AssertionError: scores depend on the batch, or only eval mode could be tested. The message contains the level
            of the verdict, the statistics that exceed the tolerance, the layers and other modules that couple the edges
            of a batch, and advice.
        TypeError: an argument has a wrong type, as for `audit`.
        ValueError: an argument is out of range, as for `audit`.

    Example:
        >>> import torch
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> assert_composition_invariant(lambda pairs: pairs[0] - 0.5, edges).verdict.level
        'unaffected'

    """
    __tracebackhide__ = True  # pytest then shows the test, and not this function
    tolerance = check_number("tolerance", tolerance, minimum=0)
    report = audit(
        score,
        edges,
        module=module,
        batch_size=batch_size,
        num_probes=num_probes,
        repeats=repeats,
        threshold=threshold,
        frozen=frozen,
        seed=seed,
    )
    found = [text for name, part in report.parts.items() if (text := _explain_excess(name, part, tolerance))]
    if not found and report.tested != "eval mode":
        return report
    raise AssertionError(_message(report, found))


def _explain_excess(name: str, part: EdgeSetReport, tolerance: float) -> str:
    """Return a sentence that names the statistics of a set that exceed the tolerance, or an empty string."""
    values = {key: value.mean for key, value in part.statistics.items()}
    kappa, rank_change = abs(values["kappa"]), values["rank_change"]
    pure, balanced = values["a_pure"], values["accuracy_balanced"]
    found: list[str] = []
    if kappa - part.noise["kappa"] > tolerance:
        found.append(f"|κ| is {kappa:.3g} (tolerance {tolerance:g}{_of_noise(part, 'kappa')})")
    if rank_change - part.noise["rank_change"] > tolerance:
        found.append(f"the rank change is {rank_change:.3g} (tolerance {tolerance:g}{_of_noise(part, 'rank_change')})")
    accuracy_tolerance = max(_ACCURACY_TOLERANCE, 2 * tolerance)
    if abs(balanced - pure) > accuracy_tolerance:
        found.append(
            f"accuracy is {pure:.2f} in pure batches and {balanced:.2f} in balanced ones (tolerance "
            f"{accuracy_tolerance:g})"
        )
    return f"On {name} edges, {', '.join(found)}." if found else ""


def _of_noise(part: EdgeSetReport, name: str) -> str:
    return f", noise {part.noise[name]:.3g}" if part.noise[name] else ""


def _message(report: AuditReport, found: list[str]) -> str:
    verdict = report.verdict
    what = "Scores depend on the composition of the batch" if found else "The audit could not test training mode"
    lines = [f"{what} (verdict: {verdict.level}).", *found]
    mixing = [layer.name for layer in report.layers if layer.mixes_edges]
    if verdict.level == "unaffected":  # the tolerance is below the limits of the verdict
        if mixing:
            lines.append(f"Layers that normalize over the edge batch: {', '.join(mixing)}.")
    else:
        lines.append(verdict.why)  # names these layers too
    others = [str(each) for each in report.couplings if not each.is_norm_layer and each.kind != FUNCTION]
    if verdict.level == "unaffected" and others:
        lines.append(f"Modules whose output for an edge depends on the other edges of its batch: {', '.join(others)}.")
    if found and not mixing and not others:
        lines.append(
            "No known layer normalizes over the edge batch: look for a mean, a softmax or attention over the scored "
            "pairs."
        )
    if verdict.level == "unaffected":
        lines.append("Replace what depends on the batch, or pass a larger tolerance if you accept the dependence.")
    else:
        lines.append(verdict.advice)
    return "\n".join(lines)
