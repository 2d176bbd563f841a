"""Answer a question about a document from a compressed KV cache."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import check_flag, check_int, check_optional_int
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.memory_limit import parse_limit
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.report import CacheReport, stored_bits
from suffice.kv.eval.fidelity import kl_divergence
from suffice.kv.eval.generation import (
    GenerationRecord,
    check_prompt_length,
    end_ids,
    fill_cache,
    greedy_generate,
)
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.hf.tokenization import check_tokenizer, decode
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy
from suffice.kv.storage.quantization import Bits, shortest_bits


@dataclass(frozen=True)
class Answer:
    """An answer, and what the cache kept while it was generated.

    Args:
        answer: the generated text.
        policy: name of the policy.
        budget: number of tokens, or fraction of the tokens seen; None with `memory`.
        aware: whether the question was seen before eviction.
        tokens_seen: number of tokens fed to the model: the prompt, and the answer without its last token.
        tokens_kept: mean number of entries kept per head.
        bytes_full: bytes of a full cache.
        bytes_kept: bytes of this cache.
        capacity_retained: share of the capacity that is kept; None if it was not measured.
        seconds: time for prefill and generation.
        bits: number of bits of quantized entries, or a pair (bits of keys, bits of values); with `memory`, those of the
            first layer. None if no entries are quantized.
        memory: limit on the bytes, as a fraction or a number; None with `budget`.
        repair: whether the kept entries were repaired.
        is_complete: whether the model ended the answer; False if the answer stopped at `max_new_tokens`.
        full_answer: answer from the full cache; None if it was not compared.
        full_is_complete: whether the model ended the answer from the full cache; None if it was not compared.
        kl: KL(full ‖ compressed) of the next-token distributions in nats per token, averaged over the tokens of the
            full cache's answer; None if it was not compared.
        token_shares: text of each prompt token, and the share of compressed layers and heads that kept it.
        question_start: index in `token_shares` of the first token after the document; None without a question.

    """

    answer: str
    policy: str
    budget: float | None
    aware: bool
    tokens_seen: int
    tokens_kept: float
    bytes_full: int
    bytes_kept: int
    capacity_retained: float | None
    seconds: float
    bits: Bits | None = None
    memory: float | None = None
    repair: bool = False
    is_complete: bool = True
    full_answer: str | None = None
    full_is_complete: bool | None = None
    kl: float | None = None
    token_shares: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    question_start: int | None = field(default=None, repr=False)

    @property
    def differs(self) -> bool | None:
        """Whether the full cache gives another answer; None if it was not compared."""
        return None if self.full_answer is None else self.full_answer != self.answer

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except `token_shares` and `question_start` as plain values for JSON, and `differs`."""
        hidden = ("token_shares", "question_start")
        fields = {name: value for name, value in asdict(self).items() if name not in hidden}
        return {**fields, "differs": self.differs}

    def comparison(self) -> str:
        """Return a sentence on how the answer compares with that of the full cache; empty if it was not compared."""
        if self.kl is None:
            return ""
        kl = f"KL from the full cache: {round(self.kl, 3) + 0.0:.3f} nats per token of its answer."
        if self.differs:
            return f"The full cache gives another answer. {kl}"
        return f"The full cache gives the same answer. {kl}"


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str | None = None,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: float | None = None,
    memory: float | str | None = None,
    allocation: str | Allocation | None = None,
    aware: bool = True,
    max_new_tokens: int = 128,
    chunk_size: int | None = None,
    interval: int | None = None,
    rerotate: bool = False,
    bits: Bits | None = None,
    repair: bool = False,
    compare_full: bool = False,
) -> tuple[Answer, CacheReport]:
    """Answer a question about a document from a compressed KV cache, with greedy decoding.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        document: the text that the question is about.
        question: the question; without one, the document is the whole user message.
        policy: which entries to keep. Policies that replay the prompt do so; they take several times as long, and evict
            only once, also with `memory` and `chunk_size`.
        budget: number of tokens to keep, or a fraction of the tokens seen; None means a quarter of the tokens, or as
            many as `memory` allows.
        memory: limit on the bytes, instead of `budget`: a fraction of those of the full cache, or a number; see
            `CompressedCache`. It also holds while the answer is generated.
        allocation: how the budget is split over heads and layers; None uses the policy's own allocation.
        aware: True evicts after the question is seen; False evicts after the document, so that the compressed
            document can serve any question, and requires a question.
        max_new_tokens: maximum number of generated tokens.
        chunk_size: feed the prompt in chunks of this many tokens and evict after each; None feeds the whole prompt.
        interval: number of generated tokens between further evictions. If None, all generated tokens are kept, or,
            if the prompt is chunked, the interval is 512. With `memory`, None chooses it.
        rerotate: rotate the kept keys to consecutive positions, which also allows prompts longer than the context
            window.
        bits: number of bits of quantized entries, or a pair (bits of keys, bits of values); None does not quantize, or
            uses the bits that follow from `memory`.
        repair: repair the kept entries, so that they reproduce the attention over all entries; see `CompressedCache`.
        compare_full: also answer from the full cache, and measure the KL divergence from it. This takes a second
            prefill and the memory of the full cache; prompt and answer must fit into the context window.

    Returns:
        The answer, and the report of its cache.

    Raises:
        TypeError, ValueError: the prompt is empty, `aware` is False without a question, prompt and answer do not fit
            into the model's context window, or an argument is out of range.

    Example:
        >>> model, tokenizer = load_model()                                            # doctest: +SKIP
        >>> text = "The parrot is called Otto. " * 50                                  # doctest: +SKIP
        >>> found, report = answer(model, tokenizer, text, "What is the parrot called?")  # doctest: +SKIP
        >>> found.answer                                                               # doctest: +SKIP
        'The parrot is called Otto.'

    """
    model = unwrap_model(model)
    check_tokenizer(tokenizer)
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
    chunk_size = check_optional_int("chunk_size", chunk_size, 1, unit="token")
    flags = {"aware": aware, "rerotate": rerotate, "repair": repair, "compare_full": compare_full}
    for name, flag in flags.items():
        check_flag(name, flag)
    if not aware and question is None:
        raise ValueError("aware must be True without a question, got False: there is nothing after the document")
    check_interval(policy, interval)
    prompt = tokenize_prompt(tokenizer, document, question)
    if compare_full or not rerotate:
        check_prompt_length(model, prompt.input_ids.shape[1] + max_new_tokens)
    needs_replay = get_policy(policy).needs_replay
    evicts_once = interval is None and (needs_replay or (memory is None and chunk_size is None))
    cache = CompressedCache(
        model,
        policy,
        budget,
        memory=memory,
        allocation=allocation,
        evict="prefill" if evicts_once else "always",
        interval=interval,
        rerotate=rerotate,
        bits=bits,
        repair=repair,
    )
    record = GenerationRecord() if compare_full else None
    start = time.perf_counter()
    if not aware:
        fill_cache(model, prompt.document, cache, chunk_size, tokenizer)
    tokens = greedy_generate(
        model, prompt.input_ids, cache, max_new_tokens, chunk_size=chunk_size, tokenizer=tokenizer, record=record
    )[0]
    seconds = time.perf_counter() - start
    report = cache.report()
    full = full_tokens = kl = None
    if record is not None:
        full_tokens, kl = _compare_with_full(
            model, prompt.input_ids, record, max_new_tokens, chunk_size, token_by_token=not evicts_once
        )
        full = decode(tokenizer, full_tokens)
    result = Answer(
        answer=decode(tokenizer, tokens),
        policy=cache.policy.name,
        budget=cache.budget,
        aware=aware,
        tokens_seen=report.tokens_seen,
        tokens_kept=report.tokens_kept,
        bytes_full=report.bytes_full,
        bytes_kept=report.bytes_kept,
        capacity_retained=report.capacity_retained,
        seconds=seconds,
        bits=shortest_bits(bits) if memory is None else stored_bits(report),
        memory=parse_limit(memory, budget),
        repair=repair,
        is_complete=_is_complete(model, tokens),
        full_answer=full,
        full_is_complete=None if full_tokens is None else _is_complete(model, full_tokens),
        kl=kl,
        token_shares=_token_shares(tokenizer, cache, prompt.input_ids),
        question_start=None if question is None else prompt.document.shape[1],
    )
    return result, report


