"""Repaired entries in `evaluate`, `compare`, `tune`, `answer`, the commands and the harness."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from suffice import SufficeError
from suffice.cli import app
from suffice.kv import CacheConfig, CompressedCache, answer, compare, evaluate, tune
from suffice.kv.eval.cache_grid import CacheGrid, GridCache, describe_size
from suffice.kv.eval.fidelity import kl_divergence
from suffice.kv.eval.generation import fill_cache
from suffice.kv.eval.run_kinds import COMPARE, TUNE
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.kv.hf.layers import caches_latents, compressed_layers
from suffice.study.run_key import run_key
from suffice.study.store import Store
from tests.kv.families import build as build_family
from tests.kv.tiny import tokenizer

PROMPTS = [UserPrompt(f"{name} is called Otto, and {name} lives in a small house. " * 6) for name in ("A", "B", "C")]
BOTH = {"policies": ["h2o"], "repair": [False, True], "tasks": [("text", "continuation")], "tokens": 300}


def test_divergence_is_that_of_the_repaired_cache(loaded):
    model, reader = loaded
    example = make_example("multikey", reader, tokens=300, seed=2)
    configs = [CacheConfig("h2o", 0.3, bits=bits, repair=repair) for bits in (None, 4) for repair in (False, True)]
    full, *rows = evaluate(model, reader, example, configs, mode="agnostic", answer=False)
    assert [row["repair"] for row in (full, *rows)] == [False, False, True, False, True]
    prompt, gold = example.prompt(reader), example.answer_ids(reader)
    rest = torch.cat((prompt.input_ids[:, prompt.document.shape[1] :], gold), 1)

    def log_probs(cache):
        fill_cache(model, prompt.document, cache)
        with torch.no_grad():
            return model(rest, past_key_values=cache, logits_to_keep=gold.shape[1] + 1).logits[0, :-1].log_softmax(-1)

    reference = log_probs(CompressedCache(model, "full", 1.0))
    for config, row in zip(configs, rows, strict=True):
        own = log_probs(CompressedCache(model, "h2o", 0.3, bits=config.bits, repair=config.repair))
        assert row["kl"] == pytest.approx(float(kl_divergence(reference, own).mean()), abs=1e-5)
    assert rows[1]["kl"] != pytest.approx(rows[0]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        (COMPARE, {"task": "multikey", "mode": "agnostic"}, "7fbba468400377d324324f97"),
        (TUNE, {"prompts": "p.jsonl"}, "2be30704d899fa9b62ab703e"),
        (TUNE, {"prompts": "p.jsonl", "agreement": True, "optional": []}, "2be30704d899fa9b62ab703e"),
    ],
)
def test_settings_without_repair_have_the_keys_of_runs_that_were_stored_before(kind, settings, key):
    """The keys were computed by the version that had neither bits nor repair."""

    def key_with(**more):
        caches = {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.5, 40], **more}
        return run_key(kind.name, "1", kind.flatten(kind.complete({**settings, "caches": caches})), 0)

    assert key_with() == key_with(repair=[False]) == key
    assert len({key, key_with(repair=[True]), key_with(repair=[False, True])}) == 3


def test_grids_combine_repair_with_sizes_and_bits():
    grid = CacheGrid(["h2o"], ["own"], [0.5], [None, 4], repair=[False, True])
    assert grid.caches() == [
        GridCache("h2o", "own", 0.5, None),
        GridCache("h2o", "own", 0.5, None, repair=True),
        GridCache("h2o", "own", 0.5, 4),
        GridCache("h2o", "own", 0.5, 4, repair=True),
    ]
    assert grid.caches()[3].settings() == {
        "policy": "h2o", "allocation": "own", "budget": 0.5, "bits": 4, "repair": True
    }  # fmt: skip
    assert grid.caches()[3].config() == CacheConfig("h2o", 0.5, bits=4, repair=True)
    assert grid.settings()["repair"] == [False, True]
    assert "repair" not in CacheGrid(["h2o"], ["own"]).settings()
    assert describe_size(0.25, 4, None, True) == "budget 0.25, 4 bits, repair"


def test_comparison_ranks_a_policy_without_and_with_repair(folder, loaded, tmp_path):
    model, reader = loaded
    found = compare(**BOTH, budgets=[0.3], bits=[None, 4], samples=2, model=folder, run=RunOptions(tmp_path))
    assert found.methods == ["h2o", "h2o, repair"]
    assert set(found.mean_ranks()) == {"h2o", "h2o, repair"}
    example = make_example("text", reader, tokens=300, seed=1)
    configs = [CacheConfig("h2o", 0.3, bits=bits, repair=True) for bits in (None, 4)]
    rows = evaluate(model, reader, example, configs, mode="continuation")[1:]
    for row, condition in zip(rows, found.conditions, strict=True):
        values = found.group("h2o, repair", condition).values
        assert values["kl"][1] == pytest.approx(row["kl"], abs=1e-4)
    (first, second) = found.differences("h2o")
    assert (first["method"], first["bits"], second["bits"]) == ("h2o, repair", None, 4)
    assert [row["repair"] for row in found.rows() if row["metric"] == "kl"] == [False, False, True, False, True]
    plain = compare(**{**BOTH, "repair": [False]}, budgets=[0.3], samples=1, model=folder)
    assert "repair" not in plain.rows()[0]
    with Store(tmp_path, read_only=True) as store:
        assert len(list(store.records("compare"))) == 2


def test_tune_tests_the_budgets_without_and_with_repair(folder):
    options = {"policies": ["h2o"], "budgets": [0.9, 0.5], "max_new_tokens": 4, "model": folder}
    found = tune(PROMPTS, target_kl=50.0, repair=[False, True], **options)
    assert [(trial.repair, trial.budget) for trial in found.trials] == [
        (r, b) for r in (False, True) for b in (0.9, 0.5)
    ]
    alone = tune(PROMPTS, target_kl=50.0, repair=[True], **options)
    assert "policy='h2o', budget=0.5, repair=True)" in alone.code()
    assert "h2o at budget 0.5, repair meets" in alone.summary()
    assert alone.to_dict()["recommended"]["repair"] is True
    for one, other in zip(alone.trials, found.trials[2:], strict=True):
        assert one.mean == pytest.approx(other.mean)
        assert one.bound < other.bound  # two arms share the error rate


def test_answers_say_whether_entries_were_repaired(loaded):
    model, reader = loaded
    text = make_example("text", reader, tokens=250, seed=4).document
    found, _ = answer(model, reader, text, policy="h2o", budget=0.5, repair=True, max_new_tokens=4)
    assert found.repair
    assert found.to_dict()["repair"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repair": [True], "policies": ["full"]}, "repair must be False with policy 'full', which keeps all entries"),
        ({"repair": [False, True], "policies": ["h2o", "full"]}, "repair must be False with policy 'full'"),
        (
            {"repair": [True], "allocations": ["marginal"]},
            "repair must be False with allocation .*, which drops",
        ),
        ({"repair": []}, "repair must hold at least one value"),
        ({"repair": [True, True]}, "repair must hold at least one value and no duplicates"),
        ({"repair": True}, r"repair must be a list of booleans, such as \[False, True\], got True"),
        ({"repair": "yes"}, r"repair must be a list of booleans, .*, got 'yes'"),
        ({"repair": [1]}, r"repair must hold True, False or both, got \[1\]"),
    ],
)
def test_repair_is_checked_before_any_work(changes, words):
    options = {"policies": ["h2o"], "model": "/nowhere", **changes}
    with pytest.raises((TypeError, ValueError), match=words):
        compare(**options)
    with pytest.raises((TypeError, ValueError), match=words):
        tune(PROMPTS, target_kl=1.0, **options)


@pytest.mark.parametrize(("family", "words"), [("mistral", "have a sliding window"), ("deepseek_v3", "cached latents")])
def test_models_without_repair_are_reported_before_the_model_answers(family, words, tmp_path, monkeypatch):
    model = build_family(family)
    if family == "deepseek_v3" and not any(map(caches_latents, compressed_layers(model).values())):
        pytest.skip("early versions cache the keys of all heads")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("suffice.kv.eval.samples.answer_with_full_cache", lambda *_: pytest.fail("the model answered"))
    with pytest.raises(SufficeError, match=f"repair must be False for .*{words}"):
        tune(PROMPTS, target_kl=1.0, policies=["h2o"], repair=[True], model=str(tmp_path / "model"))


def test_a_prompt_that_is_too_short_is_named(folder):
    options = {"policies": ["h2o"], "budgets": [0.2], "repair": [True], "max_new_tokens": 4, "model": folder}
    with pytest.raises(
        SufficeError, match=r"prompt 1: input must have at least 8 tokens .* repair=True.*got 2 in row 0"
    ):
        tune([PROMPTS[0], "a b c"], target_kl=1.0, **options)


def test_the_harness_repairs_the_prompt(loaded, monkeypatch):
    pytest.importorskip("lm_eval")
    from suffice.kv.eval.lm_eval import CompressedLM

    model, reader = loaded
    example = make_example("multikey", reader, tokens=300, seed=0)
    parts, gold = example.prompt(reader), example.answer_ids(reader)
    config = CacheConfig("h2o", 0.3, repair=True)
    _, row = evaluate(model, reader, example, [config], mode="aware", answer=False)
    own = CompressedLM(model, tokenizer=reader, policy="h2o", budget=0.3, repair=True)
    ((found, _),) = own._loglikelihood_tokens([(None, parts.input_ids[0].tolist(), gold[0].tolist())])
    assert found == pytest.approx(row["log_likelihood"] * gold.shape[1], rel=1e-4)
    with pytest.raises(ValueError, match=r"context of request 1: input must have at least 8 tokens .*, got 6 in row 0"):
        own._loglikelihood_tokens([(None, list(range(5, 30)), [5]), (None, list(range(5, 12)), [5])])
    monkeypatch.setattr("suffice.kv.eval.lm_eval.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="repair must be False with policy 'full'"):
        CompressedLM("x", policy="full", budget=1.0, repair=True)
    with pytest.raises(TypeError, match="repair must be True or False, got 'maybe'"):
        CompressedLM("x", repair="maybe")


def test_commands_accept_repair(folder, tmp_path):
    page, table = tmp_path / "page.html", tmp_path / "rows.parquet"
    arguments = ["kv", "compare", "--model", folder, "--policies", "h2o", "--budgets", "50%", "--tasks", "text"]
    arguments += ["--tokens", "300", "--samples", "2", "--repair", "--folder", str(tmp_path / "kept")]
    done = CliRunner().invoke(app, [*arguments, "--report", str(page), "--parquet", str(table)])
    assert done.exit_code == 0, done.output
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert {row[1].strip() for row in cells} == {"h2o", "h2o, repair"}
    assert "h2o, repair" in page.read_text(encoding="utf-8")
    pandas = pytest.importorskip("pandas")
    assert set(pandas.read_parquet(table)["repair"]) == {False, True}
    study = tmp_path / "study.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "kept"), "--to", str(study)])
    assert done.exit_code == 0, done.output
    assert "h2o, repair" in study.read_text(encoding="utf-8")

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n---\n".join(one.document for one in PROMPTS), encoding="utf-8")
    tuned = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--policies", "h2o", "--budgets", "90%"]
    done = CliRunner().invoke(app, [*tuned, "--repair", "--target-kl", "50", "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert "budget=0.9)" in done.stdout
    assert any(line.split("┃")[4].strip() == "repair" for line in done.stdout.splitlines() if line.startswith("┃"))
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[4].strip() for row in rows] == ["no", "yes"]

    page = tmp_path / "answer.html"
    asked = ["kv", "generate", "--model", folder, "--prompt", PROMPTS[0].document * 2, "--policy", "h2o", "--bits", "4"]
    asked += ["--repair", "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, [*asked, "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "(h2o, budget 25%, 4 bits, repair)" in " ".join(done.stdout.split())
    assert "h2o, budget 0.25, 4 bits, repair" in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert json.loads(done.stdout.strip().splitlines()[-1])["repair"] is True


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_commands_check_repair_before_any_work(monkeypatch, command, tmp_path):
    monkeypatch.setattr("suffice.kv.hf.loading.ModelSource.load", lambda *_: pytest.fail("the model was loaded"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n---\ntwo", encoding="utf-8")
    more = {"compare": [], "tune": ["--prompts", str(prompts), "--target-kl", "1"]}
    done = CliRunner().invoke(app, ["kv", command, *more[command], "--policies", "full", "--repair"])
    assert "repair must be False with policy 'full'" in str(done.exception)
