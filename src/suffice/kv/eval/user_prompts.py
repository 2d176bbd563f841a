"""A user's own prompts: read them from a file, and let the full cache answer them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffice.kv.eval.prompt import PromptTokens, tokenize_prompt
from suffice.kv.eval.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class UserPrompt:
    """A prompt of a user.

    Args:
        document: the prompt, or a document.
        question: the question about the document, if there is one.

    """

    document: str
    question: str | None = None


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

    In a `.jsonl` file, each line is a JSON string, or an object with `prompt` (or `document`) and optionally
    `question`. In any other file, the prompts are separated by lines of three or more dashes.

    Raises:
        ValueError: the file cannot be read, a line is not a prompt, or the file contains no prompt.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts must be a text file, got {str(path)!r}, which cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        prompts = [_parse_line(line, number, path) for number, line in lines]
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
        raise ValueError(f"prompt {index}: the model's answer is empty, so there is nothing to compare with")
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


def _parse_line(line: str, number: int, path: Path) -> UserPrompt:
    expected = (
        f'line {number} of prompts {str(path)!r} must be a JSON string, or an object with "prompt" and optionally '
        '"question"'
    )
    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{expected}, got {line[:60]!r} ({error})") from None
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got {line[:60]!r}")
    document, question = content.get("prompt", content.get("document")), content.get("question")
    if not isinstance(document, str) or not document.strip() or not isinstance(question, str | None):
        raise ValueError(f"{expected}, got {line[:60]!r}")
    return UserPrompt(document, question)
