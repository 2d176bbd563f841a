"""Tokenize a document and a question as one prompt that is split where the document ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suffice.arguments import check_optional_text, check_text, shown
from suffice.kv.hf.tokenization import tokenize, tokenize_continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTokens:
    """The token ids of a prompt in two parts.

    Args:
        document: ids of the part before the question, [1, tokens]; agnostic eviction compresses only this part.
        question: ids of the rest, including the start of the assistant's turn; empty without a question.

    """

    document: Tensor
    question: Tensor

    @property
    def input_ids(self) -> Tensor:
        """Ids of the whole prompt, [1, tokens]."""
        return torch.cat((self.document, self.question), dim=1)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, document: str, question: str | None = None, *, answer_prefix: str = ""
) -> PromptTokens:
    """Tokenize a document and a question as one user message, split where the document ends.

    The message is formatted with the tokenizer's chat template. Without a template, the question follows the document
    after `Question:`, and the prompt ends with `Answer:`.

    Args:
        tokenizer: the model's tokenizer.
        document: the text that comes first.
        question: the question about it; without one, the document is the whole message.
        answer_prefix: the first words of the model's answer, added to the end of the prompt.

    Raises:
        TypeError: a text is not a string.
        ValueError: the document or the question is empty, or the chat template changes the document.

    """
    check_text("document", document)
    check_optional_text("question", question)
    if not isinstance(answer_prefix, str):
        raise TypeError(f"answer_prefix must be a string, got {shown(answer_prefix)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if has_template:
        content = document if question is None else f"{document}\n\n{question}"
        message = [{"role": "user", "content": content}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        # A template may strip the message. Its own text before the message may contain the same words, so search from
        # the end.
        start = text.rfind(content.strip())
        if start < 0:
            raise ValueError(
                "chat_template of the tokenizer must contain the message unchanged, got one that changes it"
            )
        end = start + len(document.strip())
    else:
        text = document if question is None else f"{document}\n\nQuestion: {question}\nAnswer:"
        end = len(document)
    if question is None:
        end = len(text)
    prefix = answer_prefix if has_template or not answer_prefix else f" {answer_prefix}"
    # A template already contains the special tokens.
    return PromptTokens(
        tokenize(tokenizer, text[:end], add_special_tokens=not has_template),
        torch.cat([tokenize_continuation(tokenizer, part) for part in (text[end:], prefix)], dim=1),
    )
