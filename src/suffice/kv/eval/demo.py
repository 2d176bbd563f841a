"""A small comparison on the default model: facts planted in real English, asked from a part of the cache."""

from __future__ import annotations

import copy
import pydoc_data.topics
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.report import CacheReport
from suffice.kv.cache.shared_prefill import prefill
from suffice.kv.eval.answer import Prompt, check_length, generate, prompt
from suffice.kv.policy.registry import DEFAULT_POLICY

POLICIES = (DEFAULT_POLICY, "capkv", "snapkv", "h2o", "expected-attention", "keydiff")
_PLACES = ("lighthouse", "orchard", "foundry", "cathedral", "harbour", "vineyard", "quarry", "observatory")


@dataclass(frozen=True)
class Fact:
    """A fact in the document: its sentence, the question for it, the answer and its value."""

    sentence: str
    question: str
    answer: str
    value: str


@dataclass(frozen=True)
class Row:
    """One policy at one budget, over all questions of one setting.

    Args:
        policy: its name.
        budget: fraction kept.
        aware: whether the question was seen before eviction.
        kl: Kullback-Leibler divergence from the full cache's next-token distribution, nats for each token of
            the right answer; one number for each question.
        correct: whether the greedy answer holds the value; one for each question.
        answers: these answers.
        seconds: scoring and eviction of the prefill, mean over questions (agnostic: over the one prefill).
        report: what the cache of the last question held after its prefill.

    """

    policy: str
    budget: float
    aware: bool
    kl: tuple[float, ...]
    correct: tuple[bool, ...]
    answers: tuple[str, ...]
    seconds: float
    report: CacheReport

    @property
    def mean_kl(self) -> float:
        """Mean over the questions."""
        return statistics.mean(self.kl)


@dataclass(frozen=True)
class Demo:
    """What the comparison found."""

    model: str
    seed: int
    tokens: int
    facts: tuple[Fact, ...]
    rows: tuple[Row, ...]
    prefill_seconds: float


def document(tokenizer: PreTrainedTokenizerBase, tokens: int, facts: int, seed: int) -> tuple[str, list[Fact]]:
    """Return about `tokens` tokens of real English (Python's own manual) with facts planted at even depths."""
    generator = random.Random(seed)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1500]
    generator.shuffle(topics)
    words = " ".join(" ".join(topics[:12]).split()).split(" ")
    places = generator.sample(_PLACES, facts)
    planted: list[Fact] = []
    for place in places:
        value = str(generator.randrange(100_000, 1_000_000))
        sentence = f"The access code of the {place} is {value}."
        question = f"What is the access code of the {place}?"
        planted.append(Fact(sentence, question, f"The access code of the {place} is {value}.", value))

    def build(count: int) -> str:
        parts: list[str] = []
        for number, fact in enumerate(planted):
            parts += [
                *words[number * count // facts : (number + 1) * count // facts],
                "\n\n",
                fact.sentence,
                "\n\n",
            ]
        tail = words[count : count + count // 10]
        return " ".join([*parts, *tail])

    count = tokens // 2
    for _ in range(4):
        count = round(count * tokens / len(tokenizer(build(count), verbose=False).input_ids))
    return build(count), planted


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policies: tuple[str, ...] = POLICIES,
    budgets: tuple[float, ...] = (0.5, 0.25),
    tokens: int = 2000,
    facts: int = 4,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Answer every question from the full cache and from parts of it, and measure what that changed.

    All caches of a prompt share one prefill. The divergence is measured on the tokens of the right answer,
    given to the model one after the other, so that it does not depend on what each cache would have said.
    """
    text, planted = document(tokenizer, tokens, facts, seed)
    prompts = [prompt(tokenizer, text, fact.question) for fact in planted]
    check_length(model, prompts[0].ids.shape[1] + 64)
    settings = [("full", 1.0), *((name, budget) for budget in budgets for name in policies)]
    rows: list[Row] = []
    for aware in (False, True):
        rows += _setting(model, tokenizer, prompts, planted, settings, aware, say)
    return Demo(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        seed=seed,
        tokens=prompts[0].document.shape[1],
        facts=tuple(planted),
        rows=tuple(rows),
        prefill_seconds=_prefill_seconds(model, prompts[0]),
    )


def _setting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    facts: list[Fact],
    settings: list[tuple[str, float]],
    aware: bool,
    say: Callable[[str], None],
) -> list[Row]:
    kl: list[list[float]] = [[] for _ in settings]
    answers: list[list[str]] = [[] for _ in settings]
    seconds = [0.0] * len(settings)
    reports: list[CacheReport] = []
    caches: list[CompressedCache] = []
    passes = 0
    for number, (parts, fact) in enumerate(zip(prompts, facts, strict=True)):
        if aware or not caches:
            say(f"{'aware' if aware else 'agnostic'}: prefill for {len(settings)} caches at once")
            caches = [CompressedCache(model, name, budget) for name, budget in settings]
            first = parts.ids[:, :-1] if aware else parts.document
            shared = prefill(model, {"input_ids": first.to(model.device)}, caches)
            seconds = [old + new for old, new in zip(seconds, shared.seconds, strict=True)]
            passes += 1
            reports = [cache.report() for cache in caches]
        say(f"{'aware' if aware else 'agnostic'}: question {number + 1} of {len(facts)}: {fact.question}")
        gold = tokenizer(fact.answer, add_special_tokens=False, return_tensors="pt").input_ids
        reference: Tensor | None = None
        for index, cache in enumerate(caches):
            scored = _log_probabilities(model, copy.deepcopy(cache), parts.ids, gold)
            reference = scored if reference is None else reference
            kl[index].append(float((reference.exp() * (reference - scored)).sum(-1).mean()))
            tokens = generate(model, parts.ids, copy.deepcopy(cache), 24)[0]
            answers[index].append(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip())
    return [
        Row(
            policy=name,
            budget=budget,
            aware=aware,
            kl=tuple(kl[index]),
            correct=tuple(fact.value in said for fact, said in zip(facts, answers[index], strict=True)),
            answers=tuple(answers[index]),
            seconds=seconds[index] / passes,
            report=reports[index],
        )
        for index, (name, budget) in enumerate(settings)
    ]


def _log_probabilities(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, gold: Tensor) -> Tensor:
    """Log-probabilities of every next token over the gold answer, [answer tokens, vocabulary]."""
    rest = torch.cat((ids[:, cache.get_seq_length() :], gold), dim=1).to(model.device)
    with torch.no_grad():
        logits = model(rest, past_key_values=cache, use_cache=True, logits_to_keep=gold.shape[1] + 1).logits
    return logits[0, :-1].float().log_softmax(-1)


def _prefill_seconds(model: PreTrainedModel, parts: Prompt) -> float:
    """Seconds of a plain prefill of the document, with transformers' own cache."""
    with torch.no_grad():
        start = time.perf_counter()
        model(parts.document.to(model.device), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start
