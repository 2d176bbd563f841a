"""Tasks for the evaluation of compressed caches. Examples are made locally from any text, at any length, from a seed.

The tasks follow RULER (2404.06654), but use other texts. An additional task is the continuation of plain text.
`make_example` makes an example of the task with a given name. The function of each task has further options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from suffice.arguments import check_choice, check_int, check_text
from suffice.kv.eval.task_names import task_modes
from suffice.kv.eval.tasks.continuation import continuation
from suffice.kv.eval.tasks.example import Example
from suffice.kv.eval.tasks.haystack import python_manual
from suffice.kv.eval.tasks.needles import needles
from suffice.kv.eval.tasks.planted_facts import planted_facts
from suffice.kv.eval.tasks.qa import Passage, made_up_biographies, qa
from suffice.kv.eval.tasks.variables import variables
from suffice.kv.eval.tasks.words import common_words, frequent_words
from suffice.kv.hf.tokenization import check_tokenizer
from suffice.study.run_kind import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TASKS",
    "Example",
    "Passage",
    "common_words",
    "continuation",
    "frequent_words",
    "made_up_biographies",
    "make_example",
    "needles",
    "planted_facts",
    "python_manual",
    "qa",
    "task_modes",
    "variables",
]

TASKS: dict[str, Callable[..., Example]] = {
    "text": continuation,
    "single": functools.partial(needles, task="single"),
    "multikey": functools.partial(needles, task="multikey", num_keys=4),
    "multivalue": functools.partial(needles, task="multivalue", num_keys=2, num_values=4),
    "multiquery": functools.partial(needles, task="multiquery", num_keys=4, num_queries=2),
    "variables": variables,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "qa": qa,
}

_COMMON = {"tokenizer", "tokens", "seed", "task"}  # arguments of every task that are not options


def make_example(
    task: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int = 0, **options: Any
) -> Example:
    """Make an example of a task.

    Args:
        task: name of the task, one of `TASKS`.
        tokenizer: counts tokens, and provides the chat template.
        tokens: maximum number of tokens in the prompt: document, question and template.
        seed: the same seed makes the same example.
        options: further arguments of the task's function, such as `haystack` (any text) or `passages` (of `qa`).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the task or an option is unknown, the task does not fit into `tokens`, or its function rejects an
            option.

    Example:
        >>> from suffice.kv.eval.tasks import make_example
        >>> example = make_example("multikey", tokenizer, tokens=900, seed=1)     # doctest: +SKIP
        >>> example.question                                                      # doctest: +SKIP
        'What is the access code of the silver windmill?'

    """
    check_choice("task", task, TASKS)
    check_tokenizer(tokenizer)
    check_names(options, inspect.signature(TASKS[task]).parameters.keys() - _COMMON, f"options of task {task!r}")
    if options.get("haystack") is not None:
        check_text("haystack", options["haystack"])
    tokens, seed = check_int("tokens", tokens, 1), check_int("seed", seed)
    return TASKS[task](tokenizer, tokens=tokens, seed=seed, **options)
