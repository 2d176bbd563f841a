"""Questions about one of many documents (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST = "Ada Bruno Clara David Elena Felix Greta Hugo Irma Jonas Karin Leo Mona Nils Olga Paul Rita Simon Tilda Viktor"
_LAST = "Abel Brandt Carlsen Duval Eklund Ferrari Gruber Hansen Ivanov Jensen Keller Lindt Moreau Novak Olsen Petit"
_TOWNS = (
    "Aarhus Antwerp Bergen Bilbao Bologna Bruges Cork Dresden Ghent Gothenburg Graz Krakow Leipzig Linz Lyon Malmo "
    "Nantes Odense Porto Riga Rouen Seville Tallinn Tartu Trieste Turin Turku Utrecht Vilnius Zagreb"
)
_TRADES = (
    "baker carpenter chemist clockmaker dentist engraver glazier joiner lawyer painter potter printer tailor weaver"
)


@dataclass(frozen=True)
class Passage:
    """A document that a question can be asked of.

    Args:
        text: the document.
        question: what it answers; None for one that only distracts.
        answers: accepted answers, each of them in the text; the first is the gold answer.

    """

    text: str
    question: str | None = None
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text of a passage is empty; accepted: some text")
        if self.question is not None and not self.answers:
            raise ValueError(
                f"answers of the passage with the question {self.question!r} is empty; accepted: one or more"
            )
        for answer in self.answers:
            if not answer or answer.lower() not in self.text.lower():
                raise ValueError(f"answer {answer!r} does not stand in its passage {self.text[:60]!r}…")


def lives(count: int, seed: int = 0) -> list[Passage]:
    """Return short made-up lives, each with a question for its town; every person comes once.

    Raises:
        ValueError: more than there are names, 7,800, or none.

    """
    people = [f"{f} {m}. {last}" for f in _FIRST.split() for m in string.ascii_uppercase for last in _LAST.split()]
    if not 1 <= count <= len(people):
        raise ValueError(f"count is {count}; accepted: 1 to {len(people)}")
    generator = random.Random(f"lives {seed}")
    found: list[Passage] = []
    for person in generator.sample(people, count):
        town = generator.choice(_TOWNS.split())
        born = generator.randrange(1820, 1960)
        trade = generator.choice(_TRADES.split())
        text = (
            f"{person} was born in {born}, the {generator.choice(('first', 'second', 'third', 'fourth'))} child of a "
            f"{generator.choice(_TRADES.split())}. After school came an apprenticeship as a {trade}, and in "
            f"{born + generator.randrange(20, 30)} a workshop in {town}. It stayed in the family for "
            f"{generator.randrange(2, 9)} generations."
        )
        found.append(Passage(text, f"In which town was the workshop of {person}?", (town,)))
    return found


def qa(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    documents: Sequence[Passage] | None = None,
    task: str = "qa",
) -> Example:
    """Ask a question that one of the documents answers; the others fill the prompt, in any order.

    Documents that hold an accepted answer themselves are left out.

    Args:
        tokenizer: counts tokens.
        tokens: most tokens of the prompt.
        seed: of everything drawn.
        documents: given documents, at least one with a question; short made-up lives without them, enough for
            400,000 tokens.
        task: name of the task.

    Raises:
        ValueError: no document with a question, or too few tokens for it.

    """
    generator = random.Random(f"{task} {seed}")
    passages = list(lives(min(7800, 8 + tokens // 50), seed) if documents is None else documents)
    asking = [passage for passage in passages if passage.question]
    if not asking:
        raise ValueError(f"documents holds {len(passages)} passages and no question; accepted: at least one with")
    target = generator.choice(asking)
    others = [
        passage for passage in passages if not any(answer.lower() in passage.text.lower() for answer in target.answers)
    ]
    generator.shuffle(others)
    place = generator.random()

    def build(count: int) -> Example:
        used = others[:count]
        where = round(place * len(used))
        texts = [passage.text.strip() for passage in (*used[:where], target, *used[where:])]
        wrong = dict.fromkeys(passage.answers[0] for passage in used if passage.answers)
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1)),
            question=f"{target.question} Answer with a few words of the documents.",
            opening="The answer is",
            answer=f" {target.answers[0]}.",
            references=target.answers,
            distractors=tuple(wrong),
            every=False,
            new_tokens=16 + len(tokenizer(target.answers[0], verbose=False).input_ids),
        )

    return fill(tokenizer, build, tokens, most=len(others))
