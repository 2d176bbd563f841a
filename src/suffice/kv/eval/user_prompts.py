"""A user's own prompts: read, check and store them, and let the full cache answer them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from suffice.arguments import check_choice, check_list, check_optional_text, check_path, check_text, shown
from suffice.files import read_text
from suffice.kv.eval.prompt import PromptTokens, tokenize_prompt
from suffice.kv.eval.tasks.example import Example
from suffice.study.run_kind import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_KEYS = ("prompt", "document", "question")
_EXPECTED = 'a JSON string, or an object with "prompt" and optionally "question"'


@dataclass(frozen=True)
class UserPrompt:
    """A prompt of a user.

    Args:
        document: the prompt, or a document.
        question: the question about the document, if there is one.

    Raises:
        TypeError: the document or the question is not a string.
        ValueError: the document or the question is empty.

    """

    document: str
    question: str | None = None

    def __post_init__(self) -> None:
        check_text("document", self.document)
        check_optional_text("question", self.question)


@dataclass(frozen=True)
class UserExample(Example):
    """A user's prompt with the answer of the full cache as the right answer.

    Unlike the task `text`, it uses the chat template even without a question.
    """

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of eviction; without a question, only `aware`."""
        return ("aware",) if self.question is None else ("agnostic", "aware")

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> PromptTokens:
        """Return the token ids of the document and of the question."""
        return tokenize_prompt(tokenizer, self.document, self.question)


def read_user_prompts(path: str | Path) -> list[UserPrompt]:
    """Read prompts from a file.

    In a JSON file (`.jsonl`, `.ndjson` or `.json`), the prompts are the items of an array, or one on each line. A
    prompt is a JSON string, or an object with `prompt` (or `document`) and optionally `question`. In any other file,
    the prompts are texts that are separated by lines of three or more dashes.

    Raises:
        TypeError: `path` is not a path.
        ValueError: the file cannot be read, an item is not a prompt, or the file contains no prompt.

    """
    path = Path(check_path("prompts", path))
    text = read_text(path, "prompts")
    if path.suffix.lower() in _JSON_SUFFIXES:
        prompts = [_parse_prompt(item, place) for place, item in _json_items(text, path)]
    else:
        parts = re.split(r"^-{3,}\s*$", text, flags=re.MULTILINE)
        prompts = [UserPrompt(part.strip()) for part in parts if part.strip()]
    if not prompts:
        raise ValueError(f"prompts must be a file with at least one prompt, got {str(path)!r}, which holds none")
    return prompts


def write_user_prompts(prompts: Sequence[UserPrompt], path: Path) -> None:
    """Write prompts as JSON lines that `read_user_prompts` reads."""
    lines = [
        json.dumps({"prompt": prompt.document, "question": prompt.question}, ensure_ascii=False) for prompt in prompts
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def check_user_prompts(given: object, mode: object) -> list[UserPrompt]:
    """Return the argument `prompts` of `tune`, with texts as prompts without a question.

    Raises:
        TypeError: it is not a list, an item is neither a text nor a prompt, or `mode` is not a string.
        ValueError: there are fewer than two prompts, one is empty, or one does not have the mode.

    """
    prompts: list[UserPrompt] = []
    for index, prompt in enumerate(
        check_list("prompts", given, "texts or UserPrompts", "['first text', 'second text']")
    ):
        if not isinstance(prompt, (str, UserPrompt)):
            raise TypeError(f"prompts must hold texts or UserPrompts, got {shown(prompt)} as prompt {index}")
        try:
            prompts.append(UserPrompt(prompt) if isinstance(prompt, str) else prompt)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    if len(prompts) < 2:
        raise ValueError(f"prompts must hold at least 2, because the bound needs their variance, got {len(prompts)}")
    check_choice("mode", mode, ("aware", "agnostic"))
    without = [index for index, prompt in enumerate(prompts) if prompt.question is None]
    if mode == "agnostic" and without:
        raise ValueError(
            f"mode must be 'aware' if a prompt has no question, got {mode!r} (prompt {without[0]} has no question)"
        )
    return prompts


def longest_prompt(prompts: Sequence[UserPrompt], mode: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest number of tokens of a prompt, or of the part of it that is compressed."""
    tokens = [tokenize_prompt(tokenizer, prompt.document, prompt.question) for prompt in prompts]
    return max((part.document if mode == "agnostic" else part.input_ids).shape[1] for part in tokens)


def store_user_prompts(prompts: Sequence[UserPrompt], folder: Path) -> str:
    """Write the prompts to the study's folder, and return the file's name, which contains their digest."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    name = f"prompts-{digest}.jsonl"
    if not (folder / name).exists():
        write_user_prompts(prompts, folder / name)
    return name


def answer_with_full_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: UserPrompt, max_new_tokens: int, index: int
) -> UserExample:
    """Answer a prompt greedily from the full cache. Other caches are then measured on this answer.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompt: the user's prompt.
        max_new_tokens: maximum number of generated tokens.
        index: index of the prompt among the user's prompts.

    Raises:
        ValueError: prompt and answer do not fit into the model's context window, or the answer is empty.

    """
    # Imported here: reading prompts does not need transformers, which takes seconds to import.
    from suffice.kv.eval.answer import answer

    full, _ = answer(
        model,
        tokenizer,
        prompt.document,
        prompt.question,
        policy="full",
        budget=1.0,
        max_new_tokens=max_new_tokens,
    )
    if not full.answer:
        raise ValueError("the model's answer must contain text to compare with, got an empty answer")
    return UserExample(
        task="prompt",
        seed=index,
        document=prompt.document,
        question=prompt.question,
        answer_prefix="",
        answer=full.answer,
        references=(),
        max_new_tokens=max_new_tokens,
    )


def _json_items(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array, or the values of all lines, each with its place for errors."""
    if text.lstrip().startswith("["):
        items: Any = _parse_json(text, f"prompts {str(path)!r}", "a JSON array of prompts")
        yield from ((f"item {number} of prompts {str(path)!r}", item) for number, item in enumerate(items, 1))
        return
    # `splitlines` would also split at characters such as U+2028, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number} of prompts {str(path)!r}"
            yield place, _parse_json(line, place, _EXPECTED)


def _parse_json(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ValueError(f"{place} must be {expected}, got {text[:60]!r} ({error})") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"key {repeated[0]!r} is repeated")
    return dict(pairs)


def _parse_prompt(item: Any, place: str) -> UserPrompt:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise ValueError(f"{place} must be {_EXPECTED}, got {_shortened(item)}")
    content = cast(dict[str, Any], item)
    check_names(content, _KEYS, f"keys in {place}")
    if "prompt" in content and "document" in content:
        raise ValueError(f'{place} must have one of "prompt" and "document", got both')
    document, question = content.get("prompt", content.get("document")), content.get("question")
    if not isinstance(document, str) or not document.strip():
        raise ValueError(f"{place} must be {_EXPECTED}, got {_shortened(item)}")
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise ValueError(f'"question" in {place} must contain text, or be null or left out, got {_shortened(question)}')
    return UserPrompt(document, question)


def _shortened(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
