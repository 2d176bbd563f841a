"""Find the smallest cache that stays close enough to the full cache on a user's own prompts."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suffice.kv.eval.cache_grid import OWN_ALLOCATION, CacheGrid, describe_size
from suffice.kv.eval.run_kinds import TUNE
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.eval.user_prompts import UserPrompt, write_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.registry import DEFAULT_POLICY, get_policy
from suffice.kv.storage.quantization import Bits, shortest_bits
from suffice.study.results import Group, group_records, mean_bound
from suffice.study.spec import PlannedRun

DEFAULT_BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


@dataclass(frozen=True)
class Trial:
    """The result of one cache on the user's prompts.

    Args:
        policy: name of the policy.
        allocation: name of the allocation; `"own"` is the policy's own.
        budget: number of tokens, or fraction of the tokens seen; None with `memory`.
        mean: mean of the metric over prompts.
        bound: one-sided confidence bound of the mean: an upper bound of KL, a lower bound of agreement.
        within: share of the prompts that meet the target individually.
        safe: whether the bound meets the target at this budget or limit, and at every larger one.
        bytes_kept: mean bytes of the cache after the prefill.
        bits: number of bits of quantized entries; None if they are not quantized, or follow from `memory`.
        memory: limit on the bytes, as a fraction or a number; None with `budget`.

    """

    policy: str
    allocation: str
    budget: float | None
    mean: float
    bound: float
    within: float
    safe: bool
    bytes_kept: float
    bits: Bits | None = None
    memory: float | None = None

    @property
    def arm(self) -> tuple[str, str, Bits | None]:
        """Policy, allocation and number of bits, for which budgets are tested from the largest to the smallest."""
        return self.policy, self.allocation, self.bits

    @property
    def size(self) -> float:
        """The budget, or the limit on the bytes."""
        return (self.memory if self.budget is None else self.budget) or 0


@dataclass(frozen=True)
class TuningResult:
    """The result of `tune`.

    Args:
        metric: `"kl"` or `"agreement"`.
        target: the value that the mean of the metric must meet.
        confidence: confidence level of the bounds, jointly for all policies, allocations and numbers of bits.
        num_prompts: number of prompts.
        trials: all trials; within a policy, allocation and number of bits, from the largest budget (or limit) to the
            smallest.
        settings: settings of the runs.

    """

    metric: str
    target: float
    confidence: float
    num_prompts: int
    trials: list[Trial]
    settings: dict[str, Any]

    @property
    def best(self) -> Trial | None:
        """The safe trial with the fewest bytes, and of several the one with the best mean; None if no trial is safe."""
        safe = [trial for trial in self.trials if trial.safe]
        sign = 1 if self.metric == "kl" else -1
        return min(safe, key=lambda trial: (trial.bytes_kept, sign * trial.mean), default=None)

    @property
    def closest(self) -> Trial:
        """The trial with the best bound, whether or not it meets the target."""
        best = min if self.metric == "kl" else max
        return best(self.trials, key=lambda trial: trial.bound)

    @property
    def next_smaller(self) -> Trial | None:
        """The trial of the best policy, allocation and bits with the next smaller budget or limit; None if none."""
        best = self.best
        if best is None:
            return None
        smaller = [trial for trial in self.trials if trial.arm == best.arm and trial.size < best.size]
        return max(smaller, key=lambda trial: trial.size, default=None)

    def code(self) -> str:
        """Return the Python code that uses the recommended cache; an empty string if no trial is safe."""
        best = self.best
        if best is None:
            return ""
        allocation = "" if best.allocation == OWN_ALLOCATION else f", allocation={best.allocation!r}"
        bits = "" if best.bits is None else f", bits={best.bits}"
        size = f"budget={best.budget}" if best.memory is None else f"memory={best.memory}"
        evict = "" if best.memory is None else ', evict="prefill"'
        has_replay = get_policy(best.policy).needs_replay
        return (
            f"from suffice.kv import CompressedCache{', prefill' if has_replay else ''}\n\n"
            f"cache = CompressedCache(model, policy={best.policy!r}, {size}{allocation}{bits}{evict})\n"
            + ("prefill(model, document, [cache], tokenizer=tokenizer)\n" if has_replay else "")
            + "model.generate(**inputs, past_key_values=cache)\n"
        )

    def summary(self) -> str:
        """Describe the recommended cache, the confidence, and the next smaller budget."""
        goal = f"mean KL ≤ {self.target:g}" if self.metric == "kl" else f"mean agreement ≥ {self.target:g}"
        best = self.best
        kind = "budget" if self.closest.memory is None else "memory limit"
        if best is None:
            closest = self.closest
            return (
                f"No {kind} reaches {goal} at {self.confidence:.0%} confidence on these {self.num_prompts} prompts. "
                f"Closest: {_describe(closest)} with mean {closest.mean:.4f}, bound {closest.bound:.4f}. Relax the "
                f"target, provide more prompts, or try larger {kind}s."
            )
        text = (
            f"{_describe(best)} meets {goal} at {self.confidence:.0%} confidence on {self.num_prompts} prompts: mean "
            f"{best.mean:.4f}, bound {best.bound:.4f}; {best.within:.0%} of the prompts meet the target individually."
        )
        smaller = self.next_smaller
        if smaller is None:
            return f"{text} It is the smallest {kind} that was tried."
        size = describe_size(smaller.budget, smaller.bits, smaller.memory)
        return f"{text} {size[0].upper()}{size[1:]} is not safe: mean {smaller.mean:.4f}, bound {smaller.bound:.4f}."

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "metric": self.metric,
            "target": self.target,
            "confidence": self.confidence,
            "prompts": self.num_prompts,
            "recommended": None if self.best is None else asdict(self.best),
            "next_smaller": None if self.next_smaller is None else asdict(self.next_smaller),
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
    allocations: Sequence[str] = (OWN_ALLOCATION, "profile"),
    budgets: Sequence[float] | None = None,
    bits: Sequence[Bits | None] = (None,),
    memory: Sequence[float | str] | None = None,
    mode: str = "aware",
    confidence: float = 0.95,
    max_new_tokens: int = 32,
    model: str | ModelSource | None = None,
    run: RunOptions | None = None,
) -> TuningResult:
    """Find the smallest budget or memory, with its policy, that stays close to the full cache on your prompts.

    The full cache answers each prompt greedily, and every other cache is measured on that answer. A budget is safe if
    the one-sided Student's t bound of the mean over prompts meets the target. For each policy, allocation and number of
    bits, budgets are tested from the largest to the smallest, and all budgets after the first failure count as not
    safe. Testing in this fixed order needs no correction for the number of budgets. A Bonferroni correction accounts
    for the number of policies, allocations and numbers of bits. Limits on the bytes are tested in the same order.

    Caches evict once, after the prefill, also with `memory`; see `evaluate`.

    Args:
        prompts: your prompts, at least 2.
        target_kl: maximum mean KL divergence from the full cache, in nats per token. Give this or `target_agreement`.
        target_agreement: minimum mean share of greedy tokens that equal the full cache's at their position, 0 to 1.
        policies: names of policies.
        allocations: names of allocations, each combined with every policy; `"own"` is the policy's own allocation.
        budgets: the budgets to try: fractions, or numbers of tokens. None means 11 budgets from 0.9 to 0.05, or none
            with `memory`.
        bits: numbers of bits of quantized entries to try, or pairs (bits of keys, bits of values); None stands for
            entries in the model's dtype, or for the bits that follow from `memory`.
        memory: limits on the bytes to try instead of budgets: fractions of those of the full cache, or numbers of bytes
            such as `"2GiB"`; see `CompressedCache`.
        mode: `"aware"` evicts after the question is seen, `"agnostic"` before it.
        confidence: confidence of the result, above 0.5 and below 1.
        max_new_tokens: maximum length of the full cache's answers.
        model: a name that `load_model` accepts, or a `ModelSource`; None loads the default model.
        run: folder for finished measurements, and number of worker processes. A copy of the prompts is written to
            the folder.

    Raises:
        TypeError, ValueError: an argument is out of range; raised before anything is measured.
        SufficeError: a prompt failed, for example because it is longer than the context window. The others are stored.

    Example:
        >>> result = tune(prompts, target_kl=0.05)                                    # doctest: +SKIP
        >>> print(result.summary())                                                   # doctest: +SKIP

    """
    prompts = [UserPrompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    metric, target = _check_target(target_kl, target_agreement)
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be above 0.5 and below 1, got {confidence}")
    _check_prompts(prompts, mode)
    run = run or RunOptions()
    if budgets is None and memory is None:
        budgets = DEFAULT_BUDGETS
    caches = CacheGrid(list(policies), list(allocations), budgets, bits, memory)
    settings = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "caches": caches.largest_first().settings(),
        "model": asdict(ModelSource.from_name(model)),
    }
    TUNE.complete(settings)
    with run.open_folder() as folder:
        file = _store_prompts(prompts, Path(folder))
        complete = TUNE.complete({**settings, "prompts": file})
        plan = [PlannedRun(complete, index, (file,)) for index in range(len(prompts))]
        records = run_samples(folder, TUNE, plan, Path(file).stem, run)
    trials = _trials(group_records(records), metric, target, 1 - confidence)
    return TuningResult(metric, target, confidence, len(prompts), trials, settings)


def _check_target(target_kl: float | None, target_agreement: float | None) -> tuple[str, float]:
    """Return the metric and its target."""
    if target_kl is not None and target_agreement is None:
        if not 0 < target_kl < math.inf:
            raise ValueError(f"target_kl must be above 0 nats per token, got {target_kl}")
        return "kl", target_kl
    if target_agreement is not None and target_kl is None:
        if not 0 < target_agreement <= 1:
            raise ValueError(f"target_agreement must be above 0 and at most 1, got {target_agreement}")
        return "agreement", target_agreement
    raise ValueError(
        f"exactly one of target_kl and target_agreement must be given, got {target_kl} and {target_agreement}"
    )


def _check_prompts(prompts: Sequence[UserPrompt], mode: str) -> None:
    if len(prompts) < 2:
        raise ValueError(f"prompts must hold at least 2, because the bound needs their variance, got {len(prompts)}")
    if mode not in ("aware", "agnostic"):
        raise ValueError(f"mode must be aware or agnostic, got {mode!r}")
    without = [index for index, prompt in enumerate(prompts) if prompt.question is None]
    if mode == "agnostic" and without:
        raise ValueError(
            f"mode must be 'aware' if a prompt has no question, got {mode!r} (prompt {without[0]} has no question)"
        )


def _store_prompts(prompts: Sequence[UserPrompt], folder: Path) -> str:
    """Write the prompts to the study's folder, and return the file's name, which contains their digest."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    name = f"prompts-{digest}.jsonl"
    if not (folder / name).exists():
        write_user_prompts(prompts, folder / name)
    return name


