"""Bad arguments of the public functions and commands raise an error that names them, before any work."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from suffice.cli import app
from suffice.kv import (
    BatchedCaches,
    CacheConfig,
    CompressedCache,
    ModelSource,
    Policy,
    RunOptions,
    answer,
    calibrate,
    compare,
    evaluate,
    get_policy,
    load_model,
    policies,
    prefill,
    tune,
)
from suffice.kv.eval.cache_grid import CacheGrid
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.user_prompts import UserPrompt, read_user_prompts
from suffice.kv.policy.estimators import Leverage
from suffice.kv.policy.weights import ExpectedAttention, KeySalience, WindowAttention
from tests.kv.tiny import TOKENS, build, tokenizer
from tests.wrong_arguments import each_wrong_argument, expect_error

MODEL = build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3)
EXAMPLE = make_example("multikey", tokenizer(), tokens=300, seed=0)
IDS = {"input_ids": torch.arange(9)[None]}
PROMPTS = ["one text", "another text"]

CALLS = {
    "tune": lambda **own: tune(**{"prompts": PROMPTS, "target_kl": 0.1, **own}),
    "compare": compare,
    "evaluate": lambda **own: evaluate(
        **{"model": MODEL, "tokenizer": tokenizer(), "example": EXAMPLE, "configs": [CacheConfig("h2o")], **own}
    ),
    "answer": lambda **own: answer(**{"model": MODEL, "tokenizer": tokenizer(), "document": "a b c", **own}),
    "prefill": lambda **own: prefill(
        **{"model": MODEL, "inputs": IDS, "caches": [CompressedCache(MODEL, "kvzip")], **own}
    ),
    "load_model": load_model,
    "calibrate": lambda **own: calibrate(**{"model": MODEL, "tokenizer": tokenizer(), **own}),
    "CompressedCache": lambda **own: CompressedCache(**{"model": MODEL, "policy": "h2o", **own}),
    "BatchedCaches": BatchedCaches,
    "ModelSource": ModelSource,
    "RunOptions": RunOptions,
    "CacheConfig": lambda **own: CacheConfig(**{"policy": "h2o", **own}).check(),
    "make_example": lambda **own: make_example(**{"task": "multikey", "tokenizer": tokenizer(), "tokens": 300, **own}),
    "UserPrompt": UserPrompt,
    "read_user_prompts": read_user_prompts,
    "policies": policies,
    "get_policy": get_policy,
    "Policy": lambda **own: Policy(**{"weights": get_policy("h2o").weights, **own}),
    "WindowAttention": WindowAttention,
    "ExpectedAttention": ExpectedAttention,
    "KeySalience": KeySalience,
    "Leverage": Leverage,
}

# Function, argument, value, type of the error, words of the error.
WRONG = [
    # Prompts.
    ("tune", "prompts", "abc", TypeError, "prompts must be a list of texts or UserPrompts, such as .*, got 'abc'"),
    ("tune", "prompts", None, TypeError, "prompts must be a list of texts or UserPrompts, such as .*, got None"),
    ("tune", "prompts", {"a": "b"}, TypeError, "prompts must be a list .*, got {'a': 'b'}"),
    ("tune", "prompts", ["a", 3], TypeError, "prompts must hold texts or UserPrompts, got 3 as prompt 1"),
    ("tune", "prompts", [None, "a"], TypeError, "prompts must hold texts or UserPrompts, got None as prompt 0"),
    ("tune", "prompts", [{}, "a"], TypeError, "prompts must hold texts or UserPrompts, got {} as prompt 0"),
    ("tune", "prompts", ["a", " "], ValueError, "prompt 1: document must contain text, got ' '"),
    ("UserPrompt", "document", 3, TypeError, "document must be a string, got 3"),
    ("read_user_prompts", "path", 3, TypeError, "prompts must be a path .*, got 3"),
    ("answer", "document", None, TypeError, "document must be a string, got None"),
    ("answer", "document", " ", ValueError, "document must contain text, got ' '"),
    ("answer", "question", ["a"], TypeError, r"question must be a string or None, got \['a'\]"),
    ("answer", "question", "", ValueError, "question must contain text, or be None, got ''"),
    ("calibrate", "text", b"text", TypeError, "text must be a string or None, got b'text'"),
    ("make_example", "haystack", 3, TypeError, "haystack must be a string, got 3"),
    # Lists of names and of other values.
    *(
        (call, name, "h2o", TypeError, f"{name} must be a list of .*, such as .*, got 'h2o'")
        for call in ("tune", "compare")
        for name in ("policies", "allocations", "budgets", "bits", "memory", "repair")
    ),
    *(
        (call, name, value, TypeError, f"{name} must be a list of names of {name}, .*, got .* as item 0")
        for call in ("tune", "compare")
        for name in ("policies", "allocations")
        for value in ([None], [3], [get_policy("h2o")])
    ),
    ("compare", "policies", None, TypeError, "policies must be a list of names of policies, such as .*, got None"),
    ("tune", "policies", ["h2o", "H2O"], ValueError, "policies must hold at least one value and no duplicates"),
    ("compare", "policies", {"h2o": 1}, TypeError, "policies must be a list .*, got {'h2o': 1}"),
    ("tune", "budgets", ["x"], TypeError, "budget must be a number of tokens .*, got 'x'"),
    ("compare", "budgets", [None], TypeError, "budget must be a number of tokens .*, got None"),
    ("compare", "budgets", [0.5, True], TypeError, "budget must be a number of tokens .*, got True"),
    ("tune", "repair", [None], TypeError, r"repair must hold True, False or both, got \[None\]"),
    ("compare", "tasks", "text", TypeError, r"tasks must be a list of pairs \(task, mode\), .*, got 'text'"),
    ("compare", "tasks", ["text"], TypeError, r"tasks must be a list of pairs .*, got 'text' in it"),
    ("compare", "tasks", [("text",)], TypeError, r"tasks must be a list of pairs .*, got \('text',\) in it"),
    ("compare", "tasks", [("text", 1)], TypeError, r"tasks must be a list of pairs .*, got \('text', 1\) in it"),
    ("compare", "tasks", [("txt", "aware")], ValueError, "task must be one of .*, got 'txt'. Did you mean 'text'"),
    (
        "evaluate",
        "configs",
        CacheConfig("h2o"),
        TypeError,
        "configs must be a list of CacheConfigs, .*, got a value of type CacheConfig",
    ),
    ("evaluate", "configs", ["h2o"], TypeError, r"configs\[0\] must be a CacheConfig, such as .*, got 'h2o'"),
    ("evaluate", "configs", [CacheConfig("h3o")], ValueError, "policy must be one of .*, got 'h3o'"),
    ("prefill", "caches", CompressedCache(MODEL, "h2o"), TypeError, "caches must be a list .*, got a CompressedCache"),
    ("prefill", "caches", [None], TypeError, "caches must hold CompressedCaches, got None as item 0"),
    ("prefill", "caches", [], ValueError, "caches must hold at least one CompressedCache, got none"),
    ("BatchedCaches", "caches", 3, TypeError, "caches must be a list of CompressedCaches, .*, got 3"),
    # Numbers.
    *(
        (call, name, value, TypeError, f"{name} must be an int, at least .*, got {value!r}")
        for call, name in (
            ("compare", "samples"),
            ("compare", "tokens"),
            ("compare", "seed"),
            ("compare", "greedy_tokens"),
            ("tune", "max_new_tokens"),
            ("answer", "max_new_tokens"),
            ("evaluate", "greedy_tokens"),
            ("RunOptions", "workers"),
            ("make_example", "tokens"),
            ("answer", "chunk_size"),
            ("answer", "interval"),
            ("prefill", "chunk_size"),
            ("CompressedCache", "interval"),
            ("calibrate", "tokens"),
            ("Policy", "window"),
            ("WindowAttention", "window_size"),
            ("ExpectedAttention", "recent"),
        )
        for value in (1.5, "x", True)
    ),
    ("compare", "samples", None, TypeError, "samples must be an int, at least 1, got None"),
    ("compare", "samples", 0, ValueError, "samples must be at least 1, got 0"),
    ("compare", "seed", -1, ValueError, "seed must be at least 0, got -1"),
    ("make_example", "seed", "x", TypeError, "seed must be an int, got 'x'"),
    ("make_example", "num_keys", 1.5, TypeError, "num_keys must be an int, from 1 to 756, got 1.5"),
    ("make_example", "depht", 1.5, ValueError, "options of task 'multikey' must be among .*Did you mean 'depth'"),
    ("answer", "chunk_size", 0, ValueError, "chunk_size must be at least 1 token, got 0"),
    ("calibrate", "tokens", 31, ValueError, "tokens must be at least 32, got 31"),
    ("tune", "target_kl", "x", TypeError, "target_kl must be a number, above 0 nats per token, got 'x'"),
    ("tune", "target_kl", True, TypeError, "target_kl must be a number, above 0 nats per token, got True"),
    ("tune", "target_kl", float("nan"), ValueError, "target_kl must be above 0 nats per token, got nan"),
    ("tune", "target_kl", float("inf"), ValueError, "target_kl must be above 0 nats per token, got inf"),
    ("tune", "confidence", "x", TypeError, "confidence must be a number, above 0.5 and below 1, got 'x'"),
    ("tune", "confidence", 1, ValueError, "confidence must be above 0.5 and below 1, got 1"),
    ("Leverage", "ridge", 0, ValueError, "ridge must be above 0, got 0"),
    ("KeySalience", "beta", "x", TypeError, "beta must be a number, got 'x'"),
    # Flags.
    *(
        (call, name, value, TypeError, f"{name} must be True or False, got {value!r}")
        for call, name in (
            ("compare", "answer"),
            ("compare", "measure_capacity"),
            ("evaluate", "answer"),
            ("evaluate", "measure_capacity"),
            ("evaluate", "share_statistics"),
            ("answer", "aware"),
            ("answer", "rerotate"),
            ("answer", "repair"),
            ("prefill", "share_statistics"),
            ("CompressedCache", "measure_capacity"),
            ("CacheConfig", "repair"),
            ("policies", "replay"),
            ("Policy", "keep_all"),
        )
        for value in (1, "yes")
    ),
    # Choices.
    ("tune", "mode", 3, TypeError, "mode must be one of aware, agnostic, got 3"),
    ("evaluate", "mode", "awre", ValueError, "mode must be one of agnostic, aware for task .*Did you mean 'aware'"),
    ("evaluate", "mode", ["aware"], TypeError, r"mode must be one of agnostic, aware for .*, got \['aware'\]"),
    ("make_example", "task", ["text"], TypeError, r"task must be one of .*, got \['text'\]"),
    ("load_model", "dtype", "float8", ValueError, "dtype must be one of auto, float32, .*, got 'float8'"),
    ("load_model", "dtype", [], TypeError, r"dtype must be one of auto, float32, .*, got \[\]"),
    ("load_model", "attn_implementation", None, TypeError, "attn_implementation must be sdpa, .*, got None"),
    # Models, tokenizers, examples, folders.
    ("load_model", "model", 3, TypeError, "model must be the name of a model, a folder or None, got 3"),
    ("load_model", "model", "", ValueError, "model must be a path, got ''"),
    ("load_model", "device", 3, TypeError, "device must be a name such as 'cpu' or 'cuda:0', .*, got 3"),
    ("load_model", "device", "gpu", ValueError, "device must be one that torch can use here, got 'gpu'"),
    ("load_model", "on_progress", "print", TypeError, "on_progress must be a function, got 'print'"),
    ("compare", "model", MODEL, TypeError, "model must be the name of a model, .*, got a value of type LlamaFor"),
    ("tune", "model", 3, TypeError, "model must be the name of a model, a folder, a ModelSource or None, .*, got 3"),
    ("ModelSource", "dtype", "float8", ValueError, "dtype must be one of .*, got 'float8'"),
    ("ModelSource", "name", 3, TypeError, "name must be the name of a model, a folder or None, got 3"),
    ("ModelSource", "device", None, TypeError, "device must be a string, got None"),
    *(
        (call, "model", "x", TypeError, "model must be a transformers PreTrainedModel, got str")
        for call in ("evaluate", "answer", "prefill", "calibrate", "CompressedCache")
    ),
    *(
        (call, "tokenizer", 3, TypeError, "tokenizer must be the model's tokenizer, .*, got 3")
        for call in ("evaluate", "answer", "prefill", "calibrate", "make_example")
    ),
    ("evaluate", "example", "x", TypeError, "example must be an Example, such as .*, got 'x'"),
    ("prefill", "inputs", IDS["input_ids"], TypeError, "inputs must be a mapping such as {'input_ids': ids}, got tens"),
    ("compare", "run", "folder", TypeError, r"run must be a RunOptions, such as RunOptions\(.*, or None, got 'folder'"),
    ("tune", "run", Path("folder"), TypeError, "run must be a RunOptions, such as .*, got PosixPath"),
    ("RunOptions", "folder", 3, TypeError, "folder must be a path .*, got 3"),
    ("RunOptions", "on_progress", "print", TypeError, "on_progress must be a function, got 'print'"),
    ("RunOptions", "command", 3, TypeError, "command must be a string, got 3"),
    ("compare", "haystack", 3, TypeError, "haystack must be a path .*, got 3"),
    ("get_policy", "name", 3, TypeError, "policy must be an instance of Policy or one of .*, got 3"),
    ("Policy", "name", "", ValueError, "name must contain text, got ''"),
]


@pytest.fixture
def no_work(monkeypatch):
    """Make every load and every forward pass fail the test."""

    def work(*args, **options):
        pytest.fail("work was done")

    for module in ("compare", "tune"):
        monkeypatch.setattr(sys.modules[f"suffice.kv.eval.{module}"], "run_samples", work)
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", work)
    monkeypatch.setattr("suffice.kv.hf.loading.packaged_model_folder", work)
    monkeypatch.setattr(MODEL, "forward", work)


@each_wrong_argument(WRONG)
def test_a_wrong_argument_is_named_before_any_work(no_work, call, argument, value, error, words):
    expect_error(CALLS[call], argument, value, error, words)


def test_numbers_of_numpy_and_paths_are_accepted(tmp_path):
    run = RunOptions(tmp_path, workers=np.int64(2))
    assert (run.workers, type(run.workers)) == (2, int)
    assert ModelSource(tmp_path, torch.device("cpu")) == ModelSource(str(tmp_path), "cpu")
    assert ModelSource.from_name(tmp_path) == ModelSource(str(tmp_path))


def test_names_of_a_grid_have_one_form():
    grid = CacheGrid(iter(["H2O", "capkv_profile"]), ("Own",), (x for x in [0.5]))
    assert grid == CacheGrid(["h2o", "capkv-profile"], ["own"], [0.5])
    assert grid.settings() == {"policies": ["h2o", "capkv-profile"], "allocations": ["own"], "budgets": [0.5]}


@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("pretrained", 3, TypeError, "pretrained must be a name, a folder, a model or None, got 3"),
        ("pretrained", MODEL, ValueError, "tokenizer must be given if pretrained is a model, got None"),
        ("tokenizer", 3, TypeError, "tokenizer must be the model's tokenizer, .*, got 3"),
        ("device", 3, TypeError, "device must be a name such as 'cpu' or 'cuda:0', or None, got 3"),
        ("dtype", "float8", ValueError, "dtype must be one of .*, got 'float8'"),
        ("attn_implementation", "fast", ValueError, "attn_implementation must be sdpa, .*, got 'fast'"),
        ("policy", None, TypeError, "policy must be an instance of Policy or one of .*, got None"),
        ("budget", "x", TypeError, "budget must be a number of tokens .*, got 'x'"),
        ("repair", 1, TypeError, "repair must be True or False, got 1"),
        ("max_lenght", 9, ValueError, "options must be among .* Did you mean 'max_length'"),
    ],
)
def test_wrong_arguments_of_the_harness_model_are_named_before_any_work(
    no_work, monkeypatch, argument, value, error, words
):
    with pytest.raises(error, match=rf"(?s)^{words}"):
        harness_model(monkeypatch)(**{argument: value})


def harness_model(monkeypatch):
    """Return the model for the LM Evaluation Harness, with an empty base class if the harness is not installed."""
    try:
        from suffice.kv.eval.lm_eval import CompressedLM
    except ImportError:
        parts = {
            "lm_eval": {},
            "lm_eval.api": {},
            "lm_eval.api.registry": {"register_model": lambda _: lambda model: model},
            "lm_eval.models": {},
            "lm_eval.models.huggingface": {"HFLM": object},
            "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
        }
        for name, content in parts.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        from suffice.kv.eval.lm_eval import CompressedLM

        monkeypatch.delitem(sys.modules, "suffice.kv.eval.lm_eval")
    return CompressedLM


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate --prompt a --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
        ("generate --prompt a --interval 0", "--interval must be at least 1, got 0"),
        ("generate --prompt a --chunk-size 0", "--chunk-size must be at least 1 token, got 0"),
        ("generate --prompt a --replay --interval 9", "--interval must not be given with policy 'capkv-replay', .* 9"),
        ("generate --prompt a --policy h3o", "policy must be one of .*Did you mean 'h2o'"),
        ("generate --prompt a --dtype float8", "dtype must be one of .*, got 'float8'"),
        ("generate --prompt a --attn fast", "attn_implementation must be sdpa, .*, got 'fast'"),
        ("generate --prompt a --device gpu", "device must be one that torch can use here, got 'gpu'"),
        ("calibrate --tokens 5", "--tokens must be at least 32, got 5"),
        ("calibrate --dtype float8", "dtype must be one of .*, got 'float8'"),
        ("compare --samples 0", "samples must be at least 1, got 0"),
        ("compare --seed -1", "seed must be at least 0, got -1"),
        ("compare --tokens 0", "tokens must be at least 1, got 0"),
        ("compare --tasks ,", "tasks must hold at least one"),
        ("compare --policies ,", "policies must hold at least one value"),
        ("compare --dtype float8", "dtype must be one of .*, got 'float8'"),
        ("tune --prompts FILE --target-kl 0", "target_kl must be above 0 nats per token, got 0"),
        ("tune --prompts FILE --target-kl 1 --confidence 2", "confidence must be above 0.5 and below 1, got 2.0"),
        ("tune --prompts FILE --target-kl 1 --max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("tune --prompts FILE --target-kl 1 --attn fast", "attn_implementation must be sdpa, .*, got 'fast'"),
    ],
)
def test_wrong_options_are_named_before_any_work(no_work, tmp_path, command, words):
    file = tmp_path / "prompts.txt"
    file.write_text("one text\n---\nanother text", encoding="utf-8")
    done = CliRunner().invoke(app, ["kv", *(str(file) if word == "FILE" else word for word in command.split())])
    assert isinstance(done.exception, (TypeError, ValueError)), done.output
    assert re.search(words, str(done.exception)), done.exception
