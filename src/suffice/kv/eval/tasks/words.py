"""Words that come most often, in a list and in made-up text (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import fill, manual, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def common_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    common: int = 10,
    times: int | None = None,
    task: str = "common-words",
) -> Example:
    """List words, some of them many times, and ask for those.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the prompt.
        seed: of everything drawn.
        haystack: any text, whose words are used; Python's manual without it.
        common: how many words come often.
        times: how often; None means what fills about half of the prompt, at most 30. The others come a tenth as
            often, at least once.
        task: name of the task.

    Raises:
        ValueError: fewer than one common word, fewer than two times, or too few tokens.

    """
    if common < 1:
        raise ValueError(f"common is {common}; accepted: at least 1")
    words = list(vocabulary(manual() if haystack is None else haystack))
    random.Random(f"{task} {seed}").shuffle(words)
    if len(words) <= common:
        raise ValueError(f"haystack has {len(words)} words to draw from; accepted: more than common, {common}")
    gold, rest = sorted(words[:common]), words[common:]
    if times is None:
        entry = len(tokenizer("\n".join(f"{j}. {word}" for j, word in enumerate(gold, 101)), verbose=False).input_ids)
        times = min(30, max(2, tokens // (2 * entry)))
    if times < 2:
        raise ValueError(f"times is {times}; accepted: at least 2")
    rare = max(1, times // 10)

    def build(count: int) -> Example:
        others = rest[: count + 1]
        entries = gold * times + others * rare
        random.Random(f"{task} order {seed}").shuffle(entries)
        return Example(
            task=task,
            seed=seed,
            document="\n".join(f"{number}. {word}" for number, word in enumerate(entries, 1)),
            question=f"Which {common} words come most often in this list?",
            opening=f"The {common} words that come most often are",
            answer=f" {', '.join(gold)}.",
            references=tuple(gold),
            distractors=tuple(others),
            new_tokens=16 + len(tokenizer(", ".join(gold), verbose=False).input_ids),
        )

    return fill(tokenizer, build, tokens, most=len(rest) - 1)


def frequent_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    alpha: float = 2.0,
    asked: int = 3,
    task: str = "frequent-words",
) -> Example:
    """Write made-up words whose frequency falls as rank to the power −alpha, and ask for the first.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the prompt.
        seed: of everything drawn.
        alpha: how fast frequency falls with rank, above 0.
        asked: how many words are asked for.
        task: name of the task.

    Raises:
        ValueError: alpha or asked out of range, or too few tokens.

    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; accepted: a positive number")
    if asked < 1:
        raise ValueError(f"asked is {asked}; accepted: at least 1")
    generator = random.Random(f"{task} {seed}")
    words: list[str] = []
    while len(words) < 1000:
        word = "".join(generator.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    # The least text in which each word that is asked for comes more often than the next.
    least = 1
    while len(set(counts := _counts(least, alpha)[: asked + 1])) <= asked or len(counts) <= asked:
        least += 1

    def build(count: int) -> Example:
        numbers = _counts(least + count, alpha)
        entries = [word for word, number in zip(words, numbers, strict=False) for _ in range(number)]
        random.Random(f"{task} order {seed}").shuffle(entries)
        gold = words[:asked]
        return Example(
            task=task,
            seed=seed,
            document=" ".join(entries),
            question=f"Which {asked} words come most often in this text?",
            opening=f"The {asked} words that come most often are",
            answer=f" {', '.join(gold)}.",
            references=tuple(gold),
            distractors=tuple(words[asked : len(numbers)]),
            new_tokens=16 + len(tokenizer(", ".join(gold), verbose=False).input_ids),
        )

    return fill(tokenizer, build, tokens)


def _counts(first: int, alpha: float) -> list[int]:
    """How often each rank comes when the first comes `first` times; ranks that do not come are left out."""
    counts: list[int] = []
    while len(counts) < 1000 and (number := round(first * (len(counts) + 1) ** -alpha)) > 0:
        counts.append(number)
    return counts
