"""Answer the questions of `leaderboard.py` from compressed caches, with the prompts and the decoding of kvpress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leaderboard_data import Sample
from suffice.kv import CacheConfig, CompressedCache, prefill
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.layer_report import report_layer
from suffice.kv.cache.replay_prompt import Instruction, replay_inputs
from suffice.kv.eval.generation import check_prompt_length
from suffice.kv.hf.tokenization import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def chat_parts(tokenizer: PreTrainedTokenizerBase, context: str) -> tuple[str, str]:
    """Return a prompt up to the end of the context, and what follows the question.

    With a chat template, these are the two parts of a user message and of its template. Without one, the prompt begins
    with the token that begins a text, and the question ends with its line.

    Raises:
        ValueError: the chat template does not contain the message once.

    """
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{context}", "\n"
    marker = "[[question]]"
    while marker in context:
        marker = f"[{marker}]"
    # Models that can think answer at once.
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    parts = str(tokenizer.apply_chat_template([{"role": "user", "content": context + marker}], **options)).split(marker)
    if len(parts) != 2:
        raise ValueError(f"the chat template of --model must contain a message once, got one with {len(parts) - 1}")
    return parts[0], parts[1]


@dataclass(frozen=True)
class Context:
    """A context and its questions.

    Args:
        ids: token ids of the prompt up to the end of the context, long [1, tokens].
        samples: the questions.
        questions: token ids of each question, with the rest of the prompt and the answer prefix, long [1, tokens].

    """

    ids: Tensor
    samples: tuple[Sample, ...]
    questions: tuple[Tensor, ...]


def tokenize_contexts(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[Context]:
    """Return the contexts in the order of their first sample, each with all its questions."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.context, []).append(sample)
    contexts: list[Context] = []
    for text, own in groups.items():
        before, after = chat_parts(tokenizer, text)
        # The context and the question are tokenized apart, because the question is not known when the context is read.
        questions = [tokenize(tokenizer, f"{sample.question}{after}{sample.answer_prefix}") for sample in own]
        contexts.append(Context(tokenize(tokenizer, before), tuple(own), tuple(questions)))
    return contexts


def fill_caches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context, configs: Sequence[CacheConfig]
) -> list[CompressedCache]:
    """Return caches with the context, compressed. The questions are not read."""
    caches = [config.build(model) for config in configs]
    inputs = {"input_ids": context.ids.to(model.device)}
    prefill(model, inputs, caches, tokenizer=tokenizer, share_statistics=True)
    return caches


def generate_from_each(
    model: PreTrainedModel, caches: Sequence[CompressedCache], question: Tensor, max_new_tokens: int
) -> list[list[int]]:
    """Return the most likely tokens after a question, from a copy of each cache.

    As in kvpress, the first token does not end an answer, and settings of the model for generation, such as a penalty
    for repetitions, do not apply.
    """
    end = model.generation_config.eos_token_id
    ends = torch.tensor([end] if isinstance(end, int) else list(end or []), device=model.device, dtype=torch.long)
    rows = BatchedCaches([cache.copy() for cache in caches])
    ids = question.to(model.device).expand(len(caches), -1)
    finished = torch.zeros(len(caches), dtype=torch.bool, device=model.device)
    steps: list[Tensor] = []
    network: Any = model
    with torch.no_grad():
        for step in range(max_new_tokens):
            ids = network(ids, past_key_values=rows, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            steps.append(ids)
            if step:
                finished |= torch.isin(ids[:, 0], ends)
            if finished.all():
                break
    return [_until_end(tokens, ends.tolist()) for tokens in torch.cat(steps, dim=1).tolist()]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if index and token in ends), len(tokens))]


def relative_bytes(cache: CompressedCache) -> float:
    """Return the bytes of the compressed layers, relative to all keys and values in 16 bits.

    Scales, positions and spare slots count. Floating-point numbers with more than 16 bits count as 16 bits.
    """
    layers = cache.compressed_layers
    storages = [layer.storage for layer in layers if layer.storage is not None]
    dtype_size = max(
        part.element_size() for storage in storages for part in storage.buffers if part.is_floating_point()
    )
    full = sum(report_layer(layer).bytes_full for layer in layers) * 2 / dtype_size
    kept = sum(
        part.numel() * min(part.element_size(), 2 if part.is_floating_point() else 8)
        for storage in storages
        for part in storage.buffers
    )
    return (kept + sum(storage.nbytes_index for storage in storages)) / full


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[Context], *, replay: bool
) -> None:
    """Check that each context fits into the context window, with its questions, answers and replay.

    Raises:
        ValueError: one does not fit.

    """
    for context in contexts:
        pairs = zip(context.samples, context.questions, strict=True)
        after = max(question.shape[1] + sample.max_new_tokens for sample, question in pairs)
        check_prompt_length(model, context.ids.shape[1] + after)
    if replay:
        longest = max(contexts, key=lambda context: context.ids.shape[1])
        replay_inputs(model, longest.ids, Instruction.from_tokenizer(tokenizer), 2048)
