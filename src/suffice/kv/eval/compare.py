"""Compare policies, allocations, sizes, numbers of bits and repair: which caches stay closest to the full cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from suffice.arguments import check_flag, check_int, check_list, check_path, shown
from suffice.kv.eval.cache_grid import CacheGrid, describe_size, mean_bytes, repair_suffix
from suffice.kv.eval.run_kinds import COMPARE
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.eval.samples import check_memory
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import DEFAULT_POLICY, OWN_ALLOCATION
from suffice.kv.storage.quantization import Bits, shortest_bits
from suffice.study.results import (
    Group,
    Interval,
    bootstrap_interval,
    group_records,
    mean_interval,
    summarize,
)
from suffice.study.spec import PlannedRun

DEFAULT_TASKS = (("text", "continuation"), ("multikey", "agnostic"), ("multikey", "aware"))
_COLUMNS = ("task", "mode", "policy", "allocation", "budget")
_DEFAULT_BUDGETS = (0.5, 0.25)


class Condition(NamedTuple):
    """A task, a mode of eviction, a budget or a limit on the bytes, and a number of bits, under which methods compete.

    `budget` is None with `memory`. `bits` is None if entries are not quantized, or if the bits follow from `memory`.
    """

    task: str
    mode: str
    budget: float | None
    bits: Bits | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    A method is a policy with an allocation, such as `h2o/profile`; `h2o` alone has the policy's own allocation. With
    repair it is another method, such as `h2o, repair`, so that the differences show what repair changes.

    Args:
        settings: what was compared, and the model.
        groups: the values of all samples for each task, mode and cache of the grid, and for the full cache.

    """

    settings: dict[str, Any]
    groups: list[Group]

    @property
    def methods(self) -> list[str]:
        """The names of all methods."""
        return list(dict.fromkeys(_method(group) for group in self._compressed()))

    @property
    def conditions(self) -> list[Condition]:
        """All tasks, modes, budgets or limits on the bytes, and numbers of bits."""
        return list(dict.fromkeys(_condition(group) for group in self._compressed()))

    @property
    def is_quantized(self) -> bool:
        """Whether numbers of bits are given for some caches."""
        return any(condition.bits is not None for condition in self.conditions)

    @property
    def has_limits(self) -> bool:
        """Whether limits on the bytes are given for some caches."""
        return any(condition.memory is not None for condition in self.conditions)

    @property
    def has_repair(self) -> bool:
        """Whether the kept entries of some caches are repaired."""
        return any(group.settings.get("repair") for group in self.groups)

    def rows(self) -> list[dict[str, Any]]:
        """Return the mean and the 95 % bootstrap interval over samples of every metric of every cache."""
        optional = {"bits": self.is_quantized, "memory": self.has_limits, "repair": self.has_repair}
        columns = (*_COLUMNS, *(name for name, is_given in optional.items() if is_given))
        rows = summarize(self.groups, columns, metric_interval)
        return [{**row, "repair": bool(row["repair"])} for row in rows] if self.has_repair else rows

    def share_of_bytes(self, method: str, condition: Condition | tuple[str, str, float]) -> float:
        """Return the bytes of everything that a cache holds, as a share of the keys and values of the full cache.

        Both are means over samples.
        """
        group = self.group(method, condition)
        return mean_bytes(group) / group.interval("bytes_full").mean

    def group(self, method: str, condition: Condition | tuple[str, str, float]) -> Group:
        """Return the values of a method under a condition.

        Args:
            method: name of a method.
            condition: task, mode and budget, or a `Condition`.

        Raises:
            ValueError: the method was not measured under this condition.

        """
        searched = condition if isinstance(condition, Condition) else Condition(*condition)
        for group in self._compressed():
            if _method(group) == method and _condition(group) == searched:
                return group
        raise ValueError(
            f"method must be one of {', '.join(self.methods)}, and condition one under which it was measured, got "
            f"{method!r} and {tuple(condition)!r}"
        )

    def mean_ranks(self, metric: str = "kl") -> dict[str, float]:
        """Return the mean rank of each method over all conditions; rank 1 is the lowest mean. The best comes first."""
        ranks: dict[str, list[float]] = {method: [] for method in self.methods}
        for condition in self.conditions:
            means = [self.group(method, condition).interval(metric).mean for method in ranks]
            for method, rank in zip(ranks, _ranks(means), strict=True):
                ranks[method].append(rank)
        means = {method: statistics.fmean(values) for method, values in ranks.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def differences(self, baseline: str, metric: str = "kl") -> list[dict[str, Any]]:
        """Return how much each other method differs from a baseline, paired by sample.

        Args:
            baseline: name of a method.
            metric: name of a metric.

        Returns:
            One row for each condition and method: the fields of `Condition`, `method`, `baseline`, `metric`; `mean`,
            `low` and `high` of method − baseline (95 % t interval); `samples`.

        """
        rows: list[dict[str, Any]] = []
        for condition in self.conditions:
            base = self.group(baseline, condition)
            for method in self.methods:
                if method == baseline:
                    continue
                difference = self.group(method, condition).difference(base, metric)
                if difference is None:
                    continue
                rows.append(
                    {
                        **condition._asdict(),
                        "method": method,
                        "baseline": baseline,
                        "metric": metric,
                        **asdict(difference.interval),
                        "samples": difference.num_seeds,
                    }
                )
        return rows

    def closer_methods(self, method: str, metric: str = "kl") -> list[dict[str, Any]]:
        """Return the rows of `differences` in which another method is significantly closer to the full cache."""
        return [row for row in self.differences(method, metric) if row["high"] < 0]

    def capacity_correlations(self) -> list[dict[str, Any]]:
        """Return Spearman's correlation between retained capacity and KL over methods, for each condition.

        A negative value means that methods that keep more of the capacity stay closer to the full cache. Conditions
        under which the capacity was measured for fewer than three methods are left out.
        """
        rows: list[dict[str, Any]] = []
        for condition in self.conditions:
            groups = [self.group(method, condition) for method in self.methods]
            groups = [group for group in groups if "capacity_retained" in group.values]
            if len(groups) < 3:
                continue
            capacity = [group.interval("capacity_retained").mean for group in groups]
            kl = [group.interval("kl").mean for group in groups]
            rows.append({**condition._asdict(), "spearman": spearman(capacity, kl), "methods": len(groups)})
        return rows

    def summary(self) -> str:
        """Describe the best method, the conditions in which others are closer, and the capacity correlations."""
        best = next(iter(self.mean_ranks()))
        lines = [f"Best mean rank: {best}."]
        closer = self.closer_methods(best)
        lines += [
            f"On {row['task']}, {row['mode']}, {describe_size(row['budget'], row['bits'], row['memory'])}, "
            f"{row['method']} is closer by {-row['mean']:.3f} [{-row['high']:.3f}, {-row['low']:.3f}]."
            for row in closer
        ]
        if not closer:
            lines.append("No other method is significantly closer in any condition (95 % intervals, uncorrected).")
        correlations = [f"{row['spearman']:+.2f}" for row in self.capacity_correlations()]
        if correlations:
            lines.append(f"Correlation of retained capacity and KL, by condition: {', '.join(correlations)}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return settings, rows, ranks, rows in which a method is closer than the best, and correlations for JSON."""
        ranks = self.mean_ranks()
        return {
            "settings": self.settings,
            "rows": self.rows(),
            "mean_rank": ranks,
            "closer_methods": self.closer_methods(next(iter(ranks))),
            "capacity": self.capacity_correlations(),
        }

    def _compressed(self) -> list[Group]:
        return [group for group in self.groups if group.settings["policy"] != "full"]


def metric_interval(group: Group, metric: str) -> Interval:
    """Return the mean of a metric over samples and its 95 % bootstrap interval.

    The interval lies between the smallest and the largest value. Student's t interval would also contain values that
    the metric cannot have, such as a negative KL divergence. There is no interval with a single sample.
    """
    values = list(group.values[metric].values())
    return mean_interval(values) if len(values) == 1 else bootstrap_interval(values)


def compare(
    *,
    policies: Sequence[str] = (DEFAULT_POLICY, "h2o", "snapkv", "keydiff"),
    allocations: Sequence[str] = (OWN_ALLOCATION,),
    budgets: Sequence[float] | None = None,
    bits: Sequence[Bits | None] = (None,),
    memory: Sequence[float | str] | None = None,
    repair: Sequence[bool] = (False,),
    tasks: Sequence[tuple[str, str]] = DEFAULT_TASKS,
    tokens: int = 900,
    samples: int = 8,
    seed: int = 0,
    haystack: str | Path | None = None,
    answer: bool = True,
    greedy_tokens: int = 0,
    measure_capacity: bool = True,
    model: str | ModelSource | None = None,
    run: RunOptions | None = None,
) -> Comparison:
    """Compare how close compressed caches stay to the full cache. All caches of a sample share one prefill.

    Caches evict once, after the prefill, also with `memory`; see `evaluate`.

    Args:
        policies: names of policies.
        allocations: names of allocations, each combined with every policy; `"own"` is the policy's own allocation.
        budgets: numbers of tokens (integers), or fractions; None means 0.5 and 0.25, or none with `memory`.
        bits: numbers of bits of quantized entries, or pairs (bits of keys, bits of values), each combined with every
            budget; None stands for entries in the model's dtype, or for the bits that follow from `memory`.
        memory: limits on the bytes instead of budgets: fractions of those of the full cache, or numbers of bytes, such
            as `"2GiB"`; see `CompressedCache`.
        repair: whether kept entries are repaired: `[False]`, `[True]`, or `[False, True]` to compare both; see
            `CompressedCache`.
        tasks: pairs of a task and a mode of eviction, as in `suffice.kv.eval.tasks`.
        tokens: maximum number of tokens in a prompt.
        samples: number of examples of each task.
        seed: seed of the first example.
        haystack: path of a text file to make the prompts from; Python's help texts by default.
        answer: also generate an answer from each cache and score it.
        greedy_tokens: also compare this many greedily generated tokens; 0 skips this.
        measure_capacity: also measure the share of the capacity that is kept.
        model: a name that `load_model` accepts, or a `ModelSource`; None loads the default model.
        run: folder for finished samples, and number of worker processes.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or a limit on the bytes is too small
            for prompts of `tokens` tokens; raised before anything is measured.
        SufficeError: samples failed. The others are stored in the folder, and a second call repeats the failed ones.

    Example:
        >>> result = compare(policies=["capkv", "h2o"], budgets=[0.25], samples=4)    # doctest: +SKIP
        >>> result.mean_ranks()                                                       # doctest: +SKIP
        {'capkv': 1.0, 'h2o': 2.0}

    """
    tokens, samples, seed = check_int("tokens", tokens, 1), check_int("samples", samples, 1), check_int("seed", seed, 0)
    tasks = _check_tasks(tasks)
    run = RunOptions.from_argument(run)
    if budgets is None and memory is None:
        budgets = _DEFAULT_BUDGETS
    grid = CacheGrid(policies, allocations, budgets, bits, memory, repair)
    source = ModelSource.from_name(model)
    settings = {
        "tokens": tokens,
        "haystack": None if haystack is None else check_path("haystack", haystack),
        "answer": check_flag("answer", answer),
        "greedy_tokens": check_int("greedy_tokens", greedy_tokens, 0),
        "measure_capacity": check_flag("measure_capacity", measure_capacity),
        "caches": grid.settings(),
        "model": asdict(source),
    }
    by_task = [COMPARE.complete({**settings, "task": task, "mode": mode}) for task, mode in tasks]
    plan = [PlannedRun(own, sample) for sample in range(seed, seed + samples) for own in by_task]
    check = partial(check_memory, source, grid.caches(), lambda _: tokens, keep_model=run.workers == 0)
    with run.open_folder() as folder:
        records = run_samples(folder, COMPARE, plan, "compare", run, check=check)
    return Comparison({**settings, "samples": samples, "seed": seed}, group_records(records))


def _check_tasks(tasks: object) -> list[tuple[str, str]]:
    """Return the argument `tasks` of `compare`."""
    accepted = "pairs (task, mode)", "[('multikey', 'aware')]"
    pairs: list[tuple[str, str]] = []
    for item in check_list("tasks", tasks, *accepted):
        pair = tuple(cast("Sequence[Any]", item)) if isinstance(item, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise TypeError(f"tasks must be a list of {accepted[0]}, such as {accepted[1]}, got {shown(item)} in it")
        pairs.append(pair)
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"tasks must hold at least one (task, mode) pair and no duplicates, got {pairs!r}")
    return pairs


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 if one of the sequences is constant."""
    ranks = _ranks(first), _ranks(second)
    if min(len(set(side)) for side in ranks) < 2:
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, 1 for the lowest; equal values share the mean of their ranks."""
    from scipy.stats import rankdata  # imported here, because importing scipy takes a second

    return rankdata(values).tolist()


def _method(group: Group) -> str:
    policy, allocation = group.settings["policy"], group.settings["allocation"]
    name = policy if allocation == OWN_ALLOCATION else f"{policy}/{allocation}"
    return name + repair_suffix(group.settings.get("repair", False))


def _condition(group: Group) -> Condition:
    settings = group.settings
    bits = shortest_bits(settings.get("bits"))
    return Condition(settings["task"], settings["mode"], settings["budget"], bits, settings.get("memory"))
