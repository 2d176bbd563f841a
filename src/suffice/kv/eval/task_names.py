"""Names of the tasks and their modes of eviction, which can be checked without importing torch."""

from __future__ import annotations

from suffice.arguments import check_choice

TASK_NAMES = (
    "text",
    "single",
    "multikey",
    "multivalue",
    "multiquery",
    "variables",
    "common-words",
    "frequent-words",
    "qa",
)


def task_modes(task: str) -> tuple[str, ...]:
    """Return the modes of eviction of a task: `agnostic` and `aware`, or only `continuation` for a text."""
    return ("continuation",) if task == "text" else ("agnostic", "aware")


def parse_task(text: str, argument: str) -> list[tuple[str, str]]:
    """Return pairs of a task and a mode: one for `multikey:aware`, and one for each mode for `multikey`.

    Args:
        text: the task and, if only one mode is meant, a colon and the mode.
        argument: argument or option that gave it, for the error.

    Raises:
        ValueError: the task or the mode is unknown.

    """
    task, _, mode = text.partition(":")
    check_choice(argument, task, TASK_NAMES)
    if mode:
        check_choice(f"the mode of {argument} {text!r}", mode, task_modes(task))
    return [(task, mode)] if mode else [(task, each) for each in task_modes(task)]
