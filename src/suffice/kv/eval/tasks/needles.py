"""Needles in a haystack: one or several values under one or several keys (RULER, 2404.06654)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, fill, manual, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLOURS = (
    "amber black blue bronze brown copper crimson golden green grey indigo ivory olive orange pink purple scarlet "
    "silver violet white yellow"
)
_PLACES = (
    "abbey bakery bridge castle cathedral chapel cinema factory farm ferry forge garden granary harbour hotel inn "
    "library lighthouse market mill museum observatory orchard palace pavilion quarry school stable station theatre "
    "tower tunnel vineyard warehouse windmill workshop"
)
VALUES = ("numbers", "words", "uuids")


def needles(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    kind: str = "numbers",
    depth: float | None = None,
    task: str = "needles",
) -> Example:
    """Hide values under keys in a text and ask for those of one key, or of several.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the prompt.
        seed: of everything drawn.
        haystack: any text; Python's manual without it.
        keys: how many keys are hidden.
        values: how many values under each key.
        queries: how many of the keys are asked for.
        kind: what a value is: `"numbers"` of six digits, `"words"` of the haystack, or `"uuids"`.
        depth: where all needles are, 0 for the start and 1 for the end; None draws it for each.
        task: name of the task.

    Raises:
        ValueError: counts that do not fit together, or too few tokens.

    """
    colours, places = _COLOURS.split(), _PLACES.split()
    for name, count in (("keys", keys), ("values", values), ("queries", queries)):
        if count < 1:
            raise ValueError(f"{name} is {count}; accepted: at least 1")
    if keys > len(colours) * len(places):
        raise ValueError(f"keys is {keys}; accepted: at most {len(colours) * len(places)}")
    if queries > keys:
        raise ValueError(f"queries is {queries}; accepted: at most the number of keys, {keys}")
    if kind not in VALUES:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(VALUES)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; accepted: 0 to 1")
    generator = random.Random(f"{task} {seed}")
    text = manual() if haystack is None else haystack
    hay = Haystack(text, generator)
    names = [
        f"{colours[number % len(colours)]} {places[number // len(colours)]}"
        for number in generator.sample(range(len(colours) * len(places)), keys)
    ]
    drawn = _values(generator, kind, keys * values, text)
    hidden = [(name, drawn[place * values + j]) for place, name in enumerate(names) for j in range(values)]
    generator.shuffle(hidden)
    # The last tenth stays plain: a needle there would show the last queries what a needle looks like.
    depths = sorted(generator.uniform(0, 0.9) if depth is None else depth for _ in hidden)
    asked = sorted(generator.sample(names, queries), key=lambda name: [n for n, _ in hidden].index(name))
    found = [(name, value) for own in asked for name, value in hidden if name == own]
    noun = {"numbers": "access code", "words": "password", "uuids": "serial number"}[kind]

    def build(count: int) -> Example:
        parts: list[str] = []
        start = 0
        for place, (name, value) in zip(depths, hidden, strict=True):
            stop = round(place * count)
            parts += [hay.take(start, stop), f"One {noun} of the {name} is {value}."]
            start = stop
        parts.append(hay.take(start, count))
        whom = _listed([f"the {name}" for name in asked])
        what = noun if len(found) == 1 else f"{noun}s"
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(part for part in parts if part),
            question=f"What {'is' if len(found) == 1 else 'are'} the {what} of {whom}?",
            opening=f"The {what} of {whom} {'is' if len(found) == 1 else 'are'}",
            answer=f" {_listed([value for _, value in found])}.",
            references=tuple(value for _, value in found),
            distractors=tuple(value for own, value in hidden if own not in asked),
            new_tokens=16 + len(tokenizer(" ".join(value for _, value in found), verbose=False).input_ids),
        )

    return fill(tokenizer, build, tokens)


def _values(generator: random.Random, kind: str, count: int, text: str) -> list[str]:
    """Distinct values, none of which is in the haystack already nor part of another."""
    words = vocabulary(text) if kind == "words" else ()
    if kind == "words" and len(words) < max(8, 2 * count):
        raise ValueError(f"haystack has {len(words)} words to draw from; accepted: at least {max(8, 2 * count)}")

    def draw() -> str:
        if kind == "numbers":
            return str(generator.randrange(100_000, 1_000_000))
        if kind == "uuids":
            return str(uuid.UUID(int=generator.getrandbits(128), version=4))
        # Two words, since one alone stands in the haystack.
        return "-".join(generator.sample(words, 2))

    found: list[str] = []
    while len(found) < count:
        value = draw()
        if value not in found and value not in text:
            found.append(value)
    return found


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
