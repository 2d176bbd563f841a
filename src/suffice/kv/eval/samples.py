"""Measure one sample of a study: all caches on one example, or on one prompt of the user."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.files import read_text
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.limit_check import check_limits
from suffice.kv.cache.memory import TooLittleMemoryError
from suffice.kv.eval.cache_grid import CacheGrid, GridCache
from suffice.kv.eval.fidelity import evaluate
from suffice.kv.eval.tasks import Example, make_example
from suffice.kv.eval.user_prompts import answer_with_full_cache, read_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.names import OWN_ALLOCATION
from suffice.kv.policy.registry import get_policy
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
    "bytes",
    "bytes_kept",
    "bytes_full",
    "seconds",
)


@functools.lru_cache(maxsize=1)
def load_cached(source: ModelSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. The most recent pair stays in memory for the next sample."""
    return source.load()


def check_memory(
    source: ModelSource,
    caches: Sequence[GridCache],
    num_tokens: Callable[[PreTrainedTokenizerBase], int],
    *,
    keep_model: bool,
) -> None:
    """Check that limits on the bytes are large enough for a prompt, before samples are measured.

    Args:
        source: the model, which is loaded.
        caches: the caches; those without a limit, or that cannot be made for the model, are not checked.
        num_tokens: returns the number of tokens of the longest prompt for the model's tokenizer.
        keep_model: whether the model stays in memory, for samples that are measured in this process.

    Raises:
        ValueError: a limit is too small, or the model cannot be loaded.

    """
    limited = [cache for cache in caches if cache.memory is not None]
    if not limited:
        return
    model, tokenizer = load_cached(source)
    made: list[CompressedCache] = []
    for cache in limited:
        with contextlib.suppress(ValueError):  # the samples report this error, unless the cache may be left out
            made.append(cache.config().build(model))
    try:
        check_limits(model, made, num_tokens(tokenizer))
    finally:
        if not keep_model:
            load_cached.cache_clear()


def compare_on_example(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Make an example of a task, and measure every cache on it.

    Args:
        settings: complete settings of the kind `kv.compare`.
        seed: seed of the example.
        context: reports the progress.

    Returns:
        `rows`: `settings` and `values` of each cache, the full cache first; `tokens`: number of tokens in the prompt;
        `gold`: the right answer; `answers`: the answer from each cache.

    Raises:
        ValueError: a cache cannot be made for the model, or the prompt is too long or too short; names the sample.

    """
    model, tokenizer = load_cached(ModelSource(**settings["model"]))
    haystack = settings["haystack"]
    options = {} if haystack is None else {"haystack": read_text(haystack, "haystack")}
    example = make_example(settings["task"], tokenizer, tokens=settings["tokens"], seed=seed, **options)
    context.log(f"{settings['task']}, {settings['mode']}, sample {seed}")
    caches = CacheGrid(**settings["caches"]).caches()
    try:
        rows = evaluate(
            model,
            tokenizer,
            example,
            [cache.config() for cache in caches],
            mode=settings["mode"],
            answer=settings["answer"],
            greedy_tokens=settings["greedy_tokens"],
            measure_capacity=settings["measure_capacity"],
        )
    except ValueError as error:
        raise ValueError(f"task {settings['task']}, {settings['mode']}, sample {seed}: {error}") from error
    return {
        "rows": _result_rows(rows, caches),
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

    Raises:
        ValueError: a cache cannot be made for the model, or the prompt is too long or too short; names the prompt.

    """
    model, tokenizer = load_cached(ModelSource(**settings["model"]))
    prompt = read_user_prompts(context.folder / settings["prompts"])[seed]
    caches = _buildable(model, CacheGrid(**settings["caches"]).caches(), settings.get("optional", ()))
    context.log(f"prompt {seed}")
    try:
        example = answer_with_full_cache(model, tokenizer, prompt, settings["max_new_tokens"], seed)
        caches, rows = _evaluate_possible(model, tokenizer, example, caches, settings)
    except ValueError as error:
        raise ValueError(f"prompt {seed}: {error}") from error
    return {"rows": _result_rows(rows, caches), "tokens": rows[0]["tokens"], "answer": example.answer}


def _buildable(model: PreTrainedModel, caches: Sequence[GridCache], optional: Sequence[str]) -> list[GridCache]:
    """Return the caches that can be made for a model, without which nothing needs to be measured.

    Args:
        model: the language model.
        caches: the caches of the grid.
        optional: with `"policies"`, caches that cannot be made are left out.

    Raises:
        ValueError: a cache that is not optional, or every cache, cannot be made.

    """
    buildable: list[GridCache] = []
    errors: list[ValueError] = []
    for cache in caches:
        try:
            cache.config().build(model)
            buildable.append(cache)
        except ValueError as error:
            errors.append(error)
    if errors and (not buildable or "policies" not in optional):
        raise errors[0]
    return buildable


def _evaluate_possible(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    caches: list[GridCache],
    settings: Mapping[str, Any],
) -> tuple[list[GridCache], list[dict[str, Any]]]:
    """Measure the caches on an example, without optional ones that are not possible for a prompt of its length.

    Returns:
        The measured caches, and the result of `evaluate`.

    Raises:
        ValueError: a cache that is not optional, or every cache, is not possible.

    """
    while True:
        try:
            rows = evaluate(
                model,
                tokenizer,
                example,
                [cache.config() for cache in caches],
                mode=settings["mode"],
                answer=False,
                greedy_tokens=settings["max_new_tokens"] if settings.get("agreement", True) else 0,
            )
        except ValueError as error:
            caches = _without_impossible(caches, error, settings.get("optional", ()))
        else:
            return caches, rows


def _without_impossible(caches: list[GridCache], error: ValueError, optional: Sequence[str]) -> list[GridCache]:
    """Return the caches that may be possible where others are not: those with more memory, or without a replay.

    Args:
        caches: the caches with which the error was raised.
        error: the error.
        optional: what may be left out: `"memory"` for the smallest limit, `"policies"` for those with a replay.

    Raises:
        ValueError: the error, if no cache may be left out.

    """
    fewer = caches
    if isinstance(error, TooLittleMemoryError):
        if "memory" in optional:
            smallest = min(cache.memory or 0 for cache in caches)
            fewer = [cache for cache in caches if cache.memory != smallest]
    elif "policies" in optional:
        fewer = [cache for cache in caches if not get_policy(cache.policy).needs_replay]
    if len(fewer) in (0, len(caches)):
        raise error
    return fewer


def _result_rows(rows: Sequence[Mapping[str, Any]], caches: Sequence[GridCache]) -> list[dict[str, Any]]:
    return [
        {
            "settings": cache.settings(),
            "values": {name: row[name] for name in METRICS if row[name] is not None},
        }
        for cache, row in zip([GridCache("full", OWN_ALLOCATION, 1.0), *caches], rows, strict=True)
    ]
