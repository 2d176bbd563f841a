"""Find the smallest cache that stays close enough to the full cache on a user's own prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from suffice.arguments import check_int, check_number
from suffice.kv.budget.memory_limit import format_memory
from suffice.kv.eval.cache_grid import CacheGrid, describe_size, mean_bytes
from suffice.kv.eval.run_kinds import TUNE
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.eval.samples import check_memory
from suffice.kv.eval.user_prompts import UserPrompt, check_user_prompts, longest_prompt, store_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import DEFAULT_POLICY, DEFAULT_REPLAY_POLICY, OWN_ALLOCATION
from suffice.kv.policy.registry import get_policy
from suffice.kv.storage.quantization import Bits, format_bits, shortest_bits
from suffice.study.results import Group, group_records, skewed_mean_bound
from suffice.study.spec import PlannedRun

Arm = tuple[str, str, Bits | None, bool]
"""A policy, an allocation, a number of bits, and whether kept entries are repaired."""
DEFAULT_MEMORY = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.06, 0.04)
"""The limits on the bytes that `tune` tries. All entries fit, with fewer bits, down to about a third."""
ENOUGH_PROMPTS = 20
"""With fewer prompts, a large loss that is rare is likely to be missed (docs/results/tune-coverage.md)."""


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
        bytes_kept: bytes of the keys and values after the prefill, averaged over prompts.
        bytes: bytes of everything that the cache holds then, with positions and the numbers of a repair.
        bits: number of bits of quantized entries; None if they are not quantized, or follow from `memory`.
        memory: limit on the bytes, as a fraction or a number; None with `budget`.
        repair: whether kept entries are repaired.

    """

    policy: str
    allocation: str
    budget: float | None
    mean: float
    bound: float
    within: float
    safe: bool
    bytes_kept: float
    bytes: float
    bits: Bits | None = None
    memory: float | None = None
    repair: bool = False

    @property
    def arm(self) -> Arm:
        """Policy, allocation, bits and repair, for which budgets are tested from the largest to the smallest."""
        return self.policy, self.allocation, self.bits, self.repair

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
        confidence: confidence level of the bounds, jointly for all arms.
        num_prompts: number of prompts.
        trials: all trials; within an arm, from the largest budget (or limit) to the smallest.
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
        """The safe trial with the fewest bytes; None if no trial is safe.

        Trials with the same limit on the bytes count as equal. Of these, one that takes less time is preferred: without
        a replay to one with a replay, then without repair to one with repair, and then the one with the best mean.
        """
        safe = [trial for trial in self.trials if trial.safe]
        sign = 1 if self.metric == "kl" else -1
        largest: dict[float | None, float] = {}  # bytes of the caches with the same limit
        for trial in self.trials:
            largest[trial.memory] = max(largest.get(trial.memory, 0), trial.bytes)

        def order(trial: Trial) -> tuple[float, bool, bool, float]:
            num_bytes = trial.bytes if trial.memory is None else largest[trial.memory]
            return num_bytes, get_policy(trial.policy).needs_replay, trial.repair, sign * trial.mean

        return min(safe, key=order, default=None)

    @property
    def closest(self) -> Trial:
        """The trial with the best bound, whether or not it meets the target."""
        best = min if self.metric == "kl" else max
        return best(self.trials, key=lambda trial: trial.bound)

    @property
    def next_smaller(self) -> Trial | None:
        """The trial of the arm of the best one with the next smaller budget or limit; None if there is none."""
        best = self.best
        if best is None:
            return None
        smaller = [trial for trial in self.trials if trial.arm == best.arm and trial.size < best.size]
        return max(smaller, key=lambda trial: trial.size, default=None)

    def code(self) -> str:
        """Return a Python program that answers a question from the recommended cache, as it was measured.

        The document and the question are placeholders. The result is an empty string if no trial is safe.
        """
        best = self.best
        if best is None:
            return ""
        source = ModelSource(**self.settings["model"])
        default = asdict(ModelSource())
        model = [repr(source.name)] if source.name is not None else []
        model += [
            f"{name}={value!r}" for name, value in asdict(source).items() if name != "name" and value != default[name]
        ]
        cache = [f"policy={best.policy!r}"]
        cache.append(f"budget={best.budget}" if best.memory is None else f"memory={best.memory}")
        cache += [f"allocation={best.allocation!r}"] if best.allocation != OWN_ALLOCATION else []
        cache += [f"bits={best.bits}"] if best.bits is not None else []
        cache += ["repair=True"] if best.repair else []
        cache += ['evict="prefill"'] if best.memory is not None else []
        compressed = "document" if self.settings["mode"] == "agnostic" else "input_ids[:, :-1]"
        return (
            "from suffice.kv import CompressedCache, load_model, prefill\n"
            "from suffice.kv.eval.prompt import tokenize_prompt\n\n"
            f"model, tokenizer = load_model({', '.join(model)})\n"
            'prompt = tokenize_prompt(tokenizer, "Your document.", "Your question?")\n'
            f"cache = CompressedCache(model, {', '.join(cache)})\n"
            f'inputs = {{"input_ids": prompt.{compressed}.to(model.device)}}\n'
            "prefill(model, inputs, [cache], tokenizer=tokenizer)\n"
            "ids = prompt.input_ids.to(model.device)\n"
            f"output = model.generate(ids, past_key_values=cache, max_new_tokens={self.settings['max_new_tokens']})\n"
            "print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))\n"
        )

    def describe_target(self) -> str:
        """Return the target as text: `mean KL ≤ 0.05`."""
        return f"mean {self.metric_name} {'≤' if self.metric == 'kl' else '≥'} {self.target:g}"

    @property
    def metric_name(self) -> str:
        """The name of the metric for people."""
        return "KL" if self.metric == "kl" else "agreement"

    def warning(self) -> str:
        """Return a warning if there are too few prompts; otherwise an empty text."""
        if self.num_prompts >= ENOUGH_PROMPTS:
            return ""
        return f"Use at least {ENOUGH_PROMPTS} prompts: with fewer, a rare large loss is likely to be missed."

    def explain_columns(self) -> str:
        """Explain the columns of the tables."""
        side, other = ("upper", "at most") if self.metric == "kl" else ("lower", "at least")
        kind = "budget" if self.closest.memory is None else "memory limit"
        return (
            f"Mean {self.metric_name}: over the prompts. Bound: {side} bound of this mean for prompts such as yours, "
            f"with {self.confidence:.0%} confidence for all policies together. On target: share of the prompts whose "
            f"own value is {other} the target. Safe: the bound meets the target at this {kind} and at every larger "
            f"one. MB: everything that the cache holds."
        )

    def policy_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return columns and rows of a table with one row for each arm: its smallest safe trial, or its closest one."""
        pick = min if self.metric == "kl" else max
        chosen: list[Trial] = []
        for arm in dict.fromkeys(trial.arm for trial in self.trials):
            trials = [trial for trial in self.trials if trial.arm == arm]
            safe = [trial for trial in trials if trial.safe]
            closest = pick(trials, key=lambda trial: trial.bound)
            chosen.append(min(safe, key=lambda trial: trial.size) if safe else closest)
        return self._columns(), [self._row(trial) for trial in chosen]

    def trial_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return columns and rows of a table of all trials."""
        return self._columns(), [self._row(trial) for trial in self.trials]

    def _columns(self) -> list[str]:
        size = "budget" if self.closest.memory is None else "memory"
        metric = f"mean {self.metric_name}"
        return ["policy", "allocation", size, *self._varying(), metric, "bound", "on target", "MB", "safe"]

    def _varying(self) -> list[str]:
        """Return the columns `bits` and `repair` if some caches are quantized or repaired."""
        has_bits = any(trial.bits is not None for trial in self.trials)
        has_repair = any(trial.repair for trial in self.trials)
        return [name for name, is_shown in (("bits", has_bits), ("repair", has_repair)) if is_shown]

    def _row(self, trial: Trial) -> list[str]:
        chosen_bits = trial.bits is None and trial.memory is not None
        cells = {
            "bits": "chosen" if chosen_bits else format_bits(trial.bits),
            "repair": "yes" if trial.repair else "no",
        }
        return [
            trial.policy,
            trial.allocation,
            f"{trial.budget:g}" if trial.memory is None else format_memory(trial.memory),
            *(cells[name] for name in self._varying()),
            f"{trial.mean:.4f}",
            f"{trial.bound:.4f}",
            f"{trial.within:.0%}",
            f"{trial.bytes / 1e6:.1f}",
            "yes" if trial.safe else "no",
        ]

    def summary(self) -> str:
        """Describe the recommended cache, the confidence and the next smaller budget, and warn of few prompts."""
        return f"{self.verdict()} {self.warning()}".strip()

    def verdict(self) -> str:
        """Describe the recommended cache, the confidence, and the next smaller budget."""
        goal = self.describe_target()
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
        size = describe_size(smaller.budget, smaller.bits, smaller.memory, smaller.repair)
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
    policies: Sequence[str] | None = None,
    allocations: Sequence[str] = (OWN_ALLOCATION,),
    budgets: Sequence[float] | None = None,
    bits: Sequence[Bits | None] = (None,),
    memory: Sequence[float | str] | None = None,
    repair: Sequence[bool] | None = None,
    mode: str = "aware",
    confidence: float = 0.95,
    max_new_tokens: int = 32,
    model: str | ModelSource | None = None,
    run: RunOptions | None = None,
) -> TuningResult:
    """Find the cache with the fewest bytes that stays close to the full cache on your prompts.

    The full cache answers each prompt greedily, and every other cache is measured on that answer. A cache is safe if
    the one-sided bound of the mean over prompts meets the target: Student's t, corrected for the skewness of the values
    (`suffice.study.skewed_mean_bound`), because a few prompts often lose much more than the others. For each arm (a
    policy, an allocation, a number of bits, and whether entries are repaired), limits on the bytes or budgets are
    tested from the largest to the smallest, and all after the first failure count as not safe. Testing in this fixed
    order needs no correction for their number. A Bonferroni correction accounts for the number of arms.

    By default, four arms are tried: the default policy and `capkv-replay`, each without and with repair. Of two caches
    with the same limit, the one that takes less time is recommended. Caches that the model does not support, and limits
    that are too small for one of the prompts, are left out of what is tried by default.

    All caches of a prompt share one prefill, and those with a replay one replay, which takes four to seven times as
    long as the prefill. Greedy answers from all caches take longer than everything else together; they are generated
    only for `target_agreement`. Caches evict once, after the prefill, also with `memory`; see `evaluate`.

    Args:
        prompts: your prompts, at least 2.
        target_kl: maximum mean KL divergence from the full cache, in nats per token. Give this or `target_agreement`.
        target_agreement: minimum mean share of greedy tokens that equal the full cache's at their position, 0 to 1.
        policies: names of policies; None means the default policy and, if the model and the lengths of the prompts
            allow it, `capkv-replay`.
        allocations: names of allocations, each combined with every policy; `"own"` is the policy's own allocation.
        budgets: the budgets to try instead of `memory`: fractions, or numbers of tokens.
        bits: numbers of bits of quantized entries to try, or pairs (bits of keys, bits of values); None stands for
            entries in the model's dtype, or for the bits that follow from `memory`.
        memory: limits on the bytes to try: fractions of those of the full cache, or numbers of bytes such as `"2GiB"`;
            see `CompressedCache`. None means 9 limits from 0.7 to 0.04, or none with `budgets`.
        repair: whether kept entries are repaired: `[False]`, `[True]`, or `[False, True]` to try both; see
            `CompressedCache`. None means `[False]` with `policies`. Without `policies`, it means both, or `[False]` if
            the model does not support repair.
        mode: `"aware"` evicts after the question is seen, `"agnostic"` before it.
        confidence: confidence of the result, above 0.5 and below 1.
        max_new_tokens: maximum length of the full cache's answers.
        model: a name that `load_model` accepts, or a `ModelSource`; None loads the default model.
        run: folder for finished measurements, and number of worker processes. A copy of the prompts is written to
            the folder.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or one of the given limits on the
            bytes is too small even for the longest prompt; raised before anything is measured.
        SufficeError: a prompt failed, for example because it is longer than the context window. The others are stored.

    Example:
        >>> result = tune(prompts, target_kl=0.05)                                    # doctest: +SKIP
        >>> print(result.summary())                                                   # doctest: +SKIP

    """
    metric, target = _check_target(target_kl, target_agreement)
    confidence = check_number("confidence", confidence, above=0.5, below=1)
    prompts = check_user_prompts(prompts, mode)
    run = RunOptions.from_argument(run)
    optional: list[str] = []
    if budgets is None and memory is None:
        memory = DEFAULT_MEMORY
        optional.append("memory")
    if repair is None:
        repair = (False, True) if policies is None else (False,)
    if policies is None:
        policies = (DEFAULT_POLICY, DEFAULT_REPLAY_POLICY)
        optional.append("policies")
    caches = CacheGrid(policies, allocations, budgets, bits, memory, repair)
    caches.check()
    source = ModelSource.from_name(model)
    settings = {
        "mode": mode,
        "max_new_tokens": check_int("max_new_tokens", max_new_tokens, 1),
        # Greedy answers from all caches take longer than all other measurements together.
        "agreement": metric == "agreement",
        "optional": optional,
        "caches": caches.largest_first().settings(),
        "model": asdict(source),
    }
    TUNE.complete(settings)
    tried = [] if "memory" in optional else caches.caches()
    check = partial(check_memory, source, tried, partial(longest_prompt, prompts, mode), keep_model=run.workers == 0)
    with run.open_folder() as folder:
        file = store_user_prompts(prompts, Path(folder))
        complete = TUNE.complete({**settings, "prompts": file})
        plan = [PlannedRun(complete, index, (file,)) for index in range(len(prompts))]
        records = run_samples(folder, TUNE, plan, Path(file).stem, run, check=check)
    trials = make_trials(group_records(records), metric, target, confidence)
    return TuningResult(metric, target, confidence, len(prompts), trials, settings)


