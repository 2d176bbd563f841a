"""Fill a cache with a prompt and generate from it, greedily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.prefill import prefill
from suffice.kv.cache.read_prompt import read_prompt
from suffice.kv.hf.model_info import context_window


def check_prompt_length(model: PreTrainedModel, tokens: int) -> None:
    """Check that a prompt and its answer fit into a model's context window.

    Raises:
        ValueError: they have more tokens than the window.

    """
    window = context_window(model)
    if window is not None and tokens > window:
        raise ValueError(
            f"prompt and answer must have at most {window} tokens, the model's context window, got {tokens}. Shorten "
            "the prompt, lower max_new_tokens, or use a model with a longer window"
        )


def fill_cache(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    chunk_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> None:
    """Run a prefill: feed token ids to a model and store their keys and values in a cache.

    Args:
        model: the language model.
        input_ids: [batch, tokens].
        cache: the cache to fill; it may already hold earlier tokens.
        chunk_size: number of tokens per forward pass; None feeds all tokens at once.
        tokenizer: the model's tokenizer, for policies that replay the prompt; see `prefill`.
        attention_mask: mask of the tokens that the cache holds and of `input_ids`, [batch, all tokens]; None without
            padding.

    """
    if not input_ids.shape[1]:
        return
    ids = input_ids.to(model.device)
    mask = None if attention_mask is None else attention_mask.to(model.device)
    if awaits_replay(cache):
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        prefill(model, inputs, [cache], tokenizer=tokenizer, chunk_size=chunk_size)
        return
    with torch.no_grad():
        read_prompt(model, ids, cache, mask=mask, chunk_size=chunk_size)


def awaits_replay(cache: object) -> TypeGuard[CompressedCache]:
    """Return whether a cache is empty and its policy replays the prompt."""
    return isinstance(cache, CompressedCache) and cache.needs_replay and not cache.get_seq_length()


@dataclass
class GenerationRecord:
    """What `greedy_generate` records, if it is asked to.

    Args:
        logits: logits before each generated token, [batch, new_tokens, vocabulary].
        after_prompt: copy of the cache after the prompt, before the first generated token.

    """

    logits: Tensor | None = None
    after_prompt: CompressedCache | None = None


def greedy_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    max_new_tokens: int,
    *,
    chunk_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: GenerationRecord | None = None,
) -> Tensor:
    """Generate greedily after a prompt whose first tokens the cache may already have seen.

    The prompt is chunked here and not by `prefill_chunk_size` of `generate`, because in transformers 5.2 that option
    changes the generated tokens, even with transformers' own caches.

    Args:
        model: the language model.
        input_ids: the whole prompt, [batch, tokens].
        cache: the cache; tokens that it has seen are not fed to the model again.
        max_new_tokens: maximum number of generated tokens.
        chunk_size: number of prompt tokens per forward pass; None feeds the prompt at once.
        tokenizer: the model's tokenizer, for policies that replay the prompt; see `prefill`.
        record: filled with the logits and a copy of the cache, which must then be a `CompressedCache`.

    Returns:
        The ids of the generated tokens, [batch, new_tokens].

    """
    if chunk_size is not None or awaits_replay(cache):
        fill_cache(model, input_ids[:, cache.get_seq_length() : -1], cache, chunk_size, tokenizer)
    options: dict[str, Any] = {}
    if record is not None:

        def copy_cache(_: Tensor, scores: Tensor) -> Tensor:
            if record.after_prompt is None and isinstance(cache, CompressedCache):
                record.after_prompt = cache.copy()
            return scores

        # `generate` calls a logits processor after every forward pass, the first of which reads the prompt.
        options = {"logits_processor": [copy_cache], "output_logits": True}
    output = _generate(model, input_ids, cache, max_new_tokens=max_new_tokens, **options)
    if record is not None:
        record.logits = torch.stack(output.logits, dim=1)
    return output.sequences[:, input_ids.shape[1] :]


def continue_prompt(
    model: PreTrainedModel, input_ids: Tensor, cache: Cache, *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Generate after a prompt with `generate`, greedily unless the options say otherwise.

    Args:
        model: the language model.
        input_ids: the whole prompt, [batch, tokens].
        cache: the cache; tokens that it has seen are not fed to the model again.
        attention_mask: mask of the prompt, [batch, tokens]; None without padding.
        options: further arguments of `generate`, such as `max_new_tokens`.

    Returns:
        The ids of the generated tokens, [batch, new_tokens].

    """
    output = _generate(model, input_ids, cache, attention_mask, **options)
    return output.sequences[:, input_ids.shape[1] :]


def _generate(
    model: PreTrainedModel, input_ids: Tensor, cache: Cache, attention_mask: Tensor | None = None, **options: Any
) -> Any:
    """Return what `generate` returns with `return_dict_in_generate=True`."""
    input_ids = input_ids.to(model.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(model.device)
    options = {"do_sample": False, "pad_token_id": _pad_token_id(model), **options}
    network: Any = model
    return network.generate(
        input_ids=input_ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options
    )


def end_ids(model: PreTrainedModel, options: Mapping[str, Any] | None = None) -> list[int]:
    """Return the ids of the tokens that end a text, under options of `generate`."""
    options = options or {}
    config = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    return [ends] if isinstance(ends, int) else list(ends or [])


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Return generated tokens up to and including the first that ends the text. Others may be padding behind it."""
    return next((tokens[: index + 1] for index, token in enumerate(tokens) if token in ends), tokens)


def _pad_token_id(model: PreTrainedModel) -> int | None:
    """Return the id of the token that pads finished rows while other rows are still generated."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    ends = config.eos_token_id
    return ends[0] if isinstance(ends, list) else ends
