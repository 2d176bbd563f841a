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
    if not isinstance(answer_prefix, str):
        raise TypeError(f"answer_prefix must be a string, got {shown(answer_prefix)}")
    before, after = split_prompt(tokenizer, document, question)
    has_template = _has_template(tokenizer)
    prefix = answer_prefix if has_template or not answer_prefix else f" {answer_prefix}"
    # A template already contains the special tokens.
    return PromptTokens(
        tokenize(tokenizer, before, add_special_tokens=not has_template),
        torch.cat([tokenize_continuation(tokenizer, part) for part in (after, prefix)], dim=1),
    )


def split_prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str | None) -> tuple[str, str]:
    """Return the text of a prompt until the document ends, and the rest; see `tokenize_prompt`.

    Raises:
        TypeError: a text is not a string.
        ValueError: the document or the question is empty, or the chat template changes the document.

    """
    check_text("document", document)
    check_optional_text("question", question)
    has_template = _has_template(tokenizer)
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
    return text[:end], text[end:]


def tokenize_question(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> Tensor:
    """Return the token ids of a prompt after its document, long [1, tokens]; see `tokenize_prompt`.

    Raises:
        TypeError: a text is not a string.
        ValueError: a text is empty, or the chat template changes the document.

    """
    _, rest = split_prompt(tokenizer, document, check_text("question", question))
    return tokenize_continuation(tokenizer, rest)


_ANSWER = "Stand-in for the answer."


def tokenize_turn(tokenizer: PreTrainedTokenizerBase, message: str) -> Tensor:
    """Return the token ids between the model's last answer and its next one, long [1, tokens].

    They contain the end of the answer, the user's next message, and the start of the assistant's turn. They are read
    from a short conversation in the tokenizer's chat template, so that they do not depend on the document or on the
    answer. Without a template, the message is a further question, see `tokenize_prompt`.

    Args:
        tokenizer: the model's tokenizer.
        message: the user's message.

    Raises:
        TypeError: the message is not a string.
        ValueError: the message is empty, or the chat template changes it.

    """
    check_text("message", message)
    if not _has_template(tokenizer):
        return tokenize_continuation(tokenizer, f"\n\nQuestion: {message}\nAnswer:")
    roles = (("user", "Hello."), ("assistant", _ANSWER), ("user", message))
    messages = [{"role": role, "content": content} for role, content in roles]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    start = text.rfind(_ANSWER, 0, max(0, text.rfind(message.strip())))
    if start < 0:
        raise ValueError(
            "chat_template of the tokenizer must contain the messages unchanged, got one that changes them"
        )
    return tokenize_continuation(tokenizer, text[start + len(_ANSWER) :])


def _has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))
