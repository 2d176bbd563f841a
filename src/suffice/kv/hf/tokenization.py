"""Tokenize a text that begins a prompt, or one that continues it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffice.arguments import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are put before a text to tokenize it as a continuation.
_LEADS = "\n.0x"


def check_tokenizer(tokenizer: object) -> None:
    """Check the argument `tokenizer` of a function that cannot do without one.

    Raises:
        TypeError: it is not a tokenizer.

    """
    # Not `isinstance`: other libraries have tokenizers that behave like those of transformers.
    if not (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))) or isinstance(tokenizer, type):
        raise TypeError(f"tokenizer must be the model's tokenizer, as load_model returns it, got {shown(tokenizer)}")


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> Tensor:
    """Return the token ids of a text, long [1, tokens]; none for an empty text."""
    if not text:
        return torch.empty(1, 0, dtype=torch.long)
    encoded: Any = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens, verbose=False)
    return encoded.input_ids


def tokenize_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of a text that follows other text, long [1, tokens].

    Some tokenizers, such as those of SentencePiece, put a space before every text that they encode. In the middle of a
    prompt, this space would be a token that is not in the text.
    """
    ids = tokenize(tokenizer, text)
    if not text or not _adds_space(tokenizer):
        return ids
    for lead in _LEADS:
        before = tokenize(tokenizer, lead)
        both = tokenize(tokenizer, lead + text)
        # If this is False, the lead and the first characters of the text form one token.
        if torch.equal(both[:, : before.shape[1]], before):
            return both[:, before.shape[1] :]
    return ids


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a letter has other tokens at the start of a text than at the start of a line."""
    letter, line = tokenize(tokenizer, "x"), tokenize(tokenizer, "\nx")
    return not torch.equal(line[:, -letter.shape[1] :], letter)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor | list[int]) -> str:
    """Return the text of generated tokens, without special tokens and without white space around it."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
