"""Quantized entries in `evaluate`, `compare`, `tune`, `answer` and the commands."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from suffice.cli import app
from suffice.kv import CacheConfig, CompressedCache, answer, compare, evaluate, prefill, tune
from suffice.kv.eval.cache_grid import CacheGrid, GridCache
from suffice.kv.eval.compare import Condition
from suffice.kv.eval.fidelity import kl_divergence
from suffice.kv.eval.generation import fill_cache, greedy_generate
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.run_kinds import COMPARE, TUNE
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.kv.storage.quantization import format_bits, shortest_bits
from suffice.study.results import group_records, skewed_mean_bound
from suffice.study.run_key import run_key
from suffice.study.store import Store

BITS = [None, 8, (4, 2)]
PROMPTS = [UserPrompt(f"{name} is called Otto, and {name} lives in a small house. " * 6) for name in ("A", "B", "C")]


def assert_equal_caches(first, second):
    for one, other in zip(first.compressed_layers, second.compressed_layers, strict=True):
        tensors, others = one.storage.state_dict(), other.storage.state_dict()
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("policy", ["h2o", "capkv", "streaming-llm"])
def test_a_shared_prefill_stores_the_same_integers_as_a_prefill_of_one_cache(loaded, policy):
    model, reader = loaded
    example = make_example("text", reader, tokens=200, seed=1)
    ids = example.prompt(reader).input_ids
    caches = [CompressedCache(model, policy, 0.5, bits=bits) for bits in BITS]
    prefill(model, {"input_ids": ids}, caches, share_statistics=True)
    for cache, bits in zip(caches, BITS, strict=True):
        alone = CompressedCache(model, policy, 0.5, bits=bits)
        fill_cache(model, ids, alone)
        assert_equal_caches(cache, alone)
    assert caches[1].report().bytes_kept < caches[0].report().bytes_kept


def test_divergence_and_bytes_are_those_of_the_quantized_cache(loaded):
    model, reader = loaded
    example = make_example("multikey", reader, tokens=300, seed=2)
    configs = [CacheConfig("h2o", 0.5, bits=bits) for bits in BITS]
    _, *rows = evaluate(model, reader, example, configs, mode="agnostic", answer=False)
    assert [row["bits"] for row in rows] == BITS
    prompt, gold = example.prompt(reader), example.answer_ids(reader)
    rest = torch.cat((prompt.input_ids[:, prompt.document.shape[1] :], gold), 1)
    log_probs = []
    for cache in [CompressedCache(model, "full", 1.0), *(CompressedCache(model, "h2o", 0.5, bits=b) for b in BITS)]:
        fill_cache(model, prompt.document, cache)
        report = cache.report()
        with torch.no_grad():
            logits = model(rest, past_key_values=cache, logits_to_keep=gold.shape[1] + 1).logits[0, :-1]
        log_probs.append(logits.log_softmax(-1))
        if len(log_probs) > 1:
            row = rows[len(log_probs) - 2]
            assert row["kl"] == pytest.approx(float(kl_divergence(log_probs[0], log_probs[-1]).mean()), abs=1e-5)
            assert row["bytes_kept"] == report.bytes_kept
    assert rows[1]["kl"] == pytest.approx(rows[0]["kl"], rel=0.1)
    assert rows[2]["kl"] != pytest.approx(rows[0]["kl"], rel=0.01)
    assert rows[2]["bytes_kept"] < rows[1]["bytes_kept"] < rows[0]["bytes_kept"]


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        (COMPARE, {"task": "multikey", "mode": "agnostic"}, "7fbba468400377d324324f97"),
        (TUNE, {"prompts": "p.jsonl"}, "2be30704d899fa9b62ab703e"),
    ],
)
def test_settings_without_bits_have_the_keys_of_runs_that_were_stored_before(kind, settings, key):
    """The keys were computed by the version that had no bits."""

    def key_with(**more):
        caches = {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.5, 40], **more}
        return run_key(kind.name, "1", kind.flatten(kind.complete({**settings, "caches": caches})), 0)

    assert key_with() == key_with(bits=[None]) == key
    assert key_with(bits=[4]) == key_with(bits=[[4, 4]]) != key
    assert key_with(bits=[None, 4]) not in (key, key_with(bits=[4]))


def test_only_quantized_caches_have_the_setting_bits():
    assert GridCache("h2o", "own", 0.5).settings() == {"policy": "h2o", "allocation": "own", "budget": 0.5}
    assert GridCache("h2o", "own", 0.5, 4).settings()["bits"] == 4


def test_comparison_of_bits_equals_evaluate(folder, loaded, tmp_path):
    model, reader = loaded
    options = {"policies": ["h2o", "knorm"], "budgets": [0.5], "tasks": [("multikey", "agnostic")], "tokens": 300}
    found = compare(**options, bits=BITS, samples=2, model=folder, run=RunOptions(tmp_path))
    assert found.methods == ["h2o", "knorm"]
    assert found.conditions == [Condition("multikey", "agnostic", 0.5, bits) for bits in BITS]
    for seed in (0, 1):
        example = make_example("multikey", reader, tokens=300, seed=seed)
        configs = [CacheConfig("knorm", 0.5, bits=bits) for bits in BITS]
        rows = evaluate(model, reader, example, configs, mode="agnostic")[1:]
        for row, condition in zip(rows, found.conditions, strict=True):
            group = found.group("knorm", condition)
            assert group.values["kl"][seed] == pytest.approx(row["kl"], abs=1e-4)
            assert group.values["bytes_kept"][seed] == row["bytes_kept"]
    values = found.group("knorm", ("multikey", "agnostic", 0.5)).values
    assert values == found.group("knorm", found.conditions[0]).values
    share = sum(values["bytes"].values()) / sum(values["bytes_full"].values())
    assert found.share_of_bytes("knorm", found.conditions[0]) == pytest.approx(share)
    assert {format_bits(row["bits"]) for row in found.rows()} == {"none", "8", "4,2"}
    assert {format_bits(row["bits"]) for row in found.differences("h2o")} == {"none", "8", "4,2"}
    # Stored samples are read again, as pairs from JSON too.
    again = compare(**options, bits=[None, (8, 8), [4, 2]], samples=2, model=folder, run=RunOptions(tmp_path))
    assert again.rows() == found.rows()
    with Store(tmp_path, read_only=True) as store:
        settings = [row["settings"] for record in store.records("compare") for row in record.result["rows"]]
    assert settings[1:3] == [
        {"policy": "h2o", "allocation": "own", "budget": 0.5},
        {"policy": "h2o", "allocation": "own", "budget": 0.5, "bits": 8},
    ]


def test_comparison_without_bits_has_no_column_for_them(folder):
    found = compare(policies=["h2o"], budgets=[0.5], tasks=[("text", "continuation")], samples=1, model=folder)
    assert "bits" not in found.rows()[0]
    assert found.settings["caches"] == {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.5]}


def test_tune_tests_the_budgets_of_each_number_of_bits(folder, tmp_path):
    options = {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.9, 0.5], "max_new_tokens": 4}
    found = tune(PROMPTS, target_kl=50.0, bits=[None, 8, (4, 2)], model=folder, **options)
    expected = [(bits, budget) for bits in (None, 8, (4, 2)) for budget in (0.9, 0.5)]
    assert [(trial.bits, trial.budget) for trial in found.trials] == expected
    best = found.best
    assert (best.bits, best.budget) == ((4, 2), 0.5)
    assert best.bytes_kept == min(trial.bytes_kept for trial in found.trials)
    assert "policy='h2o', budget=0.5, bits=(4, 2))" in found.code()
    assert "h2o at budget 0.5, 4,2 bits meets" in found.summary()
    assert found.to_dict()["recommended"]["bits"] == (4, 2)
    # Three arms share the error rate.
    alone = tune(PROMPTS, target_kl=50.0, bits=[8], model=folder, run=RunOptions(tmp_path), **options)
    assert "bits=8)" in alone.code()
    with Store(tmp_path, read_only=True) as store:
        _, *groups = group_records(store.records(store.study_name()))
    for one, other, group in zip(alone.trials, found.trials[2:4], groups, strict=True):
        values = list(group.values["kl"].values())
        assert one.mean == pytest.approx(other.mean)
        assert one.bound == pytest.approx(skewed_mean_bound(values, confidence=0.95))
        assert other.bound == pytest.approx(skewed_mean_bound(values, confidence=1 - 0.05 / 3), rel=1e-3)


def test_answers_are_generated_from_the_quantized_cache(loaded):
    model, reader = loaded
    text = make_example("text", reader, tokens=250, seed=4).document
    found, report = answer(model, reader, text, policy="h2o", budget=0.5, bits=(8, 4), max_new_tokens=8)
    cache = CompressedCache(model, "h2o", 0.5, bits=(8, 4))
    tokens = greedy_generate(model, tokenize_prompt(reader, text, None).input_ids, cache, 8)[0]
    assert found.answer == reader.decode(tokens, skip_special_tokens=True).strip()
    assert (found.bits, found.bytes_kept) == ((8, 4), cache.report().bytes_kept)
    assert {head.bits for head in report.heads} == {(8, 4)}
    with pytest.raises(ValueError, match="bits must be None with rerotate=True, got 4"):
        answer(model, reader, text, bits=4, rerotate=True)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ([], "bits must hold at least one value"),
        ([4, 4], "bits must hold at least one value and no duplicates"),
        ([4, (4, 4)], "bits must hold at least one value and no duplicates"),
        ([6], "bits must be 2, 3, 4, 5 or 8, got 6"),
        ([(4, 2, 3)], r"bits must be a number of bits, a pair .* or None, got \(4, 2, 3\)"),
        (4, r"bits must be a list of numbers of bits, such as \[None, 4, \(4, 2\)\], got 4"),
        ("4", r"bits must be a list of numbers of bits, .*, got '4'"),
        ((5, 4), r"bits must be a list, got the tuple \(5, 4\)\. Write \[\(5, 4\)\] for one pair"),
    ],
)
def test_bits_are_checked_before_any_work(bits, words):
    with pytest.raises((TypeError, ValueError), match=words):
        compare(policies=["h2o"], bits=bits, model="/nowhere")
    with pytest.raises((TypeError, ValueError), match=words):
        tune(PROMPTS, target_kl=1.0, bits=bits, model="/nowhere")


def test_bits_have_one_form():
    assert [shortest_bits(bits) for bits in (None, 4, (4, 4), [4, 2])] == [None, 4, 4, (4, 2)]
    grid = CacheGrid(["h2o"], ["own"], [0.5], [None, [3, 3]])
    assert grid.caches() == [GridCache("h2o", "own", 0.5), GridCache("h2o", "own", 0.5, 3)]
    assert grid.settings()["bits"] == [None, 3]


def test_commands_accept_bits(folder, tmp_path):
    page, figure, table = tmp_path / "page.html", tmp_path / "curve.svg", tmp_path / "rows.parquet"
    arguments = ["kv", "compare", "--model", folder, "--policies", "h2o", "--budgets", "50%", "--tasks", "text"]
    arguments += ["--tokens", "300", "--samples", "2", "--bits", "none 4,2", "--folder", str(tmp_path / "kept")]
    outputs = ["--report", str(page), "--figure", str(figure), "--parquet", str(table)]
    done = CliRunner().invoke(app, [*arguments, *outputs])
    assert done.exit_code == 0, done.output
    header = next(line for line in done.stdout.splitlines() if line.startswith("┃") and "budget" in line)
    assert header.split("┃")[3:5] == [" bits ", " bytes "]
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [(row[2].strip(), row[3].strip()) for row in cells] == [("50%", "none"), ("50%", "4,2")]
    shares = [float(row[4].strip().rstrip("%")) for row in cells]
    # The key and the value of an entry take 96 bytes, and its position takes 4.
    assert shares[1] < shares[0] == pytest.approx(50 * 100 / 96, abs=0.5)
    assert "50%, 4,2 bits" in page.read_text(encoding="utf-8")
    assert "Bytes kept" in page.read_text(encoding="utf-8")
    assert "4,2 bits" in figure.read_text(encoding="utf-8")
    pandas = pytest.importorskip("pandas")
    assert set(pandas.read_parquet(table)["bits"]) == {"none", "4,2"}
    study = tmp_path / "study.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "kept"), "--to", str(study)])
    assert done.exit_code == 0, done.output
    assert "50%, 4,2 bits" in study.read_text(encoding="utf-8")

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n---\n".join(one.document for one in PROMPTS), encoding="utf-8")
    tuned = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--policies", "h2o", "--allocations", "own"]
    tuned += ["--budgets", "90%", "--bits", "none 4", "--target-kl", "50", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, tuned)
    assert done.exit_code == 0, done.output
    assert "budget=0.9, bits=4)" in done.stdout

    page = tmp_path / "answer.html"
    asked = ["kv", "generate", "--model", folder, "--prompt", PROMPTS[0].document * 2, "--policy", "h2o", "--bits", "4"]
    asked += ["--max-new-tokens", "4"]
    done = CliRunner().invoke(app, [*asked, "--layers", "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "(h2o, budget 25%, 4 bits)" in " ".join(done.stdout.split())
    assert "│    4 │" in done.stdout
    for words in ("h2o, budget 0.25, 4 bits", "Bytes kept by layer", "key error"):
        assert words in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, [*asked, "--bits", "4,2", "--json"])
    assert json.loads(done.stdout.strip().splitlines()[-1])["bits"] == [4, 2]


@pytest.mark.parametrize("text", ["6", "4,2,3", "4.0", "four", "", "4;2"])
@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_commands_check_bits_before_any_work(monkeypatch, command, text, tmp_path):
    def work(*_, **__):
        raise AssertionError("the command began to work")

    monkeypatch.setattr("suffice.kv.hf.loading.ModelSource.load", work)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n---\ntwo", encoding="utf-8")
    more = {"generate": ["--prompt", "a"], "compare": [], "tune": ["--prompts", str(prompts), "--target-kl", "1"]}
    done = CliRunner().invoke(app, ["kv", command, *more[command], "--bits", text])
    message = str(done.exception)
    if not text and command != "generate":
        assert "bits must hold at least one value" in message
    else:
        assert "--bits must be none, 2, 3, 4, 5 or 8, or two of these numbers" in message
        assert message.endswith(f"got {text!r}")


def test_bits_with_rerotation_are_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("suffice.kv.hf.loading.ModelSource.load", lambda *_: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(app, ["kv", "generate", "--prompt", "a", "--bits", "4", "--rerotate"])
    assert "--bits must be none with --rerotate, got '4'" in str(done.exception)
