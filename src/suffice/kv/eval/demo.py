"""A short demonstration: ask for facts in a document, with the full cache and with compressed ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.cache.report import CacheReport
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.generation import fill_cache
from suffice.kv.eval.tasks import Example, planted_facts
from suffice.kv.policy.names import DEFAULT_POLICY

DEMO_POLICIES = (DEFAULT_POLICY, "capkv", "snapkv", "h2o", "expected-attention", "keydiff")


@dataclass(frozen=True)
class DemoRow:
    """One policy at one budget, over all questions about the document.

    Args:
        policy: name of the policy.
        budget: fraction of the tokens that is kept.
        mode: `"agnostic"` evicts before the question is seen, `"aware"` after it.
        kl: KL divergence from the full cache, in nats per token of the right answer; one value per question.
        correct: whether the generated answer contains the value; one per question.
        answers: the generated answers.
        bytes_kept: bytes of the cache after the prefill of the last question.
        bytes_full: bytes of the full cache.
        capacity_retained: share of the capacity that is kept; None if it cannot be measured.
        seconds: mean time for scoring, eviction and measuring the capacity, over the questions.

    """

    policy: str
    budget: float
    mode: str
    kl: tuple[float, ...]
    correct: tuple[bool, ...]
    answers: tuple[str, ...]
    bytes_kept: int
    bytes_full: int
    capacity_retained: float | None
    seconds: float

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence over the questions."""
        return statistics.mean(self.kl)


@dataclass(frozen=True)
class DemoResult:
    """The result of the demonstration.

    Args:
        tokens: number of tokens in the document.
        examples: the questions.
        rows: every policy and budget in both modes; in each mode, the full cache comes first.
        document_report: what the first policy keeps of the document at the smallest budget, by layer and head.

    """

    tokens: int
    examples: tuple[Example, ...]
    rows: tuple[DemoRow, ...]
    document_report: CacheReport


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policies: Sequence[str] = DEMO_POLICIES,
    budgets: Sequence[float] = (0.5, 0.25),
    tokens: int = 2000,
    num_facts: int = 4,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Plant facts in a document, and ask for each of them with the full cache and with compressed ones.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        policies: names of policies.
        budgets: fractions of the tokens to keep.
        tokens: approximate number of tokens in the document.
        num_facts: number of facts and of questions.
        seed: seed of the document.
        on_progress: called with one line before each question.

    """
    examples = planted_facts(tokenizer, tokens=tokens, seed=seed, num_facts=num_facts)
    configs = [CacheConfig(policy, budget) for budget in budgets for policy in policies]
    rows: list[DemoRow] = []
    for mode in ("agnostic", "aware"):
        measured: list[list[dict[str, Any]]] = []
        for number, example in enumerate(examples, 1):
            on_progress(f"{mode}: question {number} of {num_facts}: {example.question}")
            # Each policy computes its own statistics, so that the times are comparable.
            measured.append(
                evaluate(model, tokenizer, example, configs, mode=mode, measure_capacity=True, share_statistics=False)
            )
        rows += [_demo_row(by_question) for by_question in zip(*measured, strict=True)]
    document = examples[0].prompt(tokenizer).document
    cache = CacheConfig(policies[0], min(budgets)).build(model, measure_capacity=True)
    fill_cache(model, document, cache)
    return DemoResult(document.shape[1], tuple(examples), tuple(rows), cache.report())


def _demo_row(by_question: Sequence[dict[str, Any]]) -> DemoRow:
    """Summarize the rows of `evaluate` for one cache."""
    last = by_question[-1]
    return DemoRow(
        policy=last["policy"],
        budget=last["budget"],
        mode=last["mode"],
        kl=tuple(row["kl"] for row in by_question),
        correct=tuple(row["score"] == 1 for row in by_question),
        answers=tuple(row["answer"] for row in by_question),
        bytes_kept=last["bytes_kept"],
        bytes_full=last["bytes_full"],
        capacity_retained=last["capacity_retained"],
        seconds=statistics.mean(row["seconds"] for row in by_question),
    )
