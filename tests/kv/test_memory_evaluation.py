"""Limits on the bytes of caches in `evaluate`, `compare`, `tune`, `answer`, the commands and the harness."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from suffice import SufficeError
from suffice.cli import app
from suffice.cli.kv_options import CacheGridOptions, parse_memory_option
from suffice.kv import CacheConfig, CompressedCache, answer, compare, evaluate, load_model, prefill, tune
from suffice.kv.budget.memory_limit import format_memory, parse_memory
from suffice.kv.cache.limit_check import check_limits
from suffice.kv.cache.memory import TooLittleMemoryError
from suffice.kv.eval.cache_grid import CacheGrid, GridCache
from suffice.kv.eval.compare import Condition
from suffice.kv.eval.fidelity import kl_divergence
from suffice.kv.eval.generation import fill_cache, greedy_generate
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.run_kinds import COMPARE
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.study.run_key import run_key
from suffice.study.store import Store
from tests.kv.tiny import tokenizer

LIMITS = [0.9, 0.25, 60_000]
PROMPTS = [UserPrompt(f"{name} is called Otto, and {name} lives in a small house. " * 6) for name in ("A", "B", "C")]


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("suffice.kv.hf.loading.ModelSource.load", lambda *_: pytest.fail("the model was loaded"))


def test_divergence_and_bytes_are_those_of_the_limited_cache(loaded):
    model, reader = loaded
    example = make_example("multikey", reader, tokens=300, seed=2)
    configs = [CacheConfig("h2o", memory=limit) for limit in (*LIMITS, "60kB")]
    _, *rows = evaluate(model, reader, example, configs, mode="agnostic", answer=False)
    assert [(row["budget"], row["memory"]) for row in rows] == [(None, limit) for limit in (*LIMITS, 60_000)]
    assert rows[2]["kl"] == rows[3]["kl"]
    prompt, gold = example.prompt(reader), example.answer_ids(reader)
    rest = torch.cat((prompt.input_ids[:, prompt.document.shape[1] :], gold), 1)
    caches = [CompressedCache(model, "h2o", memory=limit, evict="prefill") for limit in LIMITS]
    log_probs = []
    for cache in (CompressedCache(model, "full", 1.0), *caches):
        fill_cache(model, prompt.document, cache)
        report = cache.report()
        with torch.no_grad():
            logits = model(rest, past_key_values=cache, logits_to_keep=gold.shape[1] + 1).logits[0, :-1]
        log_probs.append(logits.log_softmax(-1))
        if len(log_probs) > 1:
            limit, row = LIMITS[len(log_probs) - 2], rows[len(log_probs) - 2]
            assert row["kl"] == pytest.approx(float(kl_divergence(log_probs[0], log_probs[-1]).mean()), abs=1e-5)
            assert (row["bytes_kept"], row["tokens_kept"]) == (report.bytes_kept, report.tokens_kept)
            allowed = limit if isinstance(limit, int) else limit * row["bytes_full"]
            assert report.bytes_kept + report.bytes_index <= allowed
            stored = report.heads[0].bits
            assert row["bits"] == (stored[0] if stored[0] == stored[1] else stored)
    assert rows[1]["tokens_kept"] < rows[0]["tokens_kept"]


def test_bits_of_a_cache_whose_entries_all_fit_are_none(loaded):
    model, reader = loaded
    example = make_example("text", reader, tokens=200, seed=2)
    full, row = evaluate(model, reader, example, [CacheConfig("h2o", memory="1MB")], mode="continuation")
    assert (row["bits"], row["memory"], row["tokens_kept"]) == (None, 1_000_000, full["tokens_kept"])
    assert row["kl"] == pytest.approx(0, abs=1e-6)


def test_settings_without_limits_have_the_keys_of_runs_that_were_stored_before():
    """The key was computed by the version that had neither bits nor limits."""

    def complete(**caches):
        settings = {"task": "multikey", "mode": "agnostic", "caches": {"policies": ["h2o"], **caches}}
        return COMPARE.complete(settings)

    def key(**caches):
        return run_key(COMPARE.name, "1", COMPARE.flatten(complete(**caches)), 0)

    assert key(budgets=[0.5, 40]) == key(budgets=[0.5, 40], memory=None) == "7fbba468400377d324324f97"
    assert key() == key(budgets=[0.25])
    assert key(memory=["2GiB"]) == key(memory=[2 << 30]) != key(memory=[0.25])
    assert complete(memory=[0.1])["caches"] == {"policies": ["h2o"], "allocations": ["own"], "memory": [0.1]}
    again = COMPARE.complete({"task": "multikey", "mode": "agnostic", "caches": complete(memory=[0.1])["caches"]})
    assert again == complete(memory=[0.1])


def test_grids_combine_limits_with_methods_and_bits():
    grid = CacheGrid(["h2o", "knorm"], ["own"], None, [None, 4], [0.1, "1kB"])
    assert grid.caches()[:4] == [
        GridCache("h2o", "own", None, None, 0.1),
        GridCache("h2o", "own", None, 4, 0.1),
        GridCache("h2o", "own", None, None, 1000),
        GridCache("h2o", "own", None, 4, 1000),
    ]
    assert len(grid.caches()) == 8
    assert grid.caches()[0].settings() == {"policy": "h2o", "allocation": "own", "budget": None, "memory": 0.1}
    assert grid.largest_first().memory == [1000, 0.1]


def test_comparison_of_limits_equals_evaluate(folder, loaded, tmp_path):
    model, reader = loaded
    options = {"policies": ["h2o", "knorm"], "tasks": [("multikey", "agnostic")], "tokens": 300, "model": folder}
    found = compare(**options, memory=[0.9, 60_000], samples=2, run=RunOptions(tmp_path))
    assert found.conditions == [Condition("multikey", "agnostic", None, None, limit) for limit in (0.9, 60_000)]
    for seed in (0, 1):
        example = make_example("multikey", reader, tokens=300, seed=seed)
        rows = evaluate(model, reader, example, [CacheConfig("knorm", memory=m) for m in (0.9, 60_000)])[1:]
        for row, condition in zip(rows, found.conditions, strict=True):
            values = found.group("knorm", condition).values
            assert values["kl"][seed] == pytest.approx(row["kl"], abs=1e-4)
            assert values["bytes_kept"][seed] == row["bytes_kept"]
    assert {(row["budget"], row["memory"]) for row in found.differences("h2o")} == {(None, 0.9), (None, 60_000)}
    assert {row.get("memory") for row in found.rows()} == {None, 0.9, 60_000}
    assert "bits" not in found.rows()[0]
    # Stored samples are read again.
    assert compare(**options, memory=[0.9, "60kB"], samples=2, run=RunOptions(tmp_path)).rows() == found.rows()
    with Store(tmp_path, read_only=True) as store:
        assert len(list(store.records("compare"))) == 2


def test_a_limit_that_is_too_small_for_a_prompt_names_the_sample(folder, tmp_path):
    options = {"policies": ["h2o"], "tasks": [("multikey", "agnostic")], "tokens": 300, "samples": 2, "model": folder}
    limit = smallest_limit(folder, tokens=300)  # too small for the document alone, which has fewer tokens
    message = r"the first .* sample .* seed 0: ValueError: task multikey, agnostic, sample 0: memory must be at least"
    with pytest.raises(SufficeError, match=rf"(?is)2 of 2 samples are not done; the others are stored\. {message}"):
        compare(memory=[limit], run=RunOptions(tmp_path), **options)
    with pytest.raises(SufficeError, match=r"the others are lost, because no folder was given"):
        compare(memory=[limit], **options)


def test_a_limit_that_is_too_small_for_every_prompt_is_refused_before_anything_is_measured(
    folder, tmp_path, monkeypatch
):
    options = {"policies": ["h2o"], "tasks": [("text", "continuation")], "tokens": 60, "samples": 2, "model": folder}
    needed = smallest_limit(folder, tokens=60)
    compare(memory=[0.9], run=RunOptions(tmp_path), **options)
    monkeypatch.setattr("suffice.kv.eval.samples.make_example", lambda *_, **__: pytest.fail("an example was made"))
    monkeypatch.setattr("suffice.kv.eval.samples.evaluate", lambda *_, **__: pytest.fail("a cache was measured"))
    message = r"memory must be at least (.*) for the entries that always stay of a text of 60 tokens, got 0\.01"
    with pytest.raises(ValueError, match=message) as refused:
        compare(memory=[0.01, 0.9], run=RunOptions(tmp_path), **options)
    assert needed <= float(re.search(message, str(refused.value))[1]) <= 1.1 * needed
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes for the entries .*, got 500 bytes"):
        compare(memory=[500], **options)
    # The first refusal has not replaced what the folder holds, for which the model need not be loaded.
    monkeypatch.setattr("suffice.kv.eval.samples.load_cached", lambda *_: pytest.fail("the model was loaded"))
    assert len(compare(memory=[0.9], run=RunOptions(tmp_path), **options).rows()) > 0


def test_tune_refuses_a_limit_that_is_too_small_for_the_longest_prompt(folder, monkeypatch):
    monkeypatch.setattr("suffice.kv.eval.samples.evaluate", lambda *_, **__: pytest.fail("a cache was measured"))
    longest = max(tokenize_prompt(tokenizer(), p.document, p.question).input_ids.shape[1] for p in PROMPTS)
    message = rf"memory must be at least .* of a text of {longest} tokens, got 0\.001"
    with pytest.raises(ValueError, match=message):
        tune(PROMPTS, target_kl=1.0, policies=["h2o"], memory=[0.001, 0.9], model=folder)


@pytest.mark.parametrize("policy", ["h2o", "capkv-salience", "adakv"])
@pytest.mark.parametrize("repair", [False, True])
def test_limits_are_refused_exactly_where_a_prefill_refuses_them(loaded, policy, repair):
    model, _ = loaded
    config = {"policy": "h2o", "allocation": "adakv"} if policy == "adakv" else {"policy": policy}
    verdicts = set()
    for limit in (0.02, 0.05, 0.08, 0.12, 0.2, 0.5, 3000, 9000, 30_000):
        for num_tokens in (9, 40, 80):
            cache = CompressedCache(model, memory=limit, evict="prefill", repair=repair, **config)
            refused = refuses(lambda c=cache, n=num_tokens: check_limits(model, [c], n))
            ids = torch.arange(num_tokens)[None] % 300
            assert refused == refuses(lambda c=cache, i=ids: prefill(model, {"input_ids": i}, [c]))
            verdicts.add(refused)
    assert verdicts == {True, False}


def refuses(call):
    try:
        call()
    except TooLittleMemoryError:
        return True
    return False


def smallest_limit(folder, tokens):
    """Return the smallest fraction, a multiple of 0.001, that is accepted for a prompt."""
    model, _ = load_model(folder)
    caches = {limit: CompressedCache(model, "h2o", memory=limit / 1000, evict="prefill") for limit in range(1, 1000)}
    return next(n for n, c in caches.items() if not refuses(lambda c=c: check_limits(model, [c], tokens))) / 1000


def test_tune_tests_limits_from_the_largest_to_the_smallest(folder):
    options = {"policies": ["h2o"], "allocations": ["own"], "max_new_tokens": 4, "model": folder}
    found = tune(PROMPTS, target_kl=50.0, memory=[0.5, 0.9], **options)
    assert [(trial.budget, trial.memory) for trial in found.trials] == [(None, 0.9), (None, 0.5)]
    assert found.best.memory == 0.5
    assert "CompressedCache(model, policy='h2o', memory=0.5, evict=\"prefill\")" in found.code()
    assert "h2o at memory 50% meets" in found.summary()
    assert "It is the smallest memory limit that was tried." in found.summary()
    means = [trial.mean for trial in found.trials]
    strict = tune(PROMPTS, target_kl=1e-9, memory=[0.5, 0.9], **options)
    assert "No memory limit reaches" in strict.summary()
    assert [trial.mean for trial in strict.trials] == pytest.approx(means)


def test_the_limit_holds_while_an_answer_is_generated(loaded):
    model, reader = loaded
    text = make_example("text", reader, tokens=250, seed=4).document
    found, report = answer(model, reader, text, policy="h2o", memory=0.5, max_new_tokens=60)
    cache = CompressedCache(model, "h2o", memory=0.5)
    tokens = greedy_generate(model, tokenize_prompt(reader, text, None).input_ids, cache, 60)[0]
    assert found.answer == reader.decode(tokens, skip_special_tokens=True).strip()
    assert (found.budget, found.memory) == (None, 0.5)
    assert found.bits in (report.heads[0].bits, report.heads[0].bits[0])
    assert report.bytes_kept + report.bytes_index <= report.bytes_limit <= 0.5 * report.bytes_full
    with pytest.raises(ValueError, match=r"budget must be None with memory=0.5, .*, got 0.2"):
        answer(model, reader, text, budget=0.2, memory=0.5)


def test_the_harness_limits_the_bytes(loaded, monkeypatch):
    pytest.importorskip("lm_eval")
    from suffice.kv.eval.lm_eval import CompressedLM

    model, reader = loaded
    example = make_example("multikey", reader, tokens=300, seed=0)
    parts, gold = example.prompt(reader), example.answer_ids(reader)
    _, row = evaluate(model, reader, example, [CacheConfig("h2o", memory=0.5)], mode="aware", answer=False)
    own = CompressedLM(model, tokenizer=reader, policy="h2o", memory=0.5)
    ((found, _),) = own._loglikelihood_tokens([(None, parts.input_ids[0].tolist(), gold[0].tolist())])
    assert found == pytest.approx(row["log_likelihood"] * gold.shape[1], rel=1e-4)
    monkeypatch.setattr("suffice.kv.eval.lm_eval.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"budget must be None with memory=0.1, .*, got 0.5"):
        CompressedLM("x", budget=0.5, memory=0.1)
    with pytest.raises(ValueError, match=r"memory must be a fraction .*, got '2 gigs'"):
        CompressedLM("x", memory="2 gigs")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": []}, "memory must hold at least one value"),
        ({"memory": [0.1, 0.1]}, "memory must hold at least one value and no duplicates"),
        ({"memory": ["1kB", 1000]}, "memory must hold at least one value and no duplicates"),
        ({"memory": [1.5]}, "memory must be a fraction .*, got 1.5"),
        ({"memory": ["2 gigs"]}, "memory must be a fraction .*, got '2 gigs'"),
        ({"memory": 0.1}, r"memory must be a list of limits on the bytes, such as \[0.1, '2GiB'\], got 0.1"),
        ({"memory": "2GiB"}, "memory must be a list of limits on the bytes, .*, got '2GiB'"),
        ({"budgets": 0.5}, r"budgets must be a list of budgets, such as \[0.5, 0.25\], got 0.5"),
        ({"memory": [0.1], "budgets": [0.5]}, r"budgets must be None with memory=\[0.1\], .*, got \[0.5\]"),
    ],
)
def test_limits_are_checked_before_any_work(changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        compare(policies=["h2o"], model="/nowhere", **changes)
    with pytest.raises((TypeError, ValueError), match=words):
        tune(PROMPTS, target_kl=1.0, model="/nowhere", **changes)


@pytest.mark.parametrize(
    ("limit", "text"),
    [(0.1, "10%"), (0.125, "12.5%"), (1.0, "100%"), (2 << 30, "2 GiB"), (5 * 10**8, "500 MB"), (999, "999 B")],
)
def test_limits_are_formatted_without_loss(limit, text):
    assert format_memory(limit) == text
    assert parse_memory_option(text) == limit
    assert type(parse_memory_option(text)) is type(parse_memory(limit))


@pytest.mark.parametrize("text", ["90% 60kB", "90%,60kB", "90%, 60kB"])
def test_limits_are_separated_by_commas_or_spaces(text):
    assert CacheGridOptions("h2o", "own", memory=text).parsed_memory() == [0.9, 60_000]


def test_commands_accept_limits(folder, tmp_path):
    page, figure = tmp_path / "page.html", tmp_path / "curve.svg"
    arguments = ["kv", "compare", "--model", folder, "--policies", "h2o", "--tasks", "text", "--tokens", "300"]
    arguments += ["--samples", "2", "--memory", "90% 60kB", "--folder", str(tmp_path / "kept")]
    done = CliRunner().invoke(app, [*arguments, "--report", str(page), "--figure", str(figure)])
    assert done.exit_code == 0, done.output
    header = next(line for line in done.stdout.splitlines() if line.startswith("┃") and "memory" in line)
    assert [cell.strip() for cell in header.split("┃")[2:4]] == ["memory", "bytes"]
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[2].strip() for row in cells] == ["90%", "60 kB"]
    assert "60 kB of memory" in page.read_text(encoding="utf-8")
    study = tmp_path / "study.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "kept"), "--to", str(study)])
    assert done.exit_code == 0, done.output
    assert "90% of memory" in study.read_text(encoding="utf-8")

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n---\n".join(one.document for one in PROMPTS), encoding="utf-8")
    tuned = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--policies", "h2o", "--allocations", "own"]
    done = CliRunner().invoke(
        app, [*tuned, "--memory", "0.9", "--bits", "none 4", "--target-kl", "50", "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    assert "memory=0.9" in done.stdout
    assert "chosen" in done.stdout

    page = tmp_path / "answer.html"
    asked = ["kv", "generate", "--model", folder, "--prompt", PROMPTS[0].document * 2, "--policy", "h2o"]
    asked += ["--memory", "60%", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, [*asked, "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "(h2o, memory 60%)" in " ".join(done.stdout.split())
    assert "h2o, memory 60%" in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, [*asked, "--json"])
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["budget"], result["memory"]) == (None, 0.6)


@pytest.mark.parametrize("text", ["2 gigs", "0.0", "1.5", "150%", "-2GiB", "x%", "much"])
@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_commands_check_limits_before_any_work(no_model, command, text, tmp_path):
    done = CliRunner().invoke(app, [*command_with_prompt(command, tmp_path), "--memory", text])
    assert "--memory must be a fraction of the full cache (0.1, 10%), or a number of bytes" in str(done.exception)


@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_commands_refuse_a_budget_with_a_limit(no_model, command, tmp_path):
    option = "--budget" if command == "generate" else "--budgets"
    done = CliRunner().invoke(app, [*command_with_prompt(command, tmp_path), "--memory", "0.1", option, "25%"])
    assert f"only one of {option} and --memory may be given, got '25%' and '0.1'" in str(done.exception)


def test_rerotation_with_a_limit_is_refused_before_the_model_is_loaded(no_model):
    done = CliRunner().invoke(app, ["kv", "generate", "--prompt", "a", "--memory", "0.1", "--rerotate"])
    assert "--memory must not be given with --rerotate, got '0.1'" in str(done.exception)


def command_with_prompt(command, folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("one\n---\ntwo", encoding="utf-8")
    more = {"generate": ["--prompt", "a"], "compare": [], "tune": ["--prompts", str(prompts), "--target-kl", "1"]}
    return ["kv", command, *more[command]]
