"""Variable tracking: which variables hold a value, over chains of assignments (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

from suffice.arguments import check_int
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import Haystack, fit_to_length, python_manual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def variables(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    haystack: str | None = None,
    num_chains: int = 2,
    num_hops: int = 4,
    task: str = "variables",
) -> Example:
    """Assign a number to a variable, that variable to another and so on; ask for all variables that hold the number.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the prompt.
        seed: seed of all random choices.
        haystack: any text; Python's help texts by default.
        num_chains: number of chains; the question asks for one of them.
        num_hops: number of assignments in a chain after the first.
        task: name of the task.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit into `tokens`.

    """
    num_chains, num_hops = check_int("num_chains", num_chains, 1), check_int("num_hops", num_hops, 1)
    generator = random.Random(f"{task} {seed}")
    text = python_manual() if haystack is None else haystack
    filler = Haystack(text, generator)
    names: list[str] = []
    while len(names) < num_chains * (num_hops + 1):
        name = "".join(generator.choices(string.ascii_uppercase, k=5))
        # Compare in lower case, because scoring ignores case.
        if name not in names and name.lower() not in text.lower():
            names.append(name)
    numbers: list[str] = []
    while len(numbers) < num_chains:
        number = str(generator.randrange(10_000, 100_000))
        if number not in numbers and number not in text:
            numbers.append(number)
    chains = [names[chain * (num_hops + 1) : (chain + 1) * (num_hops + 1)] for chain in range(num_chains)]
    assignments = [iter(_assignments(chain, number)) for chain, number in zip(chains, numbers, strict=True)]
    # The chains are interleaved; the order within each chain is kept.
    order = [chain for chain in range(num_chains) for _ in range(num_hops + 1)]
    generator.shuffle(order)
    statements = [next(assignments[chain]) for chain in order]
    depths = sorted(generator.uniform(0, 0.9) for _ in statements)

    def build(num_words: int) -> Example:
        parts: list[str] = []
        start = 0
        for depth, statement in zip(depths, statements, strict=True):
            stop = round(depth * num_words)
            parts += [filler.words(start, stop), statement]
            start = stop
        parts.append(filler.words(start, num_words))
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(part for part in parts if part),
            question=f"Which variables hold the value {numbers[0]}, directly or through other variables?",
            answer_prefix=f"The {num_hops + 1} variables that hold the value {numbers[0]} are",
            answer=f" {', '.join(chains[0])}.",
            references=tuple(chains[0]),
            distractors=tuple(name for chain in chains[1:] for name in chain),
            max_new_tokens=16 + len(tokenizer(", ".join(chains[0]), verbose=False).input_ids),
        )

    return fit_to_length(tokenizer, build, tokens)


def _assignments(names: list[str], number: str) -> list[str]:
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {value}" for name, value in zip(names, values, strict=True)]
