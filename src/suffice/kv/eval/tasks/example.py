"""One example of a task: a document, a question for it, and what a right answer holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from suffice.kv.eval.answer import Prompt


@dataclass(frozen=True)
class Example:
    """A document, a question and the gold answer; without a question, a text and how it goes on.

    Args:
        task: name of the task.
        seed: that it was made with.
        document: what is read first; names neither the task nor what will be asked.
        question: asked of it; None if the text itself is continued.
        opening: how the answer starts; given to the model, because a small one would not find the form by itself.
        answer: how it goes on when it is right; what likelihood and divergence are measured on.
        references: what a right answer holds; each is in the document.
        distractors: what the document offers beside it; none is a reference or contains one.
        every: score the share of references that are in the answer; False: 1 if any is.
        new_tokens: longest answer that is scored.

    """

    task: str
    seed: int
    document: str
    question: str | None
    opening: str
    answer: str
    references: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    every: bool = True
    new_tokens: int = 32

    @property
    def modes(self) -> tuple[str, ...]:
        """Ways to evict: before the question is seen and after it; for a text there is one."""
        return ("continuation",) if self.question is None else ("agnostic", "aware")

    @property
    def chance(self) -> float | None:
        """Score to be expected of one who picks at random as many candidates of the document as are right."""
        if not self.references:
            return None
        right = len(self.references) if self.every else 1
        return right / (right + len(self.distractors))

    def score(self, said: str) -> float | None:
        """Return the score of an answer, 0 to 1, as RULER does (2404.06654): by the references that are in it.

        None for a text, which has no right answer.
        """
        if not self.references:
            return None
        found = [reference.lower() in said.lower() for reference in self.references]
        return sum(found) / len(found) if self.every else float(any(found))

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Return document and question as token ids, in the tokenizer's chat template if it has one.

        The opening of the answer is the end of the question. A text is read as it is, without a template.
        """
        from suffice.kv.eval.answer import Prompt, prompt

        if self.question is None:
            return Prompt(_ids(tokenizer, self.document, True), torch.empty(1, 0, dtype=torch.long))
        parts = prompt(tokenizer, self.document, self.question)
        space = "" if getattr(tokenizer, "chat_template", None) else " "
        opening = _ids(tokenizer, space + self.opening, False)
        return Prompt(parts.document, torch.cat((parts.question, opening), dim=1))

    def gold(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the tokens of the right answer, [1, tokens]."""
        return _ids(tokenizer, self.answer, False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        return asdict(self)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Tensor:
    if not text:
        return torch.empty(1, 0, dtype=torch.long)
    encoded: Any = tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False)
    return encoded.input_ids
