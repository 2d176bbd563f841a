"""Ask a question of a document whose KV cache was compressed before the question was seen, or after."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.report import CacheReport
from suffice.kv.hf.model_info import context_window
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import DEFAULT_POLICY


@dataclass(frozen=True)
class Prompt:
    """A prompt in two parts, as token ids [1, tokens].

    Args:
        document: what is prefilled and compressed in the agnostic setting.
        question: what follows, the turn of the model included; empty when there is no question.

    """

    document: Tensor
    question: Tensor

    @property
    def ids(self) -> Tensor:
        """Both parts together."""
        return torch.cat((self.document, self.question), dim=1)


@dataclass(frozen=True)
class Answer:
    """An answer and what the cache behind it kept, the question's and answer's tokens included.

    `kept` is the text of each token of the prompt, and the share of compressed layers and heads that still hold it.
    """

    answer: str
    policy: str
    budget: float
    aware: bool
    tokens_seen: int
    tokens_kept: float
    bytes_full: int
    bytes_kept: int
    capacity_retained: float | None
    seconds: float
    kept: tuple[tuple[str, float], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but `kept` as plain values, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "kept"}


def prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str | None = None) -> Prompt:
    """Write a document and a question as one user message, split where the document ends.

    A tokenizer without a chat template gets the plain text, `Question:` and `Answer:`.

    Raises:
        ValueError: the document is empty.

    """
    if not document.strip():
        raise ValueError("the prompt is empty; accepted: some text")
    if getattr(tokenizer, "chat_template", None):
        content = document if question is None else f"{document}\n\n{question}"
        message = [{"role": "user", "content": content}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        # A template may trim the message: look for the document without its outer white space.
        end = text.index(document.strip()) + len(document.strip())
        special = False
    else:
        text = document if question is None else f"{document}\n\nQuestion: {question}\nAnswer:"
        end, special = len(document), True
    if question is None:
        return Prompt(_ids(tokenizer, text, special), torch.empty(1, 0, dtype=torch.long))
    return Prompt(_ids(tokenizer, text[:end], special), _ids(tokenizer, text[end:], False))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Tensor:
    encoded: Any = tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False)
    return encoded.input_ids


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise if a model's window does not hold this many tokens."""
    window = context_window(model)
    if window is not None and tokens > window:
        raise ValueError(
            f"prompt and answer have {tokens} tokens, more than the model's window of {window}. Shorten the "
            "prompt, lower max_new_tokens, or use a model with a longer window"
        )


def check_chunk(chunk: int | None) -> None:
    """Raise unless a length of chunks is None or at least one token."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; accepted: at least 1 token")


def generate(
    model: PreTrainedModel, ids: Tensor, cache: Cache, max_new_tokens: int, *, chunk: int | None = None
) -> Tensor:
    """Continue token ids [rows, tokens] greedily, [rows, new tokens]; what the cache has seen is not read again.

    With `chunk`, the prompt is read so many tokens at a time: by a loop of ours, since `prefill_chunk_size` of
    transformers 5.2 gives other tokens than reading at once, with its own caches too.
    """
    ids = ids.to(model.device)
    network: Any = model
    if chunk is not None:
        read(model, ids[:, cache.get_seq_length() : -1], cache, chunk)
    out: Any = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=_padding(model),
    )
    return out[:, ids.shape[1] :]


def _padding(model: PreTrainedModel) -> int | None:
    """Token that follows the end of a row while others go on."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    ends = config.eos_token_id
    return ends[0] if isinstance(ends, list) else ends


def read(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None = None) -> None:
    """Fill a cache with token ids [rows, tokens], so many at a time; None reads them at once."""
    if not ids.shape[1]:
        return
    with torch.no_grad():
        for piece in ids.split(chunk or ids.shape[1], dim=1):
            model(piece.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str | None = None,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: float = 0.25,
    aware: bool = True,
    max_new_tokens: int = 128,
    allocation: str | Allocation | None = None,
    chunk: int | None = None,
    interval: int | None = None,
    rerotate: bool = False,
) -> tuple[Answer, CacheReport]:
    """Answer a question about a document, greedily, from a compressed KV cache.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        document: the prompt.
        question: asked of the document; None continues the document's own message.
        policy: what to keep.
        budget: how much: tokens, or a fraction.
        aware: True if the question is seen before eviction, False if only the document is: then one
            compressed document could answer any question.
        max_new_tokens: longest answer.
        allocation: how the budget is split over heads and layers; None leaves it to the policy.
        chunk: read the prompt so many tokens at a time, within the budget after each; None reads it at once.
        interval: evict every so many tokens of the answer too; None keeps the whole answer, unless the prompt is
            read in chunks (then 512).
        rerotate: rotate kept keys to consecutive positions, which also reads prompts longer than the model's window.

    Raises:
        ValueError: an empty prompt, one longer than the model's window, or anything `CompressedCache` refuses.

    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; accepted: at least 1")
    check_chunk(chunk)
    parts = prompt(tokenizer, document, question)
    if not rerotate:
        check_length(model, parts.ids.shape[1] + max_new_tokens)
    cache = CompressedCache(
        model,
        policy,
        budget,
        allocation=allocation,
        evict="prefill" if chunk is None and interval is None else "always",
        interval=512 if interval is None else interval,
        rerotate=rerotate,
    )
    start = time.perf_counter()
    if not aware and parts.question.shape[1]:
        read(model, parts.document, cache, chunk)
    tokens = generate(model, parts.ids, cache, max_new_tokens, chunk=chunk)[0]
    seconds = time.perf_counter() - start
    report = cache.report()
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return (
        Answer(
            answer=text,
            policy=cache.policy.name,
            budget=budget,
            aware=aware,
            tokens_seen=report.tokens_seen,
            tokens_kept=report.tokens_kept,
            bytes_full=report.bytes_full,
            bytes_kept=report.bytes_kept,
            capacity_retained=report.capacity_retained,
            seconds=seconds,
            kept=tuple(zip(_pieces(tokenizer, parts.ids), kept_shares(cache, parts.ids.shape[1]), strict=True)),
        ),
        report,
    )


def kept_shares(cache: CompressedCache, tokens: int) -> list[float]:
    """Return for each of the first tokens of a cache's first row the share of layers and heads that hold it."""
    counts = torch.zeros(tokens)
    heads = 0
    for layer in cache.compressed_layers:
        held = cache.kept_positions(layer.index)[0].cpu()  # [kv_heads, width]
        heads += held.shape[0]
        counts += torch.bincount(held[(held >= 0) & (held < tokens)].long(), minlength=tokens)
    return (counts / heads).tolist()


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [str(tokenizer.decode([token])) for token in ids[0].tolist()]
