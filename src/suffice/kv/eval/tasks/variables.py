"""Variable tracking: which names hold a value, over chains of assignments (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, fill, manual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def variables(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    chains: int = 2,
    hops: int = 4,
    task: str = "variables",
) -> Example:
    """Assign a number to a variable, that variable to another and so on, and ask for all that hold the number.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the prompt.
        seed: of everything drawn.
        haystack: any text; Python's manual without it.
        chains: how many such chains there are; one is asked for.
        hops: assignments of a chain after its first.
        task: name of the task.

    Raises:
        ValueError: fewer than one chain or hop, or too few tokens.

    """
    for name, count in (("chains", chains), ("hops", hops)):
        if count < 1:
            raise ValueError(f"{name} is {count}; accepted: at least 1")
    generator = random.Random(f"{task} {seed}")
    text = manual() if haystack is None else haystack
    hay = Haystack(text, generator)
    names: list[str] = []
    while len(names) < chains * (hops + 1):
        name = "".join(generator.choices(string.ascii_uppercase, k=5))
        # Scoring ignores case.
        if name not in names and name.lower() not in text.lower():
            names.append(name)
    numbers: list[str] = []
    while len(numbers) < chains:
        number = str(generator.randrange(10_000, 100_000))
        if number not in numbers and number not in text:
            numbers.append(number)
    groups = [names[chain * (hops + 1) : (chain + 1) * (hops + 1)] for chain in range(chains)]
    lines = [_lines(group, number) for group, number in zip(groups, numbers, strict=True)]
    # The order within a chain stays; chains mix.
    turns = [chain for chain in range(chains) for _ in range(hops + 1)]
    generator.shuffle(turns)
    steps = [iter(own) for own in lines]
    statements = [next(steps[chain]) for chain in turns]
    depths = sorted(generator.uniform(0, 0.9) for _ in statements)

    def build(count: int) -> Example:
        parts: list[str] = []
        start = 0
        for place, statement in zip(depths, statements, strict=True):
            stop = round(place * count)
            parts += [hay.take(start, stop), statement]
            start = stop
        parts.append(hay.take(start, count))
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(part for part in parts if part),
            question=f"Which variables hold the value {numbers[0]}, directly or through other variables?",
            opening=f"The {hops + 1} variables that hold the value {numbers[0]} are",
            answer=f" {', '.join(groups[0])}.",
            references=tuple(groups[0]),
            distractors=tuple(name for group in groups[1:] for name in group),
            new_tokens=16 + len(tokenizer(", ".join(groups[0]), verbose=False).input_ids),
        )

    return fill(tokenizer, build, tokens)


def _lines(names: list[str], number: str) -> list[str]:
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {value}" for name, value in zip(names, values, strict=True)]
