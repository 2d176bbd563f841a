"""Results of studies: the results of each arm over seeds, and paired differences between arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from suffice import SufficeError
from suffice.link.models import ModelSettings
from suffice.link.study.arms import COMPARISONS, Arm
from suffice.link.study.run_settings import REFERENCES
from suffice.study.results import Group, Interval, group_records, mean_interval, paired_difference
from suffice.study.store import Record

# Arms whose gain under BatchNorm is compared with their gain under LayerNorm.
_ATTRIBUTED_ARMS = ("random+balanced", "random")


@dataclass(frozen=True)
class ArmResults:
    """Results of one model on one graph, trained in one way, over seeds.

    Args:
        graph: name of the graph.
        model: name of the model; for `encoder-decoder`, the name of its encoder.
        arm: key of the arm, such as `fixed/batch`.
        group: values by metric and seed, such as `group.values["kappa:heldout"][0]`.
        norms: norms of the model by option.
        verdicts: level of the verdict by seed.
        curves: response curve on held-out edges by seed: (fraction of positives, accuracy) of each point.
        learning_rate: learning rate of the training.

    """

    graph: str
    model: str
    arm: str
    group: Group
    norms: dict[str, str] = field(default_factory=dict[str, str])
    verdicts: dict[int, str] = field(default_factory=dict[int, str])
    curves: dict[int, list[tuple[float, float]]] = field(default_factory=dict[int, list[tuple[float, float]]])
    learning_rate: float | None = None

    def response_curve(self) -> list[tuple[float, Interval]]:
        """Return the accuracy on held-out edges at each fraction of positives: mean and 95 % t interval over seeds."""
        return [
            (points[0][0], mean_interval([accuracy for _, accuracy in points]))
            for points in zip(*self.curves.values(), strict=True)
        ]

    def verdict_counts(self) -> dict[str, int]:
        """Return how many seeds got each verdict."""
        levels = list(self.verdicts.values())
        return {level: levels.count(level) for level in dict.fromkeys(levels)}


@dataclass(frozen=True)
class StudyResults:
    """Results of a study on one graph.

    Args:
        graph: name of the graph.
        settings: settings that all runs share, `seeds` among them.
        arms: results by key of the arm, such as `fixed/batch`.
        references: alignment of `raw features` and of an `untrained` model; empty if the graph has no classes.

    """

    graph: str
    settings: dict[str, Any]
    arms: dict[str, ArmResults]
    references: dict[str, Group]

    def mean(self, arm: str, metric: str) -> Interval:
        """Return the mean of a metric over seeds and its 95 % t interval.

        Args:
            arm: key of the arm.
            metric: name of the metric; names of audit metrics include the edge set, as in `kappa:heldout`.

        """
        return self.arms[arm].group.interval(metric)

    def difference(self, arm: str, baseline: str, metric: str) -> Interval:
        """Return the difference of a metric between an arm and a baseline, paired by seed, and its 95 % t interval."""
        return self._difference([arm], [baseline], metric)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each arm and metric with the mean and its 95 % t interval."""
        return [
            {
                **results.norms,
                "arm": key.partition("/")[0],
                **_split_metric(metric),
                **asdict(results.group.interval(metric)),
            }
            for key, results in self.arms.items()
            for metric in results.group.values
        ]

    def reference_rows(self) -> list[dict[str, Any]]:
        """Return a row for each reference and metric with the mean and its 95 % t interval."""
        return [
            {"of": name, "metric": metric, **asdict(group.interval(metric))}
            for name, group in self.references.items()
            for metric in group.values
        ]

    def differences(self) -> list[dict[str, Any]]:
        """Return a row for each pair of arms and metric with the paired difference and its 95 % t interval.

        If the arms contain both norms, the last rows are differences of differences: the gain of an arm under BatchNorm
        minus its gain under LayerNorm, whose output does not depend on the batch.
        """
        sides = [([arm], [baseline]) for arm, baseline in COMPARISONS]
        sides += [([f"{name}/batch", "fixed/layer"], ["fixed/batch", f"{name}/layer"]) for name in _ATTRIBUTED_ARMS]
        return [
            {**_side_names(added, subtracted), **_split_metric(metric), **asdict(difference)}
            for added, subtracted in sides
            if {*added, *subtracted} <= self.arms.keys()
            for metric in self.arms[added[0]].group.values
            for difference in [self._difference(added, subtracted, metric)]
        ]

    def describe_learning_rates(self) -> str:
        """Return a sentence with the learning rate of the arms, if it is not the same for all; else an empty string."""
        by_rate: dict[float, list[str]] = {}
        for key, arm in self.arms.items():
            if arm.learning_rate is not None:
                by_rate.setdefault(arm.learning_rate, []).append(key)
        if len(by_rate) < 2:
            return ""
        texts = [f"{rate:g} for {', '.join(keys)}" for rate, keys in by_rate.items()]
        return f"The learning rate differs: {'; '.join(texts)}."

    def to_dict(self) -> dict[str, Any]:
        """Return the results as a JSON-serializable dictionary."""
        return {
            "graph": self.graph,
            "settings": self.settings,
            "rows": self.rows(),
            "references": self.reference_rows(),
            "differences": self.differences(),
            "verdicts": {key: list(results.verdicts.values()) for key, results in self.arms.items()},
            "learning_rates": {key: results.learning_rate for key, results in self.arms.items()},
            "curves": {
                key: [[fraction, *asdict(accuracy).values()] for fraction, accuracy in results.response_curve()]
                for key, results in self.arms.items()
            },
        }

    def _difference(self, added: Sequence[str], subtracted: Sequence[str], metric: str) -> Interval:
        difference = paired_difference(self._sum(added, metric), self._sum(subtracted, metric))
        if difference is None:
            raise ValueError(f"metric must have a value in every arm for a common seed, got {metric!r}")
        return difference.interval

    def _sum(self, arms: Sequence[str], metric: str) -> dict[int, float]:
        """Return the sum of a metric over arms, by seed."""
        values = [self.arms[arm].group.values[metric] for arm in arms]
        return {seed: sum(by_seed[seed] for by_seed in values) for seed in values[0]}


