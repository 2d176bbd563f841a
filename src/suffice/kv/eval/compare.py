"""Policies × allocations × budgets × tasks: which cache stays closest to the full one, and by how much."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suffice import SufficeError
from suffice.kv.eval.run_kinds import COMPARE, OWN
from suffice.kv.policy.registry import DEFAULT_POLICY
from suffice.study.progress import ProgressCallback
from suffice.study.results import Group, group_records, paired_difference, summarize
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Record, Store

TASKS = (("text", "continuation"), ("multikey", "agnostic"), ("multikey", "aware"))
_NAMES = ("task", "mode", "policy", "allocation", "budget")


@dataclass(frozen=True)
class Comparison:
    """What a comparison measured.

    Args:
        settings: what was compared, on which model.
        groups: one for each task, mode, policy, allocation and budget, with the values of every sample; the full
            cache is among them.

    """

    settings: dict[str, Any]
    groups: list[Group]

    @property
    def contestants(self) -> list[str]:
        """Every policy with its allocation, as `h2o/profile`; without a slash where it is the policy's own."""
        return list(dict.fromkeys(_contestant(one) for one in self.groups if one.settings["policy"] != "full"))

    @property
    def cells(self) -> list[tuple[str, str, float]]:
        """Every task, mode and budget."""
        found = (
            (one.settings["task"], one.settings["mode"], one.settings["budget"])
            for one in self.groups
            if one.settings["policy"] != "full"
        )
        return list(dict.fromkeys(found))

    def rows(self) -> list[dict[str, Any]]:
        """Return mean and 95 % t interval over samples of every cache and metric."""
        return summarize(self.groups, _NAMES)

    def find(self, contestant: str, cell: tuple[str, str, float]) -> Group:
        """Return the values of a contestant in a cell."""
        for one in self.groups:
            own = (one.settings["task"], one.settings["mode"], one.settings["budget"])
            if own == cell and _contestant(one) == contestant and one.settings["policy"] != "full":
                return one
        raise ValueError(f"contestant is {contestant!r}, cell {cell!r}; accepted: one of {self.contestants}")

    def ranks(self, metric: str = "kl") -> dict[str, float]:
        """Return each contestant's mean rank over all cells, 1 for the lowest mean, best first."""
        placed: dict[str, list[float]] = {name: [] for name in self.contestants}
        for cell in self.cells:
            means = [self.find(name, cell).interval(metric).mean for name in placed]
            for name, rank in zip(placed, ranked(means), strict=True):
                placed[name].append(rank)
        found = {name: statistics.fmean(ranks) for name, ranks in placed.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def against(self, best: str, metric: str = "kl") -> list[dict[str, Any]]:
        """Return how much each other contestant differs from one, sample by sample, with 95 % t intervals."""
        rows: list[dict[str, Any]] = []
        for task, mode, budget in self.cells:
            base = self.find(best, (task, mode, budget)).values[metric]
            for name in self.contestants:
                if name == best:
                    continue
                own = self.find(name, (task, mode, budget)).values[metric]
                difference = paired_difference(own, base)
                if difference is None:
                    continue
                rows.append(
                    {
                        "task": task,
                        "mode": mode,
                        "budget": budget,
                        "of": name,
                        "minus": best,
                        "metric": metric,
                        **asdict(difference.interval),
                        "samples": difference.num_seeds,
                    }
                )
        return rows

    def losses(self, best: str, metric: str = "kl") -> list[dict[str, Any]]:
        """Return where another contestant is closer to the full cache, with an interval that leaves out 0."""
        return [row for row in self.against(best, metric) if row["high"] < 0]

    def capacity(self) -> list[dict[str, Any]]:
        """Return, for each cell, Spearman's correlation over contestants of the capacity kept with the KL.

        Negative where keeping more of the capacity goes with staying closer. Empty where capacity was not measured.
        """
        rows: list[dict[str, Any]] = []
        for task, mode, budget in self.cells:
            groups = [self.find(name, (task, mode, budget)) for name in self.contestants]
            groups = [one for one in groups if "capacity_retained" in one.values]
            if len(groups) < 3:
                continue
            kept = [one.interval("capacity_retained").mean for one in groups]
            kl = [one.interval("kl").mean for one in groups]
            rows.append(
                {"task": task, "mode": mode, "budget": budget, "spearman": spearman(kept, kl), "caches": len(groups)}
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        ranks = self.ranks()
        return {
            "settings": self.settings,
            "rows": self.rows(),
            "mean_rank": ranks,
            "losses": self.losses(next(iter(ranks))),
            "capacity": self.capacity(),
        }


def compare(
    *,
    policies: Sequence[str] = (DEFAULT_POLICY, "h2o", "snapkv", "keydiff"),
    allocations: Sequence[str] = (OWN,),
    budgets: Sequence[float] = (0.5, 0.25),
    tasks: Sequence[tuple[str, str]] = TASKS,
    tokens: int = 900,
    samples: int = 8,
    seed: int = 0,
    haystack: str | None = None,
    answer: bool = True,
    greedy_tokens: int = 0,
    measure_capacity: bool = True,
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    attn: str = "sdpa",
    folder: str | Path | None = None,
    workers: int = 0,
    watch: ProgressCallback | None = None,
    command: str = "",
) -> Comparison:
    """Measure how close caches stay to the full one; all caches of a sample share one prefill.

    Args:
        policies: by name.
        allocations: by name, with every policy; `"own"` stands for the policy's own.
        budgets: entries (whole numbers) or fractions.
        tasks: task and mode, as `suffice.kv.eval.tasks` has them.
        tokens: most tokens of a prompt.
        samples: examples of each task.
        seed: the first one's.
        haystack: a text file that prompts are made from; None takes Python's manual.
        answer: let every cache answer, and score it.
        greedy_tokens: also compare greedy continuations of so many tokens; 0 for not.
        measure_capacity: measure the share of the capacity that is kept.
        model: a Hugging Face model id or local folder; None takes the default model.
        device: a torch device.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        attn: `"sdpa"` or `"eager"`.
        folder: a store of finished samples, to go on from.
        workers: processes to measure in; 0 for this one.
        watch: shows progress.
        command: what to type for this comparison, for its reports.

    Raises:
        TypeError, ValueError: an argument is unknown or impossible; nothing was done yet.
        SufficeError: samples failed; the others are kept, and a second call tries those again.

    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; accepted: at least 1")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks is {list(tasks)!r}; accepted: at least one, each once")
    shared = {
        "policies": list(policies),
        "allocations": list(allocations),
        "budgets": list(budgets),
        "tokens": tokens,
        "haystack": haystack,
        "answer": answer,
        "greedy_tokens": greedy_tokens,
        "measure_capacity": measure_capacity,
        "model": model,
        "device": device,
        "dtype": dtype,
        "attn": attn,
    }
    every = [COMPARE.complete({**shared, "task": task, "mode": mode}) for task, mode in tasks]
    plan = [PlannedRun(settings, number) for number in range(seed, seed + samples) for settings in every]
    about = {"command": command} if command else {}
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as home:
        run_study(
            home, COMPARE, plan, name="compare", about=about, workers=workers, retry_failed=True, on_progress=watch
        )
        with Store(home, read_only=True) as store:
            records = list(store.records("compare"))
    return Comparison({**shared, "samples": samples, "seed": seed}, group_records(finished(records)))


def finished(records: Sequence[Record]) -> Sequence[Record]:
    """Return the records, or say which are not done.

    Raises:
        SufficeError: a run is missing or failed.

    """
    if undone := [record for record in records if record.state != "done"]:
        first = undone[0]
        why = first.error.strip().splitlines()[-1] if first.error else first.state
        raise SufficeError(
            f"{len(undone)} of {len(records)} samples are not done; the others are kept. The first, seed {first.seed}: "
            f"{why}"
        )
    return records


def ranked(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, 1 for the lowest; equal values share the mean of their ranks."""
    order = sorted(values)
    return [(2 * order.index(value) + order.count(value) + 1) / 2 for value in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    ranks = ranked(one), ranked(other)
    if min(len(set(side)) for side in ranks) < 2:
        return 0.0
    return statistics.correlation(*ranks)


def _contestant(one: Group) -> str:
    policy, allocation = one.settings["policy"], one.settings["allocation"]
    return policy if allocation == OWN else f"{policy}/{allocation}"
