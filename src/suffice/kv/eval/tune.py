"""Find the smallest cache that stays close enough to the full cache on a user's own prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from suffice.arguments import check_int, check_number
from suffice.kv.eval.cache_grid import CacheGrid, mean_bytes
from suffice.kv.eval.run_kinds import TUNE
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.eval.samples import check_memory
from suffice.kv.eval.tuning_result import Arm, Trial, TuningResult
from suffice.kv.eval.user_prompts import UserPrompt, check_user_prompts, longest_prompt, store_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import DEFAULT_POLICY, DEFAULT_REPLAY_POLICY, OWN_ALLOCATION
from suffice.kv.storage.quantization import Bits, shortest_bits
from suffice.study.results import Group, group_records, skewed_mean_bound
from suffice.study.spec import PlannedRun

DEFAULT_MEMORY = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.06, 0.04)
"""The limits on the bytes that `tune` tries. All entries fit, with fewer bits, down to about a third."""


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
