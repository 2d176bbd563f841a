"""A text and how it goes on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, fill, manual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    new_tokens: int = 64,
    task: str = "text",
) -> Example:
    """Take a piece of a text, and the words after it as what is right.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the piece.
        seed: of where it starts.
        haystack: any text; Python's manual without it.
        new_tokens: about how many tokens follow, no more.
        task: name of the task.

    Raises:
        ValueError: fewer than 2 tokens to read or 1 that follows.

    """
    for name, count, least in (("tokens", tokens, 2), ("new_tokens", new_tokens, 1)):
        if count < least:
            raise ValueError(f"{name} is {count}; accepted: at least {least}")
    generator = random.Random(f"{task} {seed}")
    hay = Haystack(manual() if haystack is None else haystack, generator)

    def build(count: int) -> Example:
        document = hay.take(0, count + 1)
        # Whatever white space follows, the right answer starts with a new word.
        after = hay.take(0, count + 1 + new_tokens)[len(document) :]
        return Example(task, seed, document, None, "", after, (), new_tokens=new_tokens)

    filled = fill(tokenizer, build, tokens)
    low, high = 1, len(filled.answer) + 1
    while high - low > 1:
        middle = (low + high) // 2
        short = len(tokenizer(filled.answer[:middle], add_special_tokens=False, verbose=False).input_ids) <= new_tokens
        low, high = (middle, high) if short else (low, middle)
    return Example(task, seed, filled.document, None, "", filled.answer[:low], (), new_tokens=new_tokens)
