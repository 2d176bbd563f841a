"""The kinds of runs of this half: many caches on one example, and many caches on one prompt of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suffice.kv.budget.protection import Protection
from suffice.kv.policy.registry import DEFAULT_POLICY, get_allocation, get_policy
from suffice.study.run_kind import RunKind

OWN = "own"  # stands for a policy's own allocation
_MODEL: dict[str, Any] = {"model": None, "device": "cpu", "dtype": "auto", "attn": "sdpa"}
_CELLS: dict[str, Any] = {"policies": [DEFAULT_POLICY], "allocations": [OWN], "budgets": [0.25]}


def check_cells(settings: Mapping[str, Any]) -> None:
    """Refuse policies, allocations and budgets that no cache could have.

    Raises:
        TypeError, ValueError: which, and what is accepted.

    """
    for name in _CELLS:
        values = settings[name]
        if not values or len({str(value) for value in values}) < len(values):
            raise ValueError(f"{name} is {list(values)!r}; accepted: at least one, each once")
    for policy in settings["policies"]:
        get_policy(policy)
    for allocation in settings["allocations"]:
        if allocation != OWN:
            get_allocation(allocation)
    for budget in settings["budgets"]:
        Protection().check(budget)


def check_compare(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what no comparison could do; a haystack enters by its content.

    Raises:
        TypeError, ValueError: which setting, and what is accepted.

    """
    from suffice.kv.eval.tasks import TASKS, modes

    check_cells(settings)
    task, mode = settings["task"], settings["mode"]
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(TASKS)}")
    if mode not in modes(task):
        raise ValueError(f"mode is {mode!r}; accepted for task {task!r}: {', '.join(modes(task))}")
    if settings["tokens"] < 1:
        raise ValueError(f"tokens is {settings['tokens']}; accepted: at least 1")
    if settings["greedy_tokens"] < 0:
        raise ValueError(f"greedy_tokens is {settings['greedy_tokens']}; accepted: 0 or more")
    return {**settings, "digest": digest(settings["haystack"])}


def check_tune(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what no run on a prompt could do.

    Raises:
        TypeError, ValueError: which setting, and what is accepted.

    """
    check_cells(settings)
    if settings["new_tokens"] < 1:
        raise ValueError(f"new_tokens is {settings['new_tokens']}; accepted: at least 1")
    return dict(settings)


def digest(path: str | None) -> str:
    """Return 16 hexadecimal digits that stand for a file's content; nothing for no file.

    Raises:
        ValueError: there is no such file.

    """
    if path is None:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"haystack is {path!r}, which can't be read: {error}") from None


COMPARE = RunKind(
    name="kv.compare",
    function="suffice.kv.eval.runs:compare_run",
    check="suffice.kv.eval.run_kinds:check_compare",
    report_sections="suffice.kv.eval.report_sections:add_records",
    compared_setting="policy",
    version=2,  # the capacity is measured under another policy's objective than before
    settings={
        "task": "text",
        "mode": "continuation",
        "tokens": 900,
        "haystack": None,
        **_CELLS,
        "answer": True,
        "greedy_tokens": 0,
        "measure_capacity": True,
        **_MODEL,
    },
    description="Read one example, and measure how close each policy, allocation and budget stays to the full cache.",
)
TUNE = RunKind(
    name="kv.tune",
    function="suffice.kv.eval.runs:tune_run",
    check="suffice.kv.eval.run_kinds:check_tune",
    settings={"prompts": "", "mode": "aware", "new_tokens": 32, **_CELLS, **_MODEL},
    description="Read one of the user's prompts and measure how close each cache stays to the full one's continuation.",
)
KINDS = {COMPARE.name: COMPARE, TUNE.name: TUNE}
