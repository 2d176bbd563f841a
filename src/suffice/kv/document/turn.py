"""One turn: the answer to a prompt whose first tokens a cache already holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import check_int
from suffice.kv.cache.settings import CacheSettings
from suffice.kv.eval.generation import check_prompt_length, continue_prompt, end_ids, until_end

DEFAULT_LENGTH = 128
# Arguments of `generate` that a turn sets itself, or whose results are not the text of one answer.
_OWN_OPTIONS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "use_cache",
    "streamer",
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
    "prefill_chunk_size",
)


def check_turn(
    model: PreTrainedModel,
    settings: CacheSettings,
    num_tokens: int,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> None:
    """Check the arguments of a turn before any work.

    Args:
        model: the language model.
        settings: settings of the cache.
        num_tokens: number of tokens of the whole prompt.
        max_new_tokens: maximum number of generated tokens.
        options: further arguments of `generate`.

    Raises:
        TypeError: `max_new_tokens` is not an int.
        ValueError: `max_new_tokens` is below 1, an option is not accepted, or prompt and answer do not fit into the
            context window.

    """
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
    for name in options:
        if name in _OWN_OPTIONS:
            raise ValueError(
                "options must be arguments of `generate` other than its inputs and the form of its result, got "
                f"{name!r}. For these, call model.generate(document.prompt(question).input_ids, "
                "past_key_values=document.cache.copy(), ...)"
            )
    if not settings.rerotate:
        check_prompt_length(model, num_tokens + max_new_tokens)


def generate_turn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    cache: Cache,
    max_new_tokens: int,
    options: Mapping[str, Any],
    *,
    attention_mask: Tensor | None = None,
) -> list[Tensor]:
    """Return the generated tokens of each row, up to and including the token that ends the answer.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        input_ids: the whole prompt, [batch, tokens].
        cache: the cache, to which the new tokens are added.
        max_new_tokens: maximum number of generated tokens.
        options: further arguments of `generate`.
        attention_mask: mask of the prompt, [batch, tokens]; None without padding.

    """
    given = {"tokenizer": tokenizer, **options} if options.get("stop_strings") else options
    tokens = continue_prompt(
        model, input_ids, cache, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **given
    )
    ends = end_ids(model, options)
    return [row[: len(until_end(row.tolist(), ends))] for row in tokens]
