"""The smallest budget that keeps a user's own prompts close enough to the full cache, and with which policy."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suffice.kv.eval.compare import finished
from suffice.kv.eval.prompts import UserPrompt, write_prompts
from suffice.kv.eval.run_kinds import OWN, TUNE
from suffice.kv.policy.registry import DEFAULT_POLICY
from suffice.study.progress import ProgressCallback
from suffice.study.results import Group, group_records, mean_bound
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Store

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


@dataclass(frozen=True)
class Trial:
    """A policy, an allocation and a budget on the user's prompts.

    Args:
        mean: of the metric over prompts.
        bound: one-sided confidence bound of the mean: above it for KL, below it for agreement.
        within: share of the prompts that meet the target by themselves.
        safe: whether the bound meets the target, here and at every larger budget.
        bytes_kept: mean over prompts, after the prefill.

    """

    policy: str
    allocation: str
    budget: float
    mean: float
    bound: float
    within: float
    safe: bool
    bytes_kept: float


@dataclass(frozen=True)
class Tuning:
    """What was tried and what it comes to.

    Args:
        metric: `kl` or `agreement`.
        target: that the mean shall meet.
        confidence: with which it does, for all policies and allocations together.
        prompts: how many were read.
        trials: every one, budgets falling.
        settings: of the runs.

    """

    metric: str
    target: float
    confidence: float
    prompts: int
    trials: list[Trial]
    settings: dict[str, Any]

    @property
    def best(self) -> Trial | None:
        """The safe trial of the smallest budget, of these the closest to the full cache; None if none is safe."""
        safe = [trial for trial in self.trials if trial.safe]
        sign = 1 if self.metric == "kl" else -1
        return min(safe, key=lambda trial: (trial.bytes_kept, sign * trial.mean), default=None)

    @property
    def closest(self) -> Trial:
        """The trial whose bound is best, whether it meets the target or not."""
        pick = min if self.metric == "kl" else max
        return pick(self.trials, key=lambda trial: trial.bound)

    @property
    def beyond(self) -> Trial | None:
        """The next smaller budget of the best policy and allocation: where it stops being safe."""
        best = self.best
        if best is None:
            return None
        smaller = [
            trial
            for trial in self.trials
            if (trial.policy, trial.allocation) == (best.policy, best.allocation) and trial.budget < best.budget
        ]
        return max(smaller, key=lambda trial: trial.budget, default=None)

    def code(self) -> str:
        """Return the recommendation as lines of Python; empty if there is none."""
        best = self.best
        if best is None:
            return ""
        split = "" if best.allocation == OWN else f", allocation={best.allocation!r}"
        return (
            "from suffice.kv import CompressedCache\n\n"
            f"cache = CompressedCache(model, policy={best.policy!r}, budget={best.budget}{split})\n"
            "model.generate(**inputs, past_key_values=cache)\n"
        )

    def words(self) -> str:
        """Say what is recommended, how sure that is, and where it stops."""
        goal = f"mean KL ≤ {self.target:g}" if self.metric == "kl" else f"mean agreement ≥ {self.target:g}"
        best = self.best
        if best is None:
            near = self.closest
            return (
                f"No budget reaches {goal} at {self.confidence:.0%} confidence on these {self.prompts} prompts. "
                f"Closest: {_named(near)} with mean {near.mean:.4f}, bound {near.bound:.4f}. Raise the target, give "
                "more prompts, or try larger budgets"
            )
        said = (
            f"{_named(best)} keeps {goal} at {self.confidence:.0%} confidence on {self.prompts} prompts: mean "
            f"{best.mean:.4f}, bound {best.bound:.4f}; {best.within:.0%} of the prompts meet it by themselves."
        )
        beyond = self.beyond
        if beyond is None:
            return said + " It is the smallest budget that was tried."
        return (
            said + f" At {beyond.budget:g} that is no longer shown: mean {beyond.mean:.4f}, bound {beyond.bound:.4f}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {
            "metric": self.metric,
            "target": self.target,
            "confidence": self.confidence,
            "prompts": self.prompts,
            "recommended": None if self.best is None else asdict(self.best),
            "stops_at": None if self.beyond is None else asdict(self.beyond),
            "code": self.code(),
            "trials": [asdict(trial) for trial in self.trials],
            "settings": self.settings,
        }


def tune(
    prompts: Sequence[UserPrompt | str],
    *,
    target_kl: float | None = None,
    target_agreement: float | None = None,
    policies: Sequence[str] = (DEFAULT_POLICY, "h2o", "keydiff"),
    allocations: Sequence[str] = (OWN, "profile"),
    budgets: Sequence[float] = BUDGETS,
    mode: str = "aware",
    confidence: float = 0.95,
    new_tokens: int = 32,
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    attn: str = "sdpa",
    folder: str | Path | None = None,
    workers: int = 0,
    watch: ProgressCallback | None = None,
    command: str = "",
) -> Tuning:
    """Find the smallest budget, and the policy and allocation, that stay close to the full cache on a user's prompts.

    The full cache goes on greedily from each prompt, and every other cache is measured on what it said. A budget is
    safe if the one-sided Student's t bound of the mean over prompts meets the target. Budgets are tried from the
    largest down and a policy with its allocation stops at the first that fails, so that the number of budgets costs no
    confidence; that of policies and allocations is paid for by Bonferroni's correction.

    Args:
        prompts: as they will be sent; at least 2.
        target_kl: most KL divergence from the full cache, nats a token. Give this or `target_agreement`.
        target_agreement: least share of greedy tokens that come the same at the same place, 0 to 1.
        policies: by name.
        allocations: by name, with every policy; `"own"` stands for the policy's own.
        budgets: what is tried, as fractions or entries.
        mode: `"aware"`, or `"agnostic"` to evict before the questions are seen.
        confidence: of the statement, over one half and below 1.
        new_tokens: how far the full cache goes on.
        model: a Hugging Face model id or local folder; None takes the default model.
        device: a torch device.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        attn: `"sdpa"` or `"eager"`.
        folder: a store of finished prompts, to go on from; it holds a copy of the prompts.
        workers: processes to measure in; 0 for this one.
        watch: shows progress.
        command: what to type for this, for reports.

    Raises:
        TypeError, ValueError: an argument is impossible; nothing was done yet.
        SufficeError: a prompt failed, as one that is longer than the model's window; the others are kept.

    """
    if (target_kl is None) == (target_agreement is None):
        raise ValueError(
            f"target_kl is {target_kl}, target_agreement is {target_agreement}; accepted: exactly one of them"
        )
    if target_kl is not None and not 0 < target_kl < math.inf:
        raise ValueError(f"target_kl is {target_kl}; accepted: above 0 nats a token")
    if target_agreement is not None and not 0 < target_agreement <= 1:
        raise ValueError(f"target_agreement is {target_agreement}; accepted: above 0, at most 1")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; accepted: above .5, below 1")
    given = [UserPrompt(one) if isinstance(one, str) else one for one in prompts]
    if len(given) < 2:
        raise ValueError(f"prompts has {len(given)}; accepted: at least 2, or nothing is known of their spread")
    lacking = [number for number, one in enumerate(given) if one.question is None]
    if mode not in ("aware", "agnostic") or (mode == "agnostic" and lacking):
        some = f" (prompt {lacking[0]} has no question)" if lacking else ""
        raise ValueError(f"mode is {mode!r}{some}; accepted: aware, or agnostic where every prompt has a question")
    metric, target = ("kl", target_kl) if target_kl is not None else ("agreement", target_agreement)
    assert target is not None
    shared = {
        "policies": list(policies),
        "allocations": list(allocations),
        "budgets": sorted(budgets, reverse=True),
        "mode": mode,
        "new_tokens": new_tokens,
        "model": model,
        "device": device,
        "dtype": dtype,
        "attn": attn,
    }
    about = {"command": command} if command else {}
    TUNE.complete(shared)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as home:
        Path(home).mkdir(parents=True, exist_ok=True)
        file = _kept(given, Path(home))
        settings = TUNE.complete({**shared, "prompts": file})
        plan = [PlannedRun(settings, number, (file,)) for number in range(len(given))]
        name = Path(file).stem
        run_study(home, TUNE, plan, name=name, about=about, workers=workers, retry_failed=True, on_progress=watch)
        with Store(home, read_only=True) as store:
            records = list(store.records(name))
    trials = _trials(group_records(finished(records)), metric, target, 1 - confidence)
    return Tuning(metric, target, confidence, len(given), trials, shared)


def _kept(prompts: list[UserPrompt], home: Path) -> str:
    """Write the prompts into the study's folder, under a name that their content decides."""
    digest = hashlib.sha256(json.dumps([asdict(one) for one in prompts]).encode()).hexdigest()[:16]
    name = f"prompts-{digest}.jsonl"
    if not (home / name).exists():
        write_prompts(prompts, home / name)
    return name


def _trials(groups: Sequence[Group], metric: str, target: float, error: float) -> list[Trial]:
    arms: dict[tuple[str, str], list[Group]] = {}
    for one in groups:
        if one.settings["policy"] != "full":
            arms.setdefault((one.settings["policy"], one.settings["allocation"]), []).append(one)
    sign = 1 if metric == "kl" else -1
    found: list[Trial] = []
    for (policy, allocation), own in arms.items():
        safe = True
        for one in own:
            values = list(one.values[metric].values())
            mean = statistics.fmean(values)
            bound = mean_bound(values, confidence=1 - error / len(arms), upper=metric == "kl")
            safe = safe and sign * bound <= sign * target
            met = sum(sign * value <= sign * target for value in values) / len(values)
            kept = one.interval("bytes_kept").mean
            found.append(Trial(policy, allocation, one.settings["budget"], mean, bound, met, safe, kept))
    return found


def _named(trial: Trial) -> str:
    split = "" if trial.allocation == OWN else f", allocation {trial.allocation},"
    return f"{trial.policy}{split} at budget {trial.budget:g}"
