"""What a study measured: every arm and seed, means with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from suffice.link.study.arms import PAIRS
from suffice.study.results import Interval, mean_interval, paired_difference

Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The runs of a study and how they were made.

    Args:
        graph: name of the data set.
        settings: model, training, protocol, seeds, versions.
        runs: by arm (`fixed/batch`), in the order of the seeds; each holds `values` by metric (`auc`,
            `kappa:heldout`), `verdict`, `why` and `curve`.
        references: alignment of `raw features` and of an `untrained` model; empty without classes.

    """

    graph: str
    settings: dict[str, Any]
    runs: dict[str, list[Run]]
    references: dict[str, list[Run]]

    def rows(self) -> list[dict[str, Any]]:
        """Return mean and 95 % t interval over seeds of every arm and metric."""
        return [
            {**_norms(runs[0]), "arm": key.partition("/")[0], **_metric(metric), **_mean(runs, metric)}
            for key, runs in self.runs.items()
            for metric in runs[0]["values"]
        ]

    def reference_rows(self) -> list[dict[str, Any]]:
        """Return mean and 95 % t interval of the two references."""
        return [
            {"of": name, "metric": metric, **_mean(runs, metric)}
            for name, runs in self.references.items()
            for metric in runs[0]["values"]
        ]

    def differences(self) -> list[dict[str, Any]]:
        """Return paired differences between arms, seed by seed, with 95 % t intervals.

        The last ones are differences of differences: what an arm gains under BatchNorm beyond what it gains
        under LayerNorm, which can't see the batch.
        """
        sides = [([one], [other]) for one, other in PAIRS]
        sides += [([f"{name}/batch", "fixed/layer"], ["fixed/batch", f"{name}/layer"]) for name in _ATTRIBUTED]
        return [
            {
                "of": of,
                "minus": minus,
                **_metric(metric),
                **asdict(self._difference(plus, less, metric)),
            }
            for plus, less in sides
            if {*plus, *less} <= self.runs.keys()
            for of, minus in [_sides(plus, less)]
            for metric in self.runs[plus[0]][0]["values"]
        ]

    def values(self, arm: str, metric: str) -> list[float]:
        """Return a metric's value for each seed; `kappa:heldout` names metric and split."""
        return [run["values"][metric] for run in self.runs[arm]]

    def mean(self, arm: str, metric: str) -> Interval:
        """Return a metric's mean and 95 % t interval over seeds."""
        return mean_interval(self.values(arm, metric))

    def difference(self, one: str, other: str, metric: str) -> Interval:
        """Return the paired difference of two arms."""
        return self._difference([one], [other], metric)

    def _difference(self, plus: Sequence[str], less: Sequence[str], metric: str) -> Interval:
        difference = paired_difference(self._sums(plus, metric), self._sums(less, metric))
        assert difference is not None  # every arm has every seed
        return difference.interval

    def _sums(self, arms: Sequence[str], metric: str) -> dict[int, float]:
        """Return the sum of a metric over arms, by seed."""
        sums = map(sum, zip(*(self.values(arm, metric) for arm in arms), strict=True))
        return dict(zip(self.settings["seeds"], sums, strict=True))

    def curves(self) -> dict[str, list[tuple[float, Interval]]]:
        """Return for each arm the accuracy on held-out edges by fraction of positives, over seeds."""
        return {
            key: [
                (points[0][0], mean_interval([point[2] for point in points]))
                for points in zip(*(run["curve"] for run in runs), strict=True)
            ]
            for key, runs in self.runs.items()
        }

    def verdicts(self) -> dict[str, list[str]]:
        """Return the verdict of each seed."""
        return {key: [run["verdict"] for run in runs] for key, runs in self.runs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the study as JSON holds it: `rows`, `references`, `differences`, verdicts, curves, settings."""
        return {
            "graph": self.graph,
            "settings": self.settings,
            "rows": self.rows(),
            "references": self.reference_rows(),
            "differences": self.differences(),
            "verdicts": self.verdicts(),
            "curves": {key: [[x, *asdict(y).values()] for x, y in curve] for key, curve in self.curves().items()},
        }


_ATTRIBUTED = ("random", "random+balanced")


def _sides(plus: Sequence[str], less: Sequence[str]) -> tuple[str, str]:
    if len(plus) == 1:
        return plus[0], less[0]
    return f"({plus[0]} − {less[0]})", f"({less[1]} − {plus[1]})"


def _mean(runs: Sequence[Run], metric: str) -> dict[str, float]:
    return asdict(mean_interval([run["values"][metric] for run in runs]))


def _metric(metric: str) -> dict[str, str]:
    name, _, part = metric.partition(":")
    return {"metric": name, "split": part} if part else {"metric": name}


def _norms(run: Run) -> dict[str, str]:
    return {name: run["facts"]["model"][name] for name in ("encoder_norm", "decoder_norm")}
