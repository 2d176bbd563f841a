"""Haystacks: the text that a task hides something in, and how much of it fits."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@functools.cache
def manual() -> str:
    """Return Python's own manual, some 700 kB of English that every interpreter brings along."""
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1500)


class Haystack:
    """A text that starts anywhere and never ends.

    Args:
        text: any text; read from its start again when it is used up.
        generator: decides where it starts.

    Raises:
        ValueError: the text holds no word.

    """

    def __init__(self, text: str, generator: random.Random) -> None:
        self.text = text
        self._words = _words(text)
        if not self._words:
            raise ValueError("haystack holds no word; accepted: some text")
        self._start = generator.randrange(len(self._words))

    def take(self, first: int, last: int) -> str:
        """Return the words from `first` to `last` as they stand in the text, white space between them too."""
        words = self._words
        return "".join(words[(self._start + place) % len(words)] for place in range(first, last)).rstrip()


@functools.lru_cache(maxsize=8)
def _words(text: str) -> list[str]:
    found = re.findall(r"\S+\s*", text)
    if found and not found[-1][-1].isspace():
        found[-1] += "\n\n"  # where the text starts again
    return found


@functools.lru_cache(maxsize=8)
def vocabulary(text: str) -> tuple[str, ...]:
    """Return the words of four to nine small letters that a text uses, sorted; none is part of another."""
    found = sorted(set(re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w.])", text)), key=lambda word: (len(word), word))
    kept: list[str] = []
    parts: set[str] = set()
    for word in reversed(found):  # long ones first, so that what is part of one is known
        if word not in parts:
            kept.append(word)
            parts.update(word[i:j] for i in range(len(word)) for j in range(i + 4, len(word) + 1))
    return tuple(sorted(kept))


def fill(
    tokenizer: PreTrainedTokenizerBase, build: Callable[[int], Example], tokens: int, *, most: int | None = None
) -> Example:
    """Return the longest example whose prompt has at most so many tokens.

    Args:
        tokenizer: counts them.
        build: makes an example with so much filling.
        tokens: length of the prompt, the question and the template included.
        most: the most filling that there is.

    Raises:
        ValueError: without any filling the prompt is already longer.

    """

    def length(count: int) -> int:
        return int(build(count).prompt(tokenizer).ids.shape[1])

    shortest = length(0)
    if shortest > tokens:
        raise ValueError(f"tokens is {tokens}; accepted: at least {shortest} for this task and these options")
    low, high = 0, 16
    while (most is None or high < most) and length(high) <= tokens:
        low, high = high, 2 * high
    high = high if most is None else min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(middle) <= tokens else (low, middle)
    return build(low)
