"""Tasks: what a compressed cache is tried on, made locally, from any text, at any length, from a seed.

The families of RULER (2404.06654) in words of our own, and the continuation of plain text. `make` builds an example by
the name of its task; the functions that it calls take more options.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import manual
from suffice.kv.eval.tasks.needles import needles
from suffice.kv.eval.tasks.qa import Passage, lives, qa
from suffice.kv.eval.tasks.text import continuation
from suffice.kv.eval.tasks.variables import variables
from suffice.kv.eval.tasks.words import common_words, frequent_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TASKS",
    "Example",
    "Passage",
    "common_words",
    "continuation",
    "frequent_words",
    "lives",
    "make",
    "manual",
    "modes",
    "needles",
    "qa",
    "variables",
]

TASKS: dict[str, Callable[..., Example]] = {
    "text": continuation,
    "single": functools.partial(needles, task="single"),
    "multikey": functools.partial(needles, task="multikey", keys=4),
    "multivalue": functools.partial(needles, task="multivalue", keys=2, values=4),
    "multiquery": functools.partial(needles, task="multiquery", keys=4, queries=2),
    "variables": variables,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "qa": qa,
}


def modes(task: str) -> tuple[str, ...]:
    """Return the ways to evict that a task has: before or after its question, or, for a text, one."""
    return ("continuation",) if task == "text" else ("agnostic", "aware")


def make(task: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int = 0, **options: Any) -> Example:
    """Make an example of a task.

    Args:
        task: its name, one of `TASKS`.
        tokenizer: counts tokens, and gives the chat template.
        tokens: most tokens of the prompt: document, question and template.
        seed: the same seed makes the same example.
        options: further arguments of the task's function, as `haystack` (any text) or `documents` of `qa`.

    Raises:
        ValueError: no such task, too few tokens for it, or what its function refuses.

    Example:
        >>> from suffice.kv.eval.tasks import make
        >>> example = make("multikey", tokenizer, tokens=900, seed=1)     # doctest: +SKIP
        >>> example.question                                              # doctest: +SKIP
        'What is the access code of the silver windmill?'

    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task is {task!r}, which is not known.{hint} Known: {', '.join(TASKS)}")
    return TASKS[task](tokenizer, tokens=tokens, seed=seed, **options)
