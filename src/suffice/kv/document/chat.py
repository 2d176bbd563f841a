"""A conversation about a document, whose turns follow each other in one cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import check_text
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.report import CacheReport
from suffice.kv.document.streaming import stream_text
from suffice.kv.document.turn import DEFAULT_LENGTH, check_turn, generate_turn
from suffice.kv.eval.generation import end_ids
from suffice.kv.eval.prompt import tokenize_question, tokenize_turn
from suffice.kv.hf.tokenization import decode


class Chat:
    """A conversation about a document. Use `Document.chat` to make one.

    Each turn is added to the chat's own cache, so the model remembers earlier questions and answers. With `memory` or
    `evict="always"`, the cache also evicts entries of earlier turns. The document is not changed, and a turn that fails
    does not change the chat.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        text: the text of the document.
        input_ids: the tokens of the document, long [1, tokens].
        cache: the cache of these tokens, to which the turns are added.

    Attributes:
        messages: the questions and answers so far, as dicts with `role` and `content`. The document is not among them.
        input_ids: all tokens of the conversation so far, long [1, tokens].
        cache: the cache of the conversation.

    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        input_ids: Tensor,
        cache: CompressedCache,
    ) -> None:
        self._model, self._tokenizer, self._text = model, tokenizer, text
        self._lock = threading.Lock()
        self.messages: list[dict[str, str]] = []
        self.input_ids, self.cache = input_ids, cache

    def ask(self, message: str, *, max_new_tokens: int = DEFAULT_LENGTH, **options: Any) -> str:
        """Return the answer to a message, which becomes part of the conversation.

        Args:
            message: the message.
            max_new_tokens: maximum number of generated tokens.
            options: see `Document.ask`.

        Raises:
            TypeError, ValueError: see `Document.ask`.

        """
        self._check(self._prompt(message), max_new_tokens, options)
        return self._answer(message, max_new_tokens, options)

    def stream(self, message: str, *, max_new_tokens: int = DEFAULT_LENGTH, **options: Any) -> Iterator[str]:
        """Return an iterator over the answer to a message, in pieces; see `Document.stream`.

        Message and answer become part of the conversation when the iterator ends. If it is closed early, the message
        and the part of the answer that was generated until then become part of it.

        Args:
            message: the message.
            max_new_tokens: maximum number of generated tokens.
            options: see `Document.ask`.

        Raises:
            TypeError, ValueError: see `Document.ask`.

        """
        self._check(self._prompt(message), max_new_tokens, options)
        return stream_text(lambda own: self._answer(message, max_new_tokens, own), self._tokenizer, options)

    def report(self) -> CacheReport:
        """Return a report of what the cache of the conversation holds."""
        return self.cache.report()

    def __repr__(self) -> str:
        return f"Chat({len(self.messages) // 2} turns, {self.report()})"

    def _prompt(self, message: str) -> Tensor:
        """Return all tokens until the start of the answer to a message, long [1, tokens]."""
        check_text("message", message)
        if self.messages:
            new = tokenize_turn(self._tokenizer, message)
        else:
            new = tokenize_question(self._tokenizer, self._text, message)
        return torch.cat([self.input_ids, new], dim=1)

    def _check(self, input_ids: Tensor, max_new_tokens: int, options: Mapping[str, Any]) -> None:
        check_turn(self._model, self.cache.settings, input_ids.shape[1], max_new_tokens, options)

    def _answer(self, message: str, max_new_tokens: int, options: Mapping[str, Any]) -> str:
        model, tokenizer = self._model, self._tokenizer
        with self._lock:  # a stream runs in a thread of its own, and may still do so when the next message comes
            input_ids, cache = self._prompt(message), self.cache.copy()
            (tokens,) = generate_turn(model, tokenizer, input_ids, cache, max_new_tokens, options)
            answer = decode(tokenizer, tokens)
            # The cache has not seen the last token. If it ends the answer, the next turn contains it, as the template
            # writes it.
            kept = tokens[:-1] if int(tokens[-1]) in end_ids(model, options) else tokens
            self.cache, self.input_ids = cache, torch.cat([input_ids, kept[None].to(input_ids.device)], dim=1)
            self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
            return answer
