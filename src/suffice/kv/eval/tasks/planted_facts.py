"""Facts planted in a document of real English: several questions about the same document."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from suffice.arguments import check_int
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import manual_topics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = ("lighthouse", "orchard", "foundry", "cathedral", "harbour", "vineyard", "quarry", "observatory")


def planted_facts(
    tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int = 0, num_facts: int = 4, task: str = "planted-facts"
) -> list[Example]:
    """Plant facts at evenly spaced depths in Python's help texts, and ask for each of them.

    Args:
        tokenizer: counts tokens.
        tokens: approximate number of tokens in the document.
        seed: seed of all random choices.
        num_facts: number of facts, at most 8.
        task: name of the task.

    Returns:
        One example per fact; all of them have the same document.

    Raises:
        ValueError: the number of facts is out of range.

    """
    num_facts = check_int("num_facts", num_facts, 1, len(_PLACES))
    generator = random.Random(seed)
    topics = manual_topics()
    generator.shuffle(topics)
    words = " ".join(" ".join(topics[:12]).split()).split(" ")
    codes = {place: str(generator.randrange(100_000, 1_000_000)) for place in generator.sample(_PLACES, num_facts)}
    facts = [f"The access code of the {place} is {code}." for place, code in codes.items()]

    def build(num_words: int) -> str:
        parts: list[str] = []
        for index, fact in enumerate(facts):
            before = words[index * num_words // num_facts : (index + 1) * num_words // num_facts]
            parts += [*before, "\n\n", fact, "\n\n"]
        return " ".join([*parts, *words[num_words : num_words + num_words // 10]])

    num_words = tokens // 2
    for _ in range(4):
        num_words = round(num_words * tokens / len(tokenizer(build(num_words), verbose=False).input_ids))
    document = build(num_words)
    return [
        Example(
            task=task,
            seed=seed,
            document=document,
            question=f"What is the access code of the {place}?",
            answer_prefix="",
            answer=fact,
            references=(code,),
            distractors=tuple(other for other in codes.values() if other != code),
            max_new_tokens=24,
        )
        for (place, code), fact in zip(codes.items(), facts, strict=True)
    ]
