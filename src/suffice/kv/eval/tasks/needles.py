"""Needles in a haystack: values hidden under keys (RULER, 2404.06654)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from suffice.arguments import check_choice, check_int, check_number
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, distinct_words, fit_to_length, python_manual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLORS = (
    "amber black blue bronze brown copper crimson golden green grey indigo ivory olive orange pink purple scarlet "
    "silver violet white yellow"
)
_PLACES = (
    "abbey bakery bridge castle cathedral chapel cinema factory farm ferry forge garden granary harbour hotel inn "
    "library lighthouse market mill museum observatory orchard palace pavilion quarry school stable station theatre "
    "tower tunnel vineyard warehouse windmill workshop"
)
_NOUNS = {"numbers": "access code", "words": "password", "uuids": "serial number"}  # by type of value


def needles(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    value_type: str = "numbers",
    depth: float | None = None,
    task: str = "needles",
) -> Example:
    """Hide values under keys in a text, and ask for the values of one or several keys.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the prompt.
        seed: seed of all random choices.
        haystack: any text; Python's help texts by default.
        num_keys: number of hidden keys.
        num_values: number of values under each key.
        num_queries: number of keys that the question names.
        value_type: `"numbers"` of six digits, `"words"` from the haystack, or `"uuids"`.
        depth: position of all needles, 0 for the start of the text and 1 for the end; None draws one per needle.
        task: name of the task.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit into `tokens`.

    """
    colors, places = _COLORS.split(), _PLACES.split()
    max_keys = len(colors) * len(places)
    num_keys, num_values = check_int("num_keys", num_keys, 1, max_keys), check_int("num_values", num_values, 1)
    num_queries = check_int("num_queries", num_queries, 1)
    if num_queries > num_keys:
        raise ValueError(f"num_queries must be at most the number of keys, {num_keys}, got {num_queries}")
    check_choice("value_type", value_type, _NOUNS)
    if depth is not None:
        check_number("depth", depth, minimum=0, maximum=1)
    generator = random.Random(f"{task} {seed}")
    text = python_manual() if haystack is None else haystack
    filler = Haystack(text, generator)
    keys = [
        f"{colors[number % len(colors)]} {places[number // len(colors)]}"
        for number in generator.sample(range(max_keys), num_keys)
    ]
    values = _draw_values(generator, value_type, num_keys * num_values, text)
    hidden = [(key, values[index * num_values + j]) for index, key in enumerate(keys) for j in range(num_values)]
    generator.shuffle(hidden)
    # Random depths leave out the last tenth of the text, because a needle there would show the last queries what a
    # needle looks like.
    depths = sorted(generator.uniform(0, 0.9) if depth is None else depth for _ in hidden)
    asked = sorted(generator.sample(keys, num_queries), key=lambda key: [k for k, _ in hidden].index(key))
    gold = [value for key in asked for other, value in hidden if other == key]
    noun = _NOUNS[value_type]

    def build(num_words: int) -> Example:
        parts: list[str] = []
        start = 0
        for needle_depth, (key, value) in zip(depths, hidden, strict=True):
            stop = round(needle_depth * num_words)
            parts += [filler.words(start, stop), f"One {noun} of the {key} is {value}."]
            start = stop
        parts.append(filler.words(start, num_words))
        owners = _enumerate_in_words([f"the {key}" for key in asked])
        what = noun if len(gold) == 1 else f"{noun}s"
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(part for part in parts if part),
            question=f"What {'is' if len(gold) == 1 else 'are'} the {what} of {owners}?",
            answer_prefix=f"The {what} of {owners} {'is' if len(gold) == 1 else 'are'}",
            answer=f" {_enumerate_in_words(gold)}.",
            references=tuple(gold),
            distractors=tuple(value for key, value in hidden if key not in asked),
            max_new_tokens=16 + len(tokenizer(" ".join(gold), verbose=False).input_ids),
        )

    return fit_to_length(tokenizer, build, tokens)


def _draw_values(generator: random.Random, value_type: str, count: int, text: str) -> list[str]:
    """Draw distinct values that do not occur in the haystack."""
    words = distinct_words(text) if value_type == "words" else ()
    min_words = max(8, 2 * count)
    if value_type == "words" and len(words) < min_words:
        raise ValueError(f"haystack must have at least {min_words} distinct words to draw from, got {len(words)}")

    def draw() -> str:
        if value_type == "numbers":
            return str(generator.randrange(100_000, 1_000_000))
        if value_type == "uuids":
            return str(uuid.UUID(int=generator.getrandbits(128), version=4))
        # Two words, because each single word occurs in the haystack.
        return "-".join(generator.sample(words, 2))

    values: list[str] = []
    while len(values) < count:
        value = draw()
        if value not in values and value not in text:
            values.append(value)
    return values


def _enumerate_in_words(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
