"""A user's own prompts: read from a file, and continued by the full cache."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffice.kv.eval.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from suffice.kv.eval.answer import Prompt


@dataclass(frozen=True)
class UserPrompt:
    """What a user sends: a prompt, or a document and a question about it."""

    document: str
    question: str | None = None


@dataclass(frozen=True)
class Continued(Example):
    """A prompt and how the full cache goes on; it is sent in the model's chat template, if there is one."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Without a question there is nothing to be seen after eviction."""
        return ("aware",) if self.question is None else ("agnostic", "aware")

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Return the token ids."""
        from suffice.kv.eval.answer import prompt

        return prompt(tokenizer, self.document, self.question)


def read_prompts(path: str | Path) -> list[UserPrompt]:
    """Read prompts from a file.

    Of a file that ends in `.jsonl` each line is a JSON string, or an object with `prompt` (or `document`) and, if it
    has one, `question`. In any other file, prompts stand between lines of three or more dashes.

    Raises:
        ValueError: the file can't be read, a line holds no prompt, or there is none.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts is {str(path)!r}, which can't be read as text: {error}") from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [_parsed(line, number, path) for number, line in lines]
    else:
        found = [UserPrompt(part.strip()) for part in re.split(r"^-{3,}\s*$", text, flags=re.MULTILINE) if part.strip()]
    if not found:
        raise ValueError(f"prompts is {str(path)!r}, which holds no prompt; accepted: at least one")
    return found


def write_prompts(prompts: list[UserPrompt], path: Path) -> None:
    """Write prompts as JSON lines, one each."""
    lines = [json.dumps({"prompt": one.document, "question": one.question}, ensure_ascii=False) for one in prompts]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: UserPrompt, new_tokens: int, seed: int
) -> Example:
    """Let the full cache answer a prompt greedily; what it says is what other caches are measured on.

    Raises:
        ValueError: prompt and answer do not fit into the model's window, or the model ends its answer at once.

    """
    from suffice.kv.eval.answer import answer

    said, _ = answer(
        model, tokenizer, prompt.document, prompt.question, policy="full", budget=1.0, max_new_tokens=new_tokens
    )
    if not said.answer:
        raise ValueError(f"prompt {seed}: the model says nothing, so there is nothing to compare with")
    return Continued("prompt", seed, prompt.document, prompt.question, "", said.answer, (), new_tokens=new_tokens)


def _parsed(line: str, number: int, path: Path) -> UserPrompt:
    accepted = 'accepted: a JSON string, or an object with "prompt" and, if there is one, "question"'
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"prompts {str(path)!r}, line {number}: {error}; {accepted}") from None
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict):
        raise ValueError(f"prompts {str(path)!r}, line {number} is {line[:60]!r}; {accepted}")
    document, question = found.get("prompt", found.get("document")), found.get("question")
    if not isinstance(document, str) or not document.strip() or not isinstance(question, str | None):
        raise ValueError(f"prompts {str(path)!r}, line {number} is {line[:60]!r}; {accepted}")
    return UserPrompt(document, question)