def _check_target(target_kl: float | None, target_agreement: float | None) -> tuple[str, float]:
    """Return the metric and its target."""
    if target_kl is not None and target_agreement is None:
        return "kl", check_number("target_kl", target_kl, above=0, unit="nats per token")
    if target_agreement is not None and target_kl is None:
        return "agreement", check_number("target_agreement", target_agreement, above=0, maximum=1)
    raise ValueError(
        f"exactly one of target_kl and target_agreement must be given, got {target_kl} and {target_agreement}"
    )


def make_trials(groups: Sequence[Group], metric: str, target: float, confidence: float) -> list[Trial]:
    """Decide which caches are safe; see `tune`.

    Args:
        groups: values of each cache, by prompt; within an arm, from the largest budget or limit to the smallest.
        metric: `"kl"` or `"agreement"`.
        target: the value that the mean of the metric must meet.
        confidence: confidence of all decisions together. The error rate is divided by the number of arms (Bonferroni).

    Returns:
        One trial for each cache that was measured on all prompts.

    """
    num_prompts = max(len(group.values[metric]) for group in groups)
    arms: dict[Arm, list[Group]] = {}
    for group in groups:
        settings = group.settings
        if settings["policy"] != "full" and len(group.values[metric]) == num_prompts:
            bits, repair = shortest_bits(settings.get("bits")), settings.get("repair", False)
            arm = settings["policy"], settings["allocation"], bits, repair
            arms.setdefault(arm, []).append(group)
    sign = 1 if metric == "kl" else -1
    trials: list[Trial] = []
    for (policy, allocation, bits, repair), by_budget in arms.items():
        safe = True
        for group in by_budget:
            values = list(group.values[metric].values())
            bound = skewed_mean_bound(values, confidence=1 - (1 - confidence) / len(arms), upper=metric == "kl")
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
                    bytes=mean_bytes(group),
                    bits=bits,
                    memory=group.settings.get("memory"),
                    repair=repair,
                )
            )
    return trials


def _describe(trial: Trial) -> str:
    allocation = "" if trial.allocation == OWN_ALLOCATION else f", allocation {trial.allocation},"
    return f"{trial.policy}{allocation} at {describe_size(trial.budget, trial.bits, trial.memory, trial.repair)}"
