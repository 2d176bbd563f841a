"""Filler text of the tasks, and a search for the amount of filler that fits into a prompt."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def manual_topics() -> list[str]:
    """Return the long topics of Python's help texts: about 700 kB of English, part of every Python installation."""
    import pydoc_data.topics

    return [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1500]


@functools.cache
def python_manual() -> str:
    """Return the long topics of Python's help texts as one text."""
    return "\n\n".join(manual_topics())


class Haystack:
    """An endless text that starts at a random word.

    Args:
        text: any text; after its end, it is read again from the beginning.
        generator: draws the first word.

    Raises:
        ValueError: the text has no words.

    """

    def __init__(self, text: str, generator: random.Random) -> None:
        self.text = text
        self._words = _words(text)
        if not self._words:
            raise ValueError(f"haystack must hold at least one word, got {text!r}")
        self._start = generator.randrange(len(self._words))

    def words(self, start: int, stop: int) -> str:
        """Return the words from index `start` up to `stop`, with the white space between them."""
        words = self._words
        return "".join(words[(self._start + index) % len(words)] for index in range(start, stop)).rstrip()


@functools.lru_cache(maxsize=8)
def _words(text: str) -> list[str]:
    words = re.findall(r"\S+\s*", text)
    if words and not words[-1][-1].isspace():
        words[-1] += "\n\n"  # the text repeats after its last word
    return words


@functools.lru_cache(maxsize=8)
def distinct_words(text: str) -> tuple[str, ...]:
    """Return the words of four to nine lowercase letters in a text, sorted; none is a substring of another."""
    words = sorted(set(re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w.])", text)), key=lambda word: (len(word), word))
    kept: list[str] = []
    substrings: set[str] = set()
    for word in reversed(words):  # the longest first, so that all substrings are known
        if word not in substrings:
            kept.append(word)
            substrings.update(word[i:j] for i in range(len(word)) for j in range(i + 4, len(word) + 1))
    return tuple(sorted(kept))


def fit_to_length(
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[int], Example],
    tokens: int,
    *,
    max_filler: int | None = None,
) -> Example:
    """Return the longest example whose prompt has at most `tokens` tokens.

    Args:
        tokenizer: counts tokens.
        build: makes an example with a given amount of filler.
        tokens: maximum length of the prompt, including the question and the chat template.
        max_filler: maximum amount of filler; None for no limit.

    Raises:
        ValueError: the prompt is longer than `tokens` even without filler.

    """

    def length(filler: int) -> int:
        return int(build(filler).prompt(tokenizer).input_ids.shape[1])

    min_tokens = length(0)
    if min_tokens > tokens:
        raise ValueError(f"tokens must be at least {min_tokens} for this task and these options, got {tokens}")
    low, high = 0, 16
    while (max_filler is None or high < max_filler) and length(high) <= tokens:
        low, high = high, 2 * high
    high = high if max_filler is None else min(high, max_filler + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(middle) <= tokens else (low, middle)
    return build(low)
