"""A document that was read and compressed once, and answers any number of questions."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from suffice.arguments import check_names, check_optional_int, check_path, check_text
from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.batched import BatchedCaches, rows_can_differ_in_length
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.report import CacheReport
from suffice.kv.cache.serialization import SavedText, read_text, save_cache
from suffice.kv.document.chat import Chat
from suffice.kv.document.streaming import stream_text
from suffice.kv.document.turn import DEFAULT_LENGTH, check_turn, generate_turn
from suffice.kv.eval.generation import fill_cache
from suffice.kv.eval.prompt import PromptTokens, split_prompt, tokenize_question
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.tokenization import check_tokenizer, decode, tokenize
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy
from suffice.kv.storage.quantization import Bits
from suffice.study.run_kind import suggestion


class CacheOptions(TypedDict, total=False):
    """Further arguments of `CompressedCache`."""

    allocation: str | Allocation | None
    bits: Bits | None
    repair: bool
    evict: str | None
    interval: int | None
    rerotate: bool
    sinks: int | None
    window: int | None
    measure_capacity: bool


def compress(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    policy: str | Policy = DEFAULT_POLICY,
    budget: float | None = None,
    *,
    memory: float | str | None = None,
    chunk_size: int | None = None,
    **options: Unpack[CacheOptions],
) -> Document:
    """Read a text once, compress its cache, and return it as a document that answers questions.

    The text becomes the first part of a user's message in the tokenizer's chat template; each question follows it.
    Without a template, the text is read as it is. Without `chunk_size`, the answers are those of
    `suffice.kv.answer(..., aware=False)`. With `chunk_size`, the text is read in chunks, but each question at once.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        text: the text of the document.
        policy: which entries to keep. A policy that needs a replay reads the text a second time, and evicts only once,
            also with `memory` and `chunk_size`.
        budget: number of tokens to keep, or a fraction of the tokens; None means a quarter of the tokens, or as many as
            `memory` allows.
        memory: limit on the bytes, instead of `budget`: a fraction of those of the full cache, or a number such as
            `"2GiB"`. The limit also holds while a question is answered, unless `evict="prefill"` is given or the
            policy needs a replay.
        chunk_size: read the text in chunks of this many tokens and evict after each; None reads it at once. Unless the
            policy needs a replay, `evict` is then `"always"` by default.
        options: further arguments of `CompressedCache`: `allocation`, `bits`, `repair`, `evict`, `interval`,
            `rerotate`, `sinks`, `window` and `measure_capacity`.

    Raises:
        TypeError, ValueError: an argument is not accepted; the text is empty, or does not fit into the context window;
            or the chat template changes the text.

    Example:
        >>> document = compress(model, tokenizer, text, memory=0.1)                        # doctest: +SKIP
        >>> document.ask("What is the parrot called?")                                     # doctest: +SKIP
        'The parrot is called Otto.'

    """
    model = unwrap_model(model)
    check_tokenizer(tokenizer)
    check_text("text", text)
    chunk_size = check_optional_int("chunk_size", chunk_size, 1, unit="token")
    for name in options:
        if name not in CacheOptions.__annotations__:
            accepted = ("policy", "budget", "memory", "chunk_size", *CacheOptions.__annotations__)
            raise TypeError(
                f"arguments of compress must be among {', '.join(accepted)}, got {name!r}{suggestion(name, accepted)}"
            )
    if chunk_size is not None and options.get("evict") is None and not get_policy(policy).needs_replay:
        options["evict"] = "always"
    input_ids = _tokenize_document(tokenizer, text)
    window = context_window(model)
    if window is not None and input_ids.shape[1] >= window and not options.get("rerotate"):
        raise ValueError(
            f"text must have fewer tokens than the context window of the model, {window}, got {input_ids.shape[1]}. "
            f"Shorten it, or read it with chunk_size={window // 4}, budget={window // 4}, rerotate=True"
        )
    cache = CompressedCache(model, policy, budget, memory=memory, **options)
    fill_cache(model, input_ids, cache, chunk_size, tokenizer)
    return Document(model, tokenizer, text, input_ids, cache)


def open_document(
    path: str | Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, policy: Policy | None = None
) -> Document:
    """Read a document that `Document.save` has written.

    Args:
        path: the file to read.
        model: the model that the document was compressed with.
        tokenizer: its tokenizer, with the same chat template.
        policy: the policy of the cache; required if it is not one of the named policies.

    Raises:
        OSError: the file does not exist.
        TypeError: an argument has the wrong type.
        ValueError: the file is not a saved document, or was written in another format, for another model, dtype or
            tokenizer; or `policy` is missing or is not the policy of the cache.

    Example:
        >>> document = open_document("book.safetensors", model, tokenizer)                 # doctest: +SKIP

    """
    path = check_path("path", path)
    model = unwrap_model(model)
    check_tokenizer(tokenizer)
    saved = read_text(path, model)
    if saved.tokenizer != _fingerprint(tokenizer, saved.text):
        raise ValueError(
            f"tokenizer must be the one that the document in {path!r} was compressed with, with the same chat "
            "template, got another one"
        )
    cache = CompressedCache.load(path, model, policy)
    return Document(model, tokenizer, saved.text, saved.input_ids, cache)


class Document:
    """A text whose compressed cache answers questions. Use `compress` or `open_document` to make one.

    Asking does not change a document: each question is read into a copy of the cache, which shares the entries of the
    document. A document therefore takes the bytes of its compressed cache, its text and its token ids.

    Attributes:
        model: the language model.
        tokenizer: its tokenizer.
        text: the text.
        input_ids: the tokens of the prompt up to the end of the text, long [1, tokens].
        cache: the compressed cache of these tokens. Pass `cache.copy()` to `generate`, so that it is not changed.

    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        input_ids: Tensor,
        cache: CompressedCache,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.text, self.input_ids, self.cache = text, input_ids, cache

    def prompt(self, question: str) -> PromptTokens:
        """Return the token ids of the document and of a question about it, for a generation loop of your own.

        Raises:
            TypeError: the question is not a string.
            ValueError: the question is empty.

        """
        return PromptTokens(self.input_ids, tokenize_question(self.tokenizer, self.text, question))

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_LENGTH, **options: Any) -> str:
        """Return the answer to a question.

        Args:
            question: the question.
            max_new_tokens: maximum number of generated tokens.
            options: further arguments of `generate`, such as `do_sample=True`. By default, decoding is greedy.

        Raises:
            TypeError, ValueError: an argument is not accepted, or document, question and answer do not fit into the
                context window.

        """
        return self._ask(self._checked_prompt(question, max_new_tokens, options), max_new_tokens, options)

    def ask_all(self, questions: Sequence[str], *, max_new_tokens: int = DEFAULT_LENGTH, **options: Any) -> list[str]:
        """Return the answers to several questions, which are generated as one batch.

        The answers are those of `ask`. In models with a sliding window or linear attention, only questions with the
        same number of tokens share a batch.

        Args:
            questions: the questions.
            max_new_tokens: maximum number of generated tokens of each answer.
            options: see `ask`.

        Raises:
            TypeError, ValueError: see `ask`.

        """
        names = check_names("questions", questions, "questions", "['Who?', 'When?']")
        for row, name in enumerate(names):
            check_text(f"questions[{row}]", name)
        prompts = [self._checked_prompt(name, max_new_tokens, options) for name in names]
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            length = 0 if self._pads_questions else prompt.question.shape[1]
            groups.setdefault(length, []).append(row)
        answers = [""] * len(prompts)
        for rows in groups.values():
            found = self._ask_batch([prompts[row].question for row in rows], max_new_tokens, options)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def stream(self, question: str, *, max_new_tokens: int = DEFAULT_LENGTH, **options: Any) -> Iterator[str]:
        """Return an iterator over the answer to a question, in pieces as its tokens are generated.

        Joined, the pieces are the answer of `ask`. Closing the iterator stops the generation.

        Args:
            question: the question.
            max_new_tokens: maximum number of generated tokens.
            options: see `ask`.

        Raises:
            TypeError, ValueError: see `ask`. Arguments are checked before the iterator is returned.

        Example:
            >>> for piece in document.stream("What is the parrot called?"):               # doctest: +SKIP
            ...     print(piece, end="", flush=True)

        """
        prompt = self._checked_prompt(question, max_new_tokens, options)
        return stream_text(lambda own: self._ask(prompt, max_new_tokens, own), self.tokenizer, options)

    def chat(self) -> Chat:
        """Return a new conversation about the document, which remembers its turns. The document is not changed."""
        return Chat(self.model, self.tokenizer, self.text, self.input_ids, self.cache.copy())

    def save(self, path: str | Path) -> Path:
        """Write the compressed document to a safetensors file, which `open_document` reads.

        The file also holds the text. `CompressedCache.load` reads the cache alone.

        Args:
            path: the file to write; see `CompressedCache.save`.

        Returns:
            The path of the file.

        Raises:
            OSError: the file cannot be written.

        """
        saved = SavedText(self.text, self.input_ids, _fingerprint(self.tokenizer, self.text))
        cache = self.cache.copy()
        return save_cache(cache.layers, cache.settings, self.model, check_path("path", path), saved)

    def report(self) -> CacheReport:
        """Return a report of what the cache of the document holds."""
        return self.cache.report()

    def __repr__(self) -> str:
        return f"Document({self.input_ids.shape[1]} tokens, policy={self.cache.policy.name!r}, {self.report()})"

    @property
    def _pads_questions(self) -> bool:
        """Whether questions of different lengths can share a batch."""
        has_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        return has_positions and rows_can_differ_in_length(self.cache)

    def _checked_prompt(self, question: str, max_new_tokens: int, options: Mapping[str, Any]) -> PromptTokens:
        prompt = self.prompt(question)
        num_tokens = self.input_ids.shape[1] + prompt.question.shape[1]
        check_turn(self.model, self.cache.settings, num_tokens, max_new_tokens, options)
        return prompt

    def _ask(self, prompt: PromptTokens, max_new_tokens: int, options: Mapping[str, Any]) -> str:
        cache = self.cache.copy()
        (tokens,) = generate_turn(self.model, self.tokenizer, prompt.input_ids, cache, max_new_tokens, options)
        return decode(self.tokenizer, tokens)

    def _ask_batch(self, questions: Sequence[Tensor], max_new_tokens: int, options: Mapping[str, Any]) -> list[str]:
        """Answer questions, [1, tokens] each, as one batch. They are padded between the document and the question."""
        width = max(ids.shape[1] for ids in questions)
        ids = torch.cat([pad(ids, (width - ids.shape[1], 0)) for ids in questions])
        mask = torch.cat([pad(torch.ones_like(ids), (width - ids.shape[1], 0)) for ids in questions])
        rows = generate_turn(
            self.model,
            self.tokenizer,
            torch.cat([self.input_ids.expand(len(ids), -1), ids], dim=1),
            BatchedCaches([self.cache.copy() for _ in questions]),
            max_new_tokens,
            options,
            attention_mask=pad(mask, (self.input_ids.shape[1], 0), value=1),
        )
        return [decode(self.tokenizer, tokens) for tokens in rows]


def _tokenize_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the tokens of a prompt until its document ends, as `tokenize_prompt` makes them with any question."""
    before, _ = split_prompt(tokenizer, text, "?")
    return tokenize(tokenizer, before, add_special_tokens=not getattr(tokenizer, "chat_template", None))


def _fingerprint(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a fingerprint of a tokenizer's template, and of what it makes of a text."""
    ids = tokenize(tokenizer, text)[0].tolist()
    content = json.dumps([ids, getattr(tokenizer, "chat_template", None)], default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
