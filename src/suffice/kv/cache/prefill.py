"""The prefill of one or several caches, in one pass over the prompt or, for policies that need it, in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from suffice.arguments import check_flag, check_optional_int, shown
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.group import check_caches
from suffice.kv.cache.replay import replayed_prefill
from suffice.kv.cache.shared_prefill import PrefillResult, SharedPrefill
from suffice.kv.hf.tokenization import check_tokenizer
from suffice.kv.hf.wrappers import unwrap_model


def prefill(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    caches: Sequence[CompressedCache],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    share_statistics: bool = False,
    chunk_size: int | None = None,
) -> PrefillResult:
    """Fill empty caches of a model with one prompt, each with its own policy and budget.

    All caches share one forward pass over the prompt. If the policy of a cache needs a replay (`kvzip`, `kvzip+`,
    `kvgrad`, `capkv-replay`), the model then repeats the prompt, in parts of 2,048 tokens (512 for `kvgrad`), while all
    entries of the prompt are still in memory; the queries of the repeated text show which entries are read. On a CPU,
    a prefill of 1,000 tokens then takes four to seven times as long. It does not change `logits`.

    Args:
        model: the model that the caches were made for.
        inputs: `input_ids` [batch, tokens] and, with padding, `attention_mask`.
        caches: empty caches.
        tokenizer: the model's tokenizer, for the instruction to repeat the prompt. None replays the prompt without an
            instruction.
        share_statistics: compute statistics that several policies use, such as the attention that tokens received, only
            once for all caches. The time of a cache then excludes the statistics that an earlier cache has computed.
        chunk_size: number of tokens of a forward pass over the prompt; None reads it at once. It requires that the
            policies of all caches need a replay: these evict only after all chunks. For other policies, make the cache
            with `evict="always"` and call the model on one chunk after the other.

    Returns:
        The logits of the last token, and the time that each cache took to score and evict.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no cache, a cache occurs twice, or a cache has already seen tokens; `chunk_size` is given
            for a policy without a replay, or below 1; or prompt and replay do not fit into the context window.

    Example:
        >>> cache = CompressedCache(model, "kvzip", budget=0.2)                             # doctest: +SKIP
        >>> inputs = tokenizer(text, return_tensors="pt")                                   # doctest: +SKIP
        >>> filled = prefill(model, inputs, [cache], tokenizer=tokenizer)                   # doctest: +SKIP

    """
    unwrap_model(model)
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping such as {{'input_ids': ids}}, got {shown(inputs)}")
    caches = check_caches(caches)
    check_flag("share_statistics", share_statistics)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    for number, cache in enumerate(caches):
        if cache.get_seq_length():
            raise ValueError(f"caches[{number}] must be empty, got one that has seen {cache.get_seq_length()} tokens")
    chunk_size = check_optional_int("chunk_size", chunk_size, 1, unit="token")
    replayed = [cache for cache in caches if cache.needs_replay]
    if chunk_size is not None and len(replayed) < len(caches):
        names = ", ".join(repr(cache.policy.name) for cache in caches if not cache.needs_replay)
        raise ValueError(
            f"chunk_size must be None for policies without a replay ({names}), got {chunk_size}. Make the cache with "
            "evict='always', and call the model on one chunk after the other"
        )
    if not replayed:
        shared = SharedPrefill(caches, share_statistics)
        with torch.no_grad():
            network: Any = model
            out: Any = network(**inputs, past_key_values=shared, use_cache=True, logits_to_keep=1)
        return PrefillResult(out.logits[:, -1], shared.seconds)
    return replayed_prefill(
        model, inputs, caches, tokenizer=tokenizer, share_statistics=share_statistics, chunk_size=chunk_size
    )
