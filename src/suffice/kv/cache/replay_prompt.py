"""The tokens that a model reads in a replay: the instruction to repeat the prompt, and a part of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.tokenization import tokenize_continuation

# The instructions of KVzip (2505.23416).
_REPEAT_ALL = "\n\nRepeat the previous context exactly."
_REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with"
_NUM_WORDS_BEFORE = 8  # number of tokens before a part that its instruction quotes
_MIN_PART_SIZE = 64


@dataclass(frozen=True)
class ReplayInput:
    """The tokens of one pass of a replay.

    Args:
        ids: the instruction and the part, long [batch, tokens].
        start: index of the first token of the part in the prompt.
        end: index after its last token.

    """

    ids: Tensor
    start: int
    end: int

    @property
    def num_instruction(self) -> int:
        """Number of tokens of the instruction."""
        return self.ids.shape[1] - (self.end - self.start)


def _no_tokens() -> Tensor:
    return torch.empty(1, 0, dtype=torch.long)


@dataclass(frozen=True)
class Instruction:
    """The instruction to repeat a prompt; without tokens if there is no tokenizer.

    Args:
        first: tokens before the first part, long [1, any].
        later: tokens before the words that a later part follows.
        answer: tokens after the instruction, with which the model's answer begins.

    """

    first: Tensor = field(default_factory=_no_tokens)
    later: Tensor = field(default_factory=_no_tokens)
    answer: Tensor = field(default_factory=_no_tokens)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase | None) -> Instruction:
        """Return the instruction of a model."""
        if tokenizer is None:
            return cls()
        parts = (_REPEAT_ALL, _REPEAT_PART, _text_before_answer(tokenizer))
        return cls(*(tokenize_continuation(tokenizer, part) for part in parts))

    def before(self, ids: Tensor, start: int) -> Tensor:
        """Return the instruction to repeat a prompt from one of its tokens, [batch, any].

        Args:
            ids: tokens of the prompt, [batch, tokens].
            start: index of the first token to repeat.

        """
        first, later, answer = (x.to(ids.device).expand(len(ids), -1) for x in (self.first, self.later, self.answer))
        if start == 0:
            return torch.cat((first, answer), dim=1)
        words = ids[:, max(0, start - _NUM_WORDS_BEFORE) : start] if later.shape[1] else later
        return torch.cat((later, words, answer), dim=1)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of the instruction."""
        num_words = _NUM_WORDS_BEFORE if self.later.shape[1] else 0
        return max(self.first.shape[1], self.later.shape[1] + num_words) + self.answer.shape[1]


def replay_inputs(model: PreTrainedModel, ids: Tensor, instruction: Instruction, part_size: int) -> list[ReplayInput]:
    """Divide a prompt into parts and return the input of the pass that repeats each part.

    The parts are shorter than `part_size` where the context window of the model leaves less room.

    Args:
        model: the model.
        ids: tokens of the prompt, [batch, tokens].
        instruction: the instruction to repeat it.
        part_size: number of tokens of a part.

    Raises:
        ValueError: the prompt leaves too little room in the context window.

    """
    num_tokens, window = ids.shape[1], context_window(model)
    if window is not None:
        room = window - num_tokens - instruction.max_tokens
        smallest = min(num_tokens, _MIN_PART_SIZE)
        if room < smallest:
            raise ValueError(
                f"inputs must have at most {window - instruction.max_tokens - smallest} tokens for a policy with a "
                f"replay, because the model repeats them within its context window of {window} tokens, got "
                f"{num_tokens}. Shorten the prompt, or use a policy without a replay"
            )
        part_size = min(part_size, room)
    return list(_parts(ids, instruction, part_size))


def _parts(ids: Tensor, instruction: Instruction, part_size: int) -> Iterator[ReplayInput]:
    for start in range(0, ids.shape[1], part_size):
        part = ids[:, start : start + part_size]
        yield ReplayInput(torch.cat((instruction.before(ids, start), part), dim=1), start, start + part.shape[1])


def _text_before_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what follows a message of the user in a chat, up to the model's answer."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    message = "Repeat."
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    )
    return text[text.rfind(message) + len(message) :]
