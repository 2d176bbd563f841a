"""The most frequent words of a list, and of an invented text (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

from suffice.arguments import check_int, check_number
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import distinct_words, fit_to_length, python_manual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_INVENTED_WORDS = 1000


def common_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    num_common: int = 10,
    frequency: int | None = None,
    task: str = "common-words",
) -> Example:
    """Make a list that contains some words many times, and ask for these words.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the prompt.
        seed: seed of all random choices.
        haystack: any text whose words are used; Python's help texts by default.
        num_common: number of frequent words.
        frequency: how often each frequent word occurs; None fills about half of the prompt with them, with at most
            30 occurrences each. All other words occur a tenth as often, at least once.
        task: name of the task.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit into `tokens`.

    """
    num_common = check_int("num_common", num_common, 1)
    words = list(distinct_words(python_manual() if haystack is None else haystack))
    random.Random(f"{task} {seed}").shuffle(words)
    if len(words) <= num_common:
        raise ValueError(f"haystack must have more than {num_common} distinct words to draw from, got {len(words)}")
    common, rare = sorted(words[:num_common]), words[num_common:]
    if frequency is None:
        entries = "\n".join(f"{number}. {word}" for number, word in enumerate(common, 101))
        frequency = min(30, max(2, tokens // (2 * len(tokenizer(entries, verbose=False).input_ids))))
    frequency = check_int("frequency", frequency, 2)
    rare_frequency = max(1, frequency // 10)

    def build(count: int) -> Example:
        others = rare[: count + 1]
        entries = common * frequency + others * rare_frequency
        random.Random(f"{task} order {seed}").shuffle(entries)
        return Example(
            task=task,
            seed=seed,
            document="\n".join(f"{number}. {word}" for number, word in enumerate(entries, 1)),
            question=f"Which {num_common} words come most often in this list?",
            answer_prefix=f"The {num_common} words that come most often are",
            answer=f" {', '.join(common)}.",
            references=tuple(common),
            distractors=tuple(others),
            max_new_tokens=16 + len(tokenizer(", ".join(common), verbose=False).input_ids),
        )

    return fit_to_length(tokenizer, build, tokens, max_filler=len(rare) - 1)


def frequent_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    alpha: float = 2.0,
    num_queries: int = 3,
    task: str = "frequent-words",
) -> Example:
    """Make a text of invented words with frequencies proportional to rank^(−alpha); ask for the most frequent ones.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the prompt.
        seed: seed of all random choices.
        alpha: exponent of the frequency, above 0.
        num_queries: number of words that the question asks for.
        task: name of the task.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit into `tokens`.

    """
    alpha = check_number("alpha", alpha, above=0)
    num_queries = check_int("num_queries", num_queries, 1)
    generator = random.Random(f"{task} {seed}")
    words: list[str] = []
    while len(words) < _NUM_INVENTED_WORDS:
        word = "".join(generator.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    # Find the shortest text in which each word of the answer occurs more often than the next word.
    min_top_count = 1
    while len(set(_counts(min_top_count, alpha)[: num_queries + 1])) <= num_queries:
        min_top_count += 1

    def build(filler: int) -> Example:
        counts = _counts(min_top_count + filler, alpha)
        entries = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
        random.Random(f"{task} order {seed}").shuffle(entries)
        most_frequent = words[:num_queries]
        return Example(
            task=task,
            seed=seed,
            document=" ".join(entries),
            question=f"Which {num_queries} words come most often in this text?",
            answer_prefix=f"The {num_queries} words that come most often are",
            answer=f" {', '.join(most_frequent)}.",
            references=tuple(most_frequent),
            distractors=tuple(words[num_queries : len(counts)]),
            max_new_tokens=16 + len(tokenizer(", ".join(most_frequent), verbose=False).input_ids),
        )

    return fit_to_length(tokenizer, build, tokens)


def _counts(top_count: int, alpha: float) -> list[int]:
    """Return how often the word of each rank occurs if the first occurs `top_count` times; zeros are left out."""
    counts: list[int] = []
    while len(counts) < _NUM_INVENTED_WORDS and (count := round(top_count * (len(counts) + 1) ** -alpha)) > 0:
        counts.append(count)
    return counts
