"""The kinds of runs of `suffice.kv`: measure caches on one example, or on one prompt of the user."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suffice.arguments import check_choice, check_int
from suffice.files import read_text
from suffice.kv.eval.cache_grid import OWN_ALLOCATION, CacheGrid
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.study.run_kind import RunKind

# Defaults of the fields of `CacheGrid` and of `ModelSource`.
_CACHES: dict[str, Any] = {
    "policies": [DEFAULT_POLICY],
    "allocations": [OWN_ALLOCATION],
    "budgets": None,
    "bits": [None],
    "memory": None,
    "repair": [False],
}
_MODEL: dict[str, Any] = {"name": None, "device": "cpu", "dtype": "auto", "attn_implementation": "sdpa"}


def check_compare(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of a run of `kv.compare`, and add the digest of the haystack.

    Raises:
        TypeError, ValueError: a setting is out of range.

    """
    from suffice.kv.eval.tasks import TASKS, task_modes

    caches = CacheGrid(**settings["caches"])
    caches.check()
    task, mode = settings["task"], settings["mode"]
    check_choice("task", task, TASKS)
    check_choice("mode", mode, task_modes(task), f" for task {task!r}")
    check_int("tokens", settings["tokens"], 1)
    check_int("greedy_tokens", settings["greedy_tokens"], 0)
    ModelSource(**settings["model"])
    haystack = settings["haystack"]
    if haystack is not None and "haystack" not in inspect.signature(TASKS[task]).parameters:
        with_haystack = [name for name in TASKS if "haystack" in inspect.signature(TASKS[name]).parameters]
        raise ValueError(
            f"haystack must be None for task {task!r}, which makes its own text, got {haystack!r}. Tasks with a "
            f"haystack: {', '.join(with_haystack)}"
        )
    return {**settings, "caches": caches.settings(), "digest": text_digest(haystack)}


def check_tune(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of a run of `kv.tune`.

    Raises:
        TypeError, ValueError: a setting is out of range.

    """
    caches = CacheGrid(**settings["caches"])
    caches.check()
    check_choice("mode", settings["mode"], ("aware", "agnostic"))
    check_int("max_new_tokens", settings["max_new_tokens"], 1)
    ModelSource(**settings["model"])
    # Left out if they have their defaults, as in runs that were stored before these settings were added.
    added = {"agreement": True, "optional": []}
    kept = {name: value for name, value in settings.items() if name not in added or value != added[name]}
    return {**kept, "caches": caches.settings()}


def text_digest(path: str | None) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a haystack file; an empty string for None.

    Raises:
        ValueError: the file cannot be read, or contains no words.

    """
    if path is None:
        return ""
    if not read_text(path, "haystack").strip():
        raise ValueError(f"haystack must contain at least one word, got {path!r}, which is empty")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


COMPARE = RunKind(
    name="kv.compare",
    function="suffice.kv.eval.samples:compare_on_example",
    check="suffice.kv.eval.run_kinds:check_compare",
    report_sections="suffice.kv.eval.report_sections:add_records",
    compared_setting="policy",
    version=2,  # version 1 measured the capacity under the objective of a different policy
    settings={
        "task": "text",
        "mode": "continuation",
        "tokens": 900,
        "haystack": None,
        "answer": True,
        "greedy_tokens": 0,
        "measure_capacity": True,
        "caches": _CACHES,
        "model": _MODEL,
    },
    description="Measure how close caches stay to the full cache on one example of a task.",
)
TUNE = RunKind(
    name="kv.tune",
    function="suffice.kv.eval.samples:compare_on_prompt",
    check="suffice.kv.eval.run_kinds:check_tune",
    settings={
        "prompts": "",
        "mode": "aware",
        "max_new_tokens": 32,
        "agreement": True,
        "optional": [],
        "caches": _CACHES,
        "model": _MODEL,
    },
    description="Measure how close caches stay to the full cache's answer to one of the user's prompts.",
)
KINDS = {COMPARE.name: COMPARE, TUNE.name: TUNE}
