"""Measure how close compressed caches stay to the full cache on one example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import check_choice, check_flag, check_instance, check_instances, check_int
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.memory_limit import parse_limit
from suffice.kv.cache.arguments import CacheArguments
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.prefill import prefill
from suffice.kv.cache.report import stored_bits
from suffice.kv.eval.generation import check_prompt_length, end_ids, greedy_generate, until_end
from suffice.kv.eval.prompt import PromptTokens
from suffice.kv.eval.tasks.example import Example
from suffice.kv.hf.tokenization import check_tokenizer, decode
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy
from suffice.kv.storage.quantization import Bits, shortest_bits

# Maximum number of logits that one forward pass over several caches computes, to limit its memory.
_MAX_LOGITS = 32_000_000


@dataclass(frozen=True)
class CacheConfig:
    """The configuration of a compressed cache.

    Args:
        policy: name of a policy, or a `Policy`.
        budget: number of tokens to keep per row, or a fraction of the tokens seen; None means a quarter of the tokens,
            or as many as `memory` allows.
        allocation: how the budget is split over heads; None uses the policy's own allocation.
        bits: number of bits of quantized entries, or a pair (bits of keys, bits of values); None does not quantize, or
            uses the bits that follow from `memory`.
        memory: limit on the bytes, instead of `budget`; see `CompressedCache`.
        repair: whether kept entries are repaired; see `CompressedCache`.

    Example:
        >>> CacheConfig("h2o", 0.5).names
        ('h2o', 'equal')

    """

    policy: str | Policy
    budget: float | None = None
    allocation: str | Allocation | None = None
    bits: Bits | None = None
    memory: float | str | None = None
    repair: bool = False

    def check(self) -> None:
        """Check everything that does not depend on the model.

        Raises:
            TypeError, ValueError: `CompressedCache` would reject the configuration with any model.

        """
        CacheArguments(
            policy=self.policy,
            budget=self.budget,
            memory=self.memory,
            sinks=None,
            window=None,
            allocation=self.allocation,
            evict="prefill",
            interval=None,
            rerotate=False,
            measure_capacity=False,
            bits=self.bits,
            repair=self.repair,
        ).check()

    def build(self, model: nn.Module, **options: Any) -> CompressedCache:
        """Return an empty cache with this configuration.

        By default, it evicts after the prefill only, also with `memory`, and does not measure the capacity.

        Args:
            model: the model of the cache.
            options: further arguments of `CompressedCache`.

        Raises:
            TypeError, ValueError: `CompressedCache` rejects the configuration.

        """
        options = {"measure_capacity": False, "evict": "prefill", **options}
        size = {"budget": self.budget, "memory": self.memory, "bits": self.bits}
        return CompressedCache(model, self.policy, allocation=self.allocation, repair=self.repair, **size, **options)

    @property
    def names(self) -> tuple[str, str]:
        """The name of the policy, and the name or description of the allocation."""
        policy = get_policy(self.policy)
        allocation = policy.allocation if self.allocation is None else self.allocation
        return policy.name, allocation if isinstance(allocation, str) else str(allocation)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    configs: Sequence[CacheConfig],
    *,
    mode: str = "agnostic",
    answer: bool = True,
    greedy_tokens: int = 0,
    measure_capacity: bool = False,
    share_statistics: bool = True,
) -> list[dict[str, Any]]:
    """Measure how close compressed caches stay to the full cache on one example. All caches share one prefill.

    Divergence, likelihood and top-1 agreement are measured with teacher forcing: the tokens of the right answer are
    fed to the model, so that the result does not depend on what each cache would have generated.

    Caches evict once, after the prefill (`evict="prefill"`), and keep all later tokens. So `memory` limits the bytes of
    the compressed prompt, and leaves no room for new tokens.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        example: the document, the question and the right answer; `suffice.kv.eval.tasks.make_example` makes one.
        configs: the caches to evaluate.
        mode: `"agnostic"` evicts before the question is seen, `"aware"` after it; `"continuation"` without a question.
        answer: also generate an answer from each cache and score it.
        greedy_tokens: also generate this many tokens from each cache and compare them with those of the full cache;
            0 skips this.
        measure_capacity: also measure the share of the capacity that is kept.
        share_statistics: compute statistics that several policies use, such as the received attention, only once.

    Returns:
        One dict of plain values for the full cache, then one for each configuration:

        * `task`, `mode`, `seed`, `policy`, `allocation`
        * `budget` (None with `memory`), `memory` (a fraction or a number of bytes; None with `budget`)
        * `bits`: number of bits of quantized entries; with `memory`, those of the first layer. None if no entries are
            quantized
        * `repair`: whether kept entries are repaired
        * `tokens`: number of tokens in the prompt; `gold_tokens`: number of tokens in the right answer
        * `kl`: KL(full ‖ compressed) of the next-token distributions, in nats per token
        * `log_likelihood`: log-likelihood of the right answer, in nats per token; `log_likelihood_change`: difference
            from the full cache
        * `top1`: share of tokens at which both caches predict the same most likely token
        * `score`: score of the generated answer, 0 to 1; `full_score`: score of the full cache's answer; `chance`:
            expected score of a random choice. All are None without `references`; the scores also without `answer`
        * `answer`: the generated text; None without `answer`
        * `agreement`: share of the full cache's greedy tokens that are generated at the same position;
            `agreed_tokens`: number of equal tokens before the first difference; None without `greedy_tokens`
        * `tokens_kept`: mean number of entries kept per head after the prefill
        * `bytes`: bytes of everything that the cache holds after the prefill; `bytes_kept`: of the keys and values
            alone; `bytes_full`: of the keys and values without eviction
        * `capacity_retained`: None if it was not measured
        * `seconds`: time for scoring and eviction. With `share_statistics`, the time for a statistic is counted for
            the first configuration that uses it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the example does not have this mode, the prompt is longer than the model's context window, or
            `CompressedCache` rejects a configuration.

    Example:
        >>> example = make_example("multikey", tokenizer, tokens=600, seed=1)         # doctest: +SKIP
        >>> full, row = evaluate(model, tokenizer, example, [CacheConfig("h2o", 0.25)])  # doctest: +SKIP
        >>> row["kl"], row["score"]                                                   # doctest: +SKIP

    """
    model = unwrap_model(model)
    check_tokenizer(tokenizer)
    check_instance("example", example, Example, "make_example('multikey', tokenizer, tokens=900)")
    configs = check_instances("configs", configs, CacheConfig, "CacheConfig('h2o', 0.5)")
    for config in configs:
        config.check()
    check_choice("mode", mode, example.modes, f" for task {example.task!r}")
    greedy_tokens = check_int("greedy_tokens", greedy_tokens, 0)
    flags = {"answer": answer, "measure_capacity": measure_capacity, "share_statistics": share_statistics}
    for name, flag in flags.items():
        check_flag(name, flag)
    gold = example.answer_ids(tokenizer)
    prompt = example.prompt(tokenizer)
    answer_tokens = example.max_new_tokens if answer and example.references else 0
    check_prompt_length(model, prompt.input_ids.shape[1] + max(gold.shape[1], answer_tokens, greedy_tokens))
    all_configs = [CacheConfig("full", 1.0, "equal"), *configs]
    caches = [config.build(model, measure_capacity=measure_capacity) for config in all_configs]
    prefill_ids = _prefill_ids(prompt, mode).to(model.device)
    shared = prefill(model, {"input_ids": prefill_ids}, caches, share_statistics=share_statistics, tokenizer=tokenizer)
    reports = [cache.report() for cache in caches]
    measured = _metrics_of_each(model, caches, prompt.input_ids, gold)
    generated = _generate_from_each(model, caches, prompt.input_ids, max(answer_tokens, greedy_tokens))
    answers = [decode(tokenizer, tokens[:answer_tokens]) if answer_tokens else None for tokens in generated]
    scores = [None if text is None else example.score(text) for text in answers]
    rows: list[dict[str, Any]] = []
    for index, (config, report) in enumerate(zip(all_configs, reports, strict=True)):
        policy, allocation = config.names
        agreement = agreed_tokens = None
        if greedy_tokens:
            agreement, agreed_tokens = _agreement(generated[0][:greedy_tokens], generated[index][:greedy_tokens])
        rows.append(
            {
                "task": example.task,
                "mode": mode,
                "seed": example.seed,
                "policy": policy,
                "allocation": allocation,
                "budget": caches[index].budget,
                "memory": parse_limit(config.memory, config.budget),
                "bits": shortest_bits(config.bits) if config.memory is None else stored_bits(report),
                "repair": config.repair,
                "tokens": prompt.input_ids.shape[1],
                "gold_tokens": gold.shape[1],
                **measured[index],
                "log_likelihood_change": measured[index]["log_likelihood"] - measured[0]["log_likelihood"],
                "score": scores[index],
                "full_score": scores[0],
                "chance": example.chance,
                "answer": answers[index],
                "agreement": agreement,
                "agreed_tokens": agreed_tokens,
                "tokens_kept": report.tokens_kept,
                "bytes": report.bytes,
                "bytes_kept": report.bytes_kept,
                "bytes_full": report.bytes_full,
                "capacity_retained": report.capacity_retained,
                "seconds": shared.seconds[index],
            }
        )
    return rows


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:  # log-probabilities [..., vocabulary]
    """Return KL(reference ‖ other) of distributions given as log-probabilities, in nats, [...]."""
    # Where the reference has probability 0, its logarithm is −∞, and 0 · −∞ counts as 0.
    terms = reference.exp() * (reference - other)
    return terms.masked_fill(reference == float("-inf"), 0).sum(-1)


def teacher_forced_metrics(reference: Tensor, other: Tensor, gold: Tensor) -> dict[str, float]:
    """Compare two caches' predictions of the right answer.

    Args:
        reference: log-probabilities from the full cache before each token of the answer, [tokens, vocabulary].
        other: log-probabilities from another cache, [tokens, vocabulary].
        gold: the tokens of the answer, long [tokens].

    Returns:
        `kl`, `log_likelihood` (both in nats) and `top1`, as means over the tokens.

    """
    return {
        "kl": float(kl_divergence(reference, other).mean()),
        "log_likelihood": float(other.gather(-1, gold[:, None]).mean()),
        "top1": float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
    }


def _prefill_ids(prompt: PromptTokens, mode: str) -> Tensor:
    """Return the ids to prefill. The last token of a prompt is fed later, because its logits predict the answer."""
    return prompt.document if mode == "agnostic" else prompt.input_ids[:, :-1]


def _metrics_of_each(
    model: PreTrainedModel, caches: list[CompressedCache], input_ids: Tensor, gold: Tensor
) -> list[dict[str, float]]:
    """Feed the rest of the prompt and the right answer to a copy of each cache; the first cache is the reference."""
    rest = torch.cat((input_ids[:, caches[0].get_seq_length() :], gold), dim=1).to(model.device)
    network: Any = model
    num_logits = gold.shape[1] + 1
    batch_size = max(1, _MAX_LOGITS // (num_logits * model.config.get_text_config().vocab_size))
    answer = gold[0].to(model.device)
    reference: Tensor | None = None
    metrics: list[dict[str, float]] = []
    for start in range(0, len(caches), batch_size):
        copies = [cache.copy() for cache in caches[start : start + batch_size]]
        with torch.no_grad():
            logits = network(
                rest.expand(len(copies), -1), past_key_values=BatchedCaches(copies), logits_to_keep=num_logits
            ).logits
        for row in logits[:, :-1]:
            log_probs: Tensor = row.float().log_softmax(-1)
            if reference is None:
                reference = log_probs
            metrics.append(teacher_forced_metrics(reference, log_probs, answer))
    return metrics


def _generate_from_each(
    model: PreTrainedModel, caches: list[CompressedCache], input_ids: Tensor, max_new_tokens: int
) -> list[list[int]]:
    """Generate greedily from a copy of each cache, up to and including the end-of-text token."""
    if max_new_tokens == 0:
        return [[] for _ in caches]
    copies = BatchedCaches([cache.copy() for cache in caches])
    generated = greedy_generate(model, input_ids.expand(len(caches), -1), copies, max_new_tokens).tolist()
    return [until_end(tokens, end_ids(model)) for tokens in generated]


def _agreement(reference: list[int], other: list[int]) -> tuple[float, int]:
    """Return the share of positions with equal tokens, and the number of tokens before the first difference."""
    equal = [index < len(other) and other[index] == token for index, token in enumerate(reference)]
    num_agreed = equal.index(False) if False in equal else len(equal)
    return sum(equal) / len(equal), num_agreed