def check_interval(policy: str | Policy, interval: int | None, name: str = "interval") -> None:
    """Check the number of generated tokens between evictions.

    Args:
        policy: the policy of the cache.
        interval: the number, or None.
        name: argument or option that gave it, for the error.

    Raises:
        TypeError: it is neither an int nor None.
        ValueError: it is below 1, or is given with a policy that evicts only once.

    """
    check_optional_int(name, interval, 1)
    policy = get_policy(policy)
    if policy.needs_replay and interval is not None:
        raise ValueError(
            f"{name} must not be given with policy {policy.name!r}, which replays the prompt and evicts only once, got "
            f"{interval}"
        )


def _compare_with_full(
    model: PreTrainedModel,
    input_ids: Tensor,
    compressed: GenerationRecord,
    max_new_tokens: int,
    chunk_size: int | None,
    *,
    token_by_token: bool,
) -> tuple[Tensor, float]:
    """Answer from the full cache, and feed its answer to the compressed cache.

    Args:
        model: the language model.
        input_ids: the prompt, [1, tokens].
        compressed: what was recorded while the compressed cache answered.
        max_new_tokens: maximum number of generated tokens.
        chunk_size: number of prompt tokens per forward pass; None feeds the prompt at once.
        token_by_token: feed the answer one token at a time, as a cache that evicts while it generates requires.

    Returns:
        The tokens of the full cache's answer, [new_tokens], and the KL divergence in nats per token.

    """
    full = GenerationRecord()
    cache = CompressedCache(model, "full", 1.0, evict="prefill", measure_capacity=False)
    tokens = greedy_generate(model, input_ids, cache, max_new_tokens, chunk_size=chunk_size, record=full)[0]
    assert full.logits is not None
    assert compressed.logits is not None
    network: Any = model
    logits = [compressed.logits[0, :1]]
    with torch.no_grad():
        for part in tokens[None, :-1].split(1 if token_by_token else max(1, len(tokens)), dim=1):
            if part.shape[1]:
                logits.append(network(part, past_key_values=compressed.after_prompt).logits[0])
    reference, other = (each.float().log_softmax(-1) for each in (full.logits[0], torch.cat(logits)))
    return tokens, float(kl_divergence(reference, other).mean())


def _is_complete(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Return whether generated tokens, [new_tokens], end with a token that ends the text."""
    return bool(len(tokens)) and int(tokens[-1]) in end_ids(model)


def _token_shares(
    tokenizer: PreTrainedTokenizerBase, cache: CompressedCache, input_ids: Tensor
) -> tuple[tuple[str, float], ...]:
    """Return the text of each prompt token and the share of compressed layers and heads that keep it."""
    num_tokens = input_ids.shape[1]
    counts = torch.zeros(num_tokens)
    num_heads = 0
    for layer in cache.compressed_layers:
        kept = cache.kept_positions(layer.index)[0].cpu()  # [kv_heads, width]
        num_heads += kept.shape[0]
        counts += torch.bincount(kept[(kept >= 0) & (kept < num_tokens)].long(), minlength=num_tokens)
    texts = [str(tokenizer.decode([token])) for token in input_ids[0].tolist()]
    return tuple(zip(texts, (counts / num_heads).tolist(), strict=True))
