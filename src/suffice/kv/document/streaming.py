"""The text of an answer while it is generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from suffice.kv.hf.tokenization import decode


def stream_text(
    answer: Callable[[Mapping[str, Any]], object], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the text of an answer in pieces, as its tokens are generated. Joined, the pieces are the answer.

    The model runs in a thread of its own while the pieces are read. If the iterator is closed early, generation stops
    after the current token.

    Args:
        answer: generates the answer with options of `generate`. It is called when the first piece is asked for.
        tokenizer: the model's tokenizer.
        options: options of `generate`. A streamer and a stopping criterion are added.

    Raises:
        Exception: any exception that `answer` raises.

    """
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    is_closed = threading.Event()
    criteria = [*options.get("stopping_criteria", ()), _StopIfSet(is_closed)]
    streamer = _PieceStreamer(tokenizer, pieces.put)
    own = {**options, "stopping_criteria": criteria, "streamer": streamer}

    def run() -> None:
        try:
            answer(own)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=run, name="suffice stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        is_closed.set()
        thread.join()


class _PieceStreamer(BaseStreamer):
    """Passes on the text that new tokens add. White space is held back until text follows it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._ids: list[int] | None = None  # None until the prompt was put
        self._emitted = ""

    def put(self, value: Tensor) -> None:
        if self._ids is None:
            self._ids = []  # the first call passes the prompt
            return
        self._ids.extend(value.flatten().tolist())
        self._pass_on(is_last=False)

    def end(self) -> None:
        self._pass_on(is_last=True)

    def _pass_on(self, *, is_last: bool) -> None:
        text = decode(self._tokenizer, self._ids or [])
        is_complete = is_last or not text.endswith("\ufffd")  # the last character may have further bytes
        if is_complete and len(text) > len(self._emitted) and text.startswith(self._emitted):
            self._emit(text[len(self._emitted) :])
            self._emitted = text


class _StopIfSet(StoppingCriteria):
    """Stops the generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        return input_ids.new_full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool)
