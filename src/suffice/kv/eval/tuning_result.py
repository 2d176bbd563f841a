"""The result of `tune`: all trials, which cache it recommends, and what it says about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from suffice.kv.budget.memory_limit import format_memory
from suffice.kv.eval.cache_grid import describe_size
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import OWN_ALLOCATION
from suffice.kv.policy.registry import get_policy
from suffice.kv.storage.quantization import Bits, format_bits

Arm = tuple[str, str, Bits | None, bool]
"""A policy, an allocation, a number of bits, and whether kept entries are repaired."""
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


def _describe(trial: Trial) -> str:
    allocation = "" if trial.allocation == OWN_ALLOCATION else f", allocation {trial.allocation},"
    return f"{trial.policy}{allocation} at {describe_size(trial.budget, trial.bits, trial.memory, trial.repair)}"