def collect_arms(records: Iterable[Record]) -> list[ArmResults]:
    """Return the results of finished runs of the kind `link.correct`, one for each graph, model and arm.

    References are left out.
    """
    done = [record for record in records if record.state == "done" and record.settings["arm"] not in REFERENCES]
    collected: list[ArmResults] = []
    for group in group_records(done):
        runs = {record.seed: record for record in done if record.flat_settings == group.settings}
        first = next(iter(runs.values()))
        model = ModelSettings.from_dict(first.result["model"])
        collected.append(
            ArmResults(
                graph=first.result["graph"]["name"],
                model=getattr(model, "encoder", model.name) if model.name == "encoder-decoder" else model.name,
                arm=Arm.from_setting(first.settings["arm"]).key,
                group=group,
                norms=model.norms,
                verdicts={seed: record.result["verdict"] for seed, record in runs.items()},
                curves={
                    seed: [(point[0], point[2]) for point in record.result["curve"]] for seed, record in runs.items()
                },
                learning_rate=first.result.get("train", {}).get("learning_rate"),
            )
        )
    return collected


def collect_study(graph: str, settings: dict[str, Any], records: Sequence[Record]) -> StudyResults:
    """Return the results of a study on one graph.

    Args:
        graph: name of the graph.
        settings: settings that all runs share, `seeds` among them.
        records: runs of every arm with every seed, and of references.

    Raises:
        SufficeError: a run is missing or has failed.

    """
    if unfinished := [record for record in records if record.state != "done"]:
        first = unfinished[0]
        reason = first.error.strip().splitlines()[-1] if first.error else first.state
        raise SufficeError(
            f"{len(unfinished)} of {len(records)} runs are not done. The first is arm {arm_key(first)}, "
            f"seed {first.seed}: {reason}"
        )
    references = group_records(record for record in records if record.settings["arm"] in REFERENCES)
    return StudyResults(
        graph,
        settings,
        {results.arm: results for results in collect_arms(records)},
        {str(group.settings["arm"]): _repeat_single_seed(group, settings["seeds"]) for group in references},
    )


def limit_interval(metric: str, interval: Interval) -> Interval:
    """Return an interval that ends where the values of its metric end, for tables.

    Args:
        metric: name of a metric. Hits@K, AUC and other fractions are from 0 to 1; other metrics have no limits.
        interval: t interval of its mean, which may be wider.

    """
    name = metric.partition(":")[0]
    is_fraction = name.startswith(("hits@", "auc", "accuracy")) or name.endswith(("nmi", "probe"))
    if not (is_fraction or name in ("ap", "mrr", "a_pure")) or not interval.has_bounds:
        return interval
    return Interval(interval.mean, max(interval.low, 0.0), min(interval.high, 1.0))


def arm_key(record: Record) -> str:
    """Return the key of the arm of a run, or the name of the reference."""
    arm = record.settings["arm"]
    return arm if arm in REFERENCES else Arm.from_setting(arm).key


def _repeat_single_seed(group: Group, seeds: Sequence[int]) -> Group:
    """Return a group with a value for every seed; raw features do not depend on the seed and are measured once."""
    if any(len(values) > 1 for values in group.values.values()):
        return group
    return Group(
        group.settings,
        {metric: dict.fromkeys(seeds, next(iter(values.values()))) for metric, values in group.values.items()},
    )


def _side_names(added: Sequence[str], subtracted: Sequence[str]) -> dict[str, str]:
    if len(added) == 1:
        return {"of": added[0], "minus": subtracted[0]}
    return {"of": f"({added[0]} − {subtracted[0]})", "minus": f"({subtracted[1]} − {added[1]})"}


def _split_metric(metric: str) -> dict[str, str]:
    name, _, edge_set = metric.partition(":")
    return {"metric": name, "edge_set": edge_set} if edge_set else {"metric": name}
