"""One run of a comparison: one example or prompt is read once, and every cache is measured on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.eval.fidelity import Cell, evaluate
from suffice.kv.eval.prompts import continued, read_prompts
from suffice.kv.eval.run_kinds import OWN
from suffice.kv.eval.tasks import make
from suffice.kv.hf.loading import load_model
from suffice.kv.policy.registry import get_allocation, get_policy
from suffice.study.job import RunContext

VALUES = (
    "kl",
    "log_likelihood_change",
    "top1",
    "score",
    "full_score",
    "chance",
    "agreement",
    "agreed_tokens",
    "capacity_retained",
    "tokens_kept",
    "bytes_kept",
    "bytes_full",
    "seconds",
)


@functools.lru_cache(maxsize=1)
def loaded(model: str | None, device: str, dtype: str, attn: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer; the last ones stay loaded for the next run."""
    return load_model(model, device=device, dtype=dtype, attn=attn)


def contestants(settings: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return policy, allocation and budget of every cache that the settings name, budgets fastest.

    An allocation that is the policy's own is not measured twice.
    """
    splits = settings["allocations"]
    return [
        (policy, split, budget)
        for policy, split, budget in itertools.product(settings["policies"], splits, settings["budgets"])
        if split == OWN or OWN not in splits or get_policy(policy).allocation != get_allocation(split)
    ]


def cells_of(settings: Mapping[str, Any]) -> list[Cell]:
    """Return every cache that the settings name."""
    return [Cell(policy, budget, None if split == OWN else split) for policy, split, budget in contestants(settings)]


def compare_run(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Make an example and measure every cache on it.

    Args:
        settings: of the kind `kv.compare`, complete.
        seed: of the example.
        context: tells what is being done.

    Returns:
        `rows`, one for the full cache and one for each other, with `settings` and `values`; `said`, the answers.

    """
    model, tokenizer = _model(settings)
    text = settings["haystack"]
    hay = {} if text is None else {"haystack": Path(text).read_text(encoding="utf-8")}
    example = make(settings["task"], tokenizer, tokens=settings["tokens"], seed=seed, **hay)
    context.log(f"{settings['task']}, {settings['mode']}, sample {seed}")
    rows = evaluate(
        model,
        tokenizer,
        example,
        cells_of(settings),
        mode=settings["mode"],
        answer=settings["answer"],
        greedy_tokens=settings["greedy_tokens"],
        measure_capacity=settings["measure_capacity"],
    )
    return {
        "rows": _rows(rows, settings),
        "tokens": rows[0]["tokens"],
        "gold": example.answer,
        "said": [row["said"] for row in rows],
    }


def tune_run(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Let the full cache go on from a prompt, and measure every cache on what it said.

    Args:
        settings: of the kind `kv.tune`, complete; `prompts` is a file in the study's folder.
        seed: number of the prompt in it.
        context: where the file is.

    Returns:
        `rows` as `compare_run`; `said`, how the full cache goes on.

    """
    model, tokenizer = _model(settings)
    prompt = read_prompts(context.folder / settings["prompts"])[seed]
    example = continued(model, tokenizer, prompt, settings["new_tokens"], seed)
    context.log(f"prompt {seed}")
    rows = evaluate(
        model,
        tokenizer,
        example,
        cells_of(settings),
        mode=settings["mode"],
        answer=False,
        greedy_tokens=settings["new_tokens"],
    )
    return {"rows": _rows(rows, settings), "tokens": rows[0]["tokens"], "said": example.answer}


def _model(settings: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return loaded(settings["model"], settings["device"], settings["dtype"], settings["attn"])


def _rows(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [("full", OWN, 1.0), *contestants(settings)]
    return [
        {
            "settings": {"policy": policy, "allocation": allocation, "budget": budget},
            "values": {name: row[name] for name in VALUES if row[name] is not None},
        }
        for (policy, allocation, budget), row in zip(names, rows, strict=True)
    ]
