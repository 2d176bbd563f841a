"""One example of a task: a document, a question about it, and the right answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffice.kv.eval.prompt import PromptTokens, tokenize_prompt
from suffice.kv.hf.tokenization import tokenize, tokenize_continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A document, a question and the right answer; or, without a question, a text and its continuation.

    Args:
        task: name of the task.
        seed: the seed that the example was made with.
        document: the text that is read first. It does not reveal the task or the question.
        question: the question about it; None if the task is to continue the text.
        answer_prefix: the first words of the answer, given to the model because small models do not produce
            the expected form without them.
        answer: the rest of the right answer. Likelihood and divergence are measured on its tokens.
        references: the strings that a right answer contains; each occurs in the document.
        distractors: wrong candidates in the document; none of them contains a reference.
        match_all: True scores the share of references in an answer; False scores 1 if it contains any of them.
        max_new_tokens: maximum length of an answer that is scored.

    """

    task: str
    seed: int
    document: str
    question: str | None
    answer_prefix: str
    answer: str
    references: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    match_all: bool = True
    max_new_tokens: int = 32

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of eviction: before (agnostic) or after (aware) the question is seen; one mode for a text."""
        return ("continuation",) if self.question is None else ("agnostic", "aware")

    @property
    def chance(self) -> float | None:
        """The expected score if candidates in the document are chosen at random; None for a text."""
        if not self.references:
            return None
        num_right = len(self.references) if self.match_all else 1
        return num_right / (num_right + len(self.distractors))

    def score(self, answer: str) -> float | None:
        """Return the score of an answer, 0 to 1, by the references it contains, as RULER does (2404.06654).

        Returns:
            The score; None for a text, which has no right answer.

        """
        if not self.references:
            return None
        found = [reference.lower() in answer.lower() for reference in self.references]
        return sum(found) / len(found) if self.match_all else float(any(found))

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> PromptTokens:
        """Return the token ids of the document and of the question with the answer prefix.

        A question is asked in the tokenizer's chat template, if there is one. A text is read without a template.
        """
        if self.question is None:
            document = tokenize(tokenizer, self.document, add_special_tokens=True)
            return PromptTokens(document, torch.empty(1, 0, dtype=torch.long))
        return tokenize_prompt(tokenizer, self.document, self.question, answer_prefix=self.answer_prefix)

    def answer_ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the token ids of the right answer, [1, tokens]."""
        return tokenize_continuation(tokenizer, self.answer)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values for JSON."""
        return asdict(self)
