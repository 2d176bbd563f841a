"""Questions that are answered by one of many documents (RULER, 2404.06654)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suffice.arguments import check_int, check_names, check_optional_text, check_text
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import fit_to_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_NAMES = (
    "Ada Bruno Clara David Elena Felix Greta Hugo Irma Jonas Karin Leo Mona Nils Olga Paul Rita Simon Tilda Viktor"
)
_LAST_NAMES = (
    "Abel Brandt Carlsen Duval Eklund Ferrari Gruber Hansen Ivanov Jensen Keller Lindt Moreau Novak Olsen Petit"
)
_TOWNS = (
    "Aarhus Antwerp Bergen Bilbao Bologna Bruges Cork Dresden Ghent Gothenburg Graz Krakow Leipzig Linz Lyon Malmo "
    "Nantes Odense Porto Riga Rouen Seville Tallinn Tartu Trieste Turin Turku Utrecht Vilnius Zagreb"
)
_TRADES = (
    "baker carpenter chemist clockmaker dentist engraver glazier joiner lawyer painter potter printer tailor weaver"
)
_MAX_BIOGRAPHIES = 7800  # in one prompt, of about 400,000 tokens


@dataclass(frozen=True)
class Passage:
    """A document that may answer a question.

    Args:
        text: the document.
        question: the question that it answers; None for a distractor.
        answers: the accepted answers, each a part of the text; the first one is the gold answer.

    Raises:
        ValueError: the text is empty, a question has no answer, or an answer is not in the text.

    """

    text: str
    question: str | None = None
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text("text", self.text)
        check_optional_text("question", self.question)
        check_names("answers", self.answers, "texts", "('Otto',)")
        if self.question is not None and not self.answers:
            raise ValueError(f"answers to the question {self.question!r} must hold at least one answer, got none")
        for answer in self.answers:
            if not answer or answer.lower() not in self.text.lower():
                raise ValueError(f"answers must be parts of the passage {self.text[:60]!r}…, got {answer!r}")


def made_up_biographies(count: int, seed: int = 0) -> list[Passage]:
    """Return short invented biographies of different people, each with a question about a town.

    Args:
        count: number of biographies, at most 8,320.
        seed: seed of all random choices.

    Raises:
        ValueError: the count is out of range.

    """
    people = [
        f"{first} {initial}. {last}"
        for first in _FIRST_NAMES.split()
        for initial in string.ascii_uppercase
        for last in _LAST_NAMES.split()
    ]
    count = check_int("count", count, 1, len(people))
    generator = random.Random(f"lives {seed}")
    passages: list[Passage] = []
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
        passages.append(Passage(text, f"In which town was the workshop of {person}?", (town,)))
    return passages


def qa(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int = 0,
    passages: Sequence[Passage] | None = None,
    task: str = "qa",
) -> Example:
    """Ask a question that exactly one of the documents in the prompt answers.

    Other documents that contain an accepted answer are left out.

    Args:
        tokenizer: counts tokens.
        tokens: maximum number of tokens in the prompt.
        seed: seed of all random choices.
        passages: your own documents, at least one with a question; by default invented biographies, enough for
            400,000 tokens.
        task: name of the task.

    Raises:
        ValueError: no document has a question, or the prompt does not fit into `tokens`.

    """
    generator = random.Random(f"{task} {seed}")
    if passages is None:
        passages = made_up_biographies(min(_MAX_BIOGRAPHIES, 8 + tokens // 50), seed)
    with_question = [passage for passage in passages if passage.question]
    if not with_question:
        raise ValueError(f"passages must have at least one question, got {len(passages)} passages without one")
    target = generator.choice(with_question)
    others = [
        passage for passage in passages if not any(answer.lower() in passage.text.lower() for answer in target.answers)
    ]
    generator.shuffle(others)
    target_depth = generator.random()

    def build(count: int) -> Example:
        used = others[:count]
        index = round(target_depth * len(used))
        texts = [passage.text.strip() for passage in (*used[:index], target, *used[index:])]
        wrong = dict.fromkeys(passage.answers[0] for passage in used if passage.answers)
        return Example(
            task=task,
            seed=seed,
            document="\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1)),
            question=f"{target.question} Answer with a few words of the documents.",
            answer_prefix="The answer is",
            answer=f" {target.answers[0]}.",
            references=target.answers,
            distractors=tuple(wrong),
            match_all=False,
            max_new_tokens=16 + len(tokenizer(target.answers[0], verbose=False).input_ids),
        )

    return fit_to_length(tokenizer, build, tokens, max_filler=len(others))
