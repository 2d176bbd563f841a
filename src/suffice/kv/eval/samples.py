"""Measure one sample of a study: all caches on one example, or on one prompt of the user."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.files import read_text
from suffice.kv.eval.cache_grid import OWN_ALLOCATION, CacheGrid, GridCache
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.user_prompts import answer_with_full_cache, read_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.study.job import RunContext

METRICS = (
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
def load_cached(source: ModelSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. The most recent pair stays in memory for the next sample."""
    return source.load()


def cache_configs(grid: CacheGrid) -> list[CacheConfig]:
    """Return the configuration of every cache in a grid."""
    return [
        CacheConfig(
            cache.policy,
            cache.budget,
            None if cache.allocation == OWN_ALLOCATION else cache.allocation,
            cache.bits,
            cache.memory,
        )
        for cache in grid.caches()
    ]


def compare_on_example(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Make an example of a task, and measure every cache on it.

    Args:
        settings: complete settings of the kind `kv.compare`.
        seed: seed of the example.
        context: reports the progress.

    Returns:
        `rows`: `settings` and `values` of each cache, the full cache first; `tokens`: number of tokens in the prompt;
        `gold`: the right answer; `answers`: the answer from each cache.

    """
    model, tokenizer = load_cached(ModelSource(**settings["model"]))
    haystack = settings["haystack"]
    options = {} if haystack is None else {"haystack": read_text(haystack, "haystack")}
    example = make_example(settings["task"], tokenizer, tokens=settings["tokens"], seed=seed, **options)
    context.log(f"{settings['task']}, {settings['mode']}, sample {seed}")
    grid = CacheGrid(**settings["caches"])
    rows = evaluate(
        model,
        tokenizer,
        example,
        cache_configs(grid),
        mode=settings["mode"],
        answer=settings["answer"],
        greedy_tokens=settings["greedy_tokens"],
        measure_capacity=settings["measure_capacity"],
    )
    return {
        "rows": _result_rows(rows, grid),
        "tokens": rows[0]["tokens"],
        "gold": example.answer,
        "answers": [row["answer"] for row in rows],
    }


def compare_on_prompt(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Answer a prompt of the user from the full cache, and measure every cache on that answer.

    Args:
        settings: complete settings of the kind `kv.tune`; `prompts` is the name of a file in the study's folder.
        seed: index of the prompt in the file.
        context: provides the study's folder, and reports the progress.

    Returns:
        `rows` and `tokens` as in `compare_on_example`; `answer`: the answer from the full cache.

    """
    model, tokenizer = load_cached(ModelSource(**settings["model"]))
    prompt = read_user_prompts(context.folder / settings["prompts"])[seed]
    example = answer_with_full_cache(model, tokenizer, prompt, settings["max_new_tokens"], seed)
    context.log(f"prompt {seed}")
    grid = CacheGrid(**settings["caches"])
    rows = evaluate(
        model,
        tokenizer,
        example,
        cache_configs(grid),
        mode=settings["mode"],
        answer=False,
        greedy_tokens=settings["max_new_tokens"],
    )
    return {"rows": _result_rows(rows, grid), "tokens": rows[0]["tokens"], "answer": example.answer}


def _result_rows(rows: Sequence[Mapping[str, Any]], grid: CacheGrid) -> list[dict[str, Any]]:
    caches = [GridCache("full", OWN_ALLOCATION, 1.0), *grid.caches()]
    return [
        {
            "settings": cache.settings(),
            "values": {name: row[name] for name in METRICS if row[name] is not None},
        }
        for cache, row in zip(caches, rows, strict=True)
    ]
