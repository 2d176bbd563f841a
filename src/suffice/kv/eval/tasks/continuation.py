"""A piece of a text, and its continuation."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from suffice.arguments import check_int
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, fit_to_length, python_manual
from suffice.kv.hf.tokenization import tokenize_continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    max_new_tokens: int = 64,
    task: str = "text",
) -> Example:
    """Take a piece of a text; its continuation is the right answer.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the piece.
        seed: seed of the random position at which the piece starts.
        haystack: any text; Python's help texts by default.
        max_new_tokens: maximum number of tokens in the continuation.
        task: name of the task.

    Raises:
        ValueError: an argument is out of range.

    """
    tokens, max_new_tokens = check_int("tokens", tokens, 2), check_int("max_new_tokens", max_new_tokens, 1)
    generator = random.Random(f"{task} {seed}")
    text = Haystack(python_manual() if haystack is None else haystack, generator)

    def build(num_words: int) -> Example:
        document = text.words(0, num_words + 1)
        # The continuation starts with the white space after the document.
        following = text.words(0, num_words + 1 + max_new_tokens)[len(document) :]
        return Example(task, seed, document, None, "", following, (), max_new_tokens=max_new_tokens)

    example = fit_to_length(tokenizer, build, tokens)
    # Find the longest prefix of the continuation with at most `max_new_tokens` tokens.
    low, high = 1, len(example.answer) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = tokenize_continuation(tokenizer, example.answer[:middle]).shape[1] <= max_new_tokens
        low, high = (middle, high) if fits else (low, middle)
    return replace(example, answer=example.answer[:low])