def _trials(groups: Sequence[Group], metric: str, target: float, error_rate: float) -> list[Trial]:
    """Return the trials of every policy, allocation and number of bits.

    The error rate is divided by the number of these combinations (Bonferroni).
    """
    arms: dict[tuple[str, str, Bits | None], list[Group]] = {}
    for group in groups:
        settings = group.settings
        if settings["policy"] != "full":
            arm = settings["policy"], settings["allocation"], shortest_bits(settings.get("bits"))
            arms.setdefault(arm, []).append(group)
    sign = 1 if metric == "kl" else -1
    trials: list[Trial] = []
    for (policy, allocation, bits), by_budget in arms.items():
        safe = True
        for group in by_budget:
            values = list(group.values[metric].values())
            bound = mean_bound(values, confidence=1 - error_rate / len(arms), upper=metric == "kl")
            safe = safe and sign * bound <= sign * target
            trials.append(
                Trial(
                    policy=policy,
                    allocation=allocation,
                    budget=group.settings["budget"],
                    mean=statistics.fmean(values),
                    bound=bound,
                    within=sum(sign * value <= sign * target for value in values) / len(values),
                    safe=safe,
                    bytes_kept=group.interval("bytes_kept").mean,
                    bits=bits,
                    memory=group.settings.get("memory"),
                )
            )
    return trials


def _describe(trial: Trial) -> str:
    allocation = "" if trial.allocation == OWN_ALLOCATION else f", allocation {trial.allocation},"
    return f"{trial.policy}{allocation} at {describe_size(trial.budget, trial.bits, trial.memory)}"
