"""`compare` and `tune` on a tiny model in a folder: results, statistics, resuming, commands and rejected arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from scipy.stats import t as student
from typer.testing import CliRunner

from suffice import SufficeError
from suffice.cli import app
from suffice.kv import load_model
from suffice.kv.eval.cache_grid import CacheGrid
from suffice.kv.eval.compare import Comparison, compare, spearman
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.tune import tune
from suffice.kv.eval.user_prompts import UserPrompt, read_user_prompts, write_user_prompts
from suffice.kv.hf.loading import ModelSource
from suffice.study.results import Group

PROMPTS = [
    UserPrompt("The parrot is called Otto and the cat is called Mia. " * 3, "What is the cat called?"),
    UserPrompt("Water boils sooner on a mountain, since the air is thinner. " * 3, "Where does it boil sooner?"),
    UserPrompt("Anna was born in Vienna, Peter in Linz; both moved to Graz. " * 3, "Where was Anna born?"),
]


def small_comparison(model, **more):
    tasks = (("text", "continuation"), ("multikey", "agnostic"))
    return compare(
        **{
            "policies": ["capkv", "h2o"],
            "allocations": ["own", "adakv"],
            "budgets": [0.5, 40],
            "tasks": tasks,
            "tokens": 300,
            "samples": 2,
            "model": model,
            **more,
        }
    )


def test_comparison_equals_evaluate_on_each_sample(folder, tmp_path):
    found = small_comparison(folder, run=RunOptions(tmp_path))
    assert found.methods == ["capkv", "capkv/adakv", "h2o", "h2o/adakv"]
    assert found.conditions == [
        (t, m, b, None, None) for t, m in (("text", "continuation"), ("multikey", "agnostic")) for b in (0.5, 40)
    ]
    network, reader = load_model(folder)
    for seed in (0, 1):
        example = make_example("multikey", reader, tokens=300, seed=seed)
        configs = [CacheConfig("h2o", 0.5), CacheConfig("capkv", 40, "adakv")]
        rows = evaluate(network, reader, example, configs, mode="agnostic", measure_capacity=True)
        for row, name, budget in ((rows[1], "h2o", 0.5), (rows[2], "capkv/adakv", 40)):
            own = found.group(name, ("multikey", "agnostic", budget))
            for metric in ("kl", "score", "bytes_kept", "capacity_retained"):
                assert own.values[metric][seed] == pytest.approx(row[metric], abs=1e-4)
    again = small_comparison(ModelSource(folder), run=RunOptions(tmp_path))
    assert again.rows() == found.rows()
    assert found.to_dict()["mean_rank"] == found.mean_ranks()


def test_finished_samples_are_not_measured_again(folder, tmp_path, monkeypatch):
    small_comparison(folder, run=RunOptions(tmp_path), samples=1)
    monkeypatch.setattr("suffice.kv.eval.samples.evaluate", lambda *_, **__: pytest.fail("measured again"))
    small_comparison(folder, run=RunOptions(tmp_path), samples=1)


def make_group(policy, mode, budget, values, **more):
    settings = {"task": "multikey", "mode": mode, "policy": policy, "allocation": "own", "budget": budget}
    return Group(settings, {"kl": dict(enumerate(values)), **{k: dict(enumerate(v)) for k, v in more.items()}})


def test_mean_ranks_losses_and_capacity_correlations():
    groups = [
        make_group("a", "aware", 0.5, [0.1, 0.2, 0.3], capacity_retained=[0.9] * 3),
        make_group("b", "aware", 0.5, [0.3, 0.4, 0.5], capacity_retained=[0.8] * 3),
        make_group("c", "aware", 0.5, [0.6, 0.5, 0.9], capacity_retained=[0.7] * 3),
        make_group("a", "agnostic", 0.5, [0.5, 0.6, 0.7]),
        make_group("b", "agnostic", 0.5, [0.4, 0.5, 0.61]),
        make_group("c", "agnostic", 0.5, [1.0, 2.0, 3.0]),
        make_group("full", "aware", 1.0, [0.0] * 3),
    ]
    found = Comparison({}, groups)
    assert found.mean_ranks() == {"a": 1.5, "b": 1.5, "c": 3.0}
    tied = [make_group(policy, "aware", 0.5, [kl]) for policy, kl in (("a", 5.0), ("b", 1.0), ("c", 5.0))]
    assert Comparison({}, tied).mean_ranks() == {"b": 1.0, "a": 2.5, "c": 2.5}
    (loss,) = found.closer_methods("a")
    assert (loss["method"], loss["mode"]) == ("b", "agnostic")
    half = student.ppf(0.975, 2) * (1 / 3e4) ** 0.5 / 3**0.5
    assert loss["mean"] == pytest.approx(-0.29 / 3)
    assert loss["high"] - loss["mean"] == pytest.approx(half, rel=1e-3)
    (rho,) = found.capacity_correlations()
    assert rho["spearman"] == pytest.approx(-1)


def test_rank_correlation_equals_scipys():
    one, other = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 4.0, 4.0, 2.0, 0.0]
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0


def test_tune_finds_the_smallest_safe_budget(folder, tmp_path):
    options = {"policies": ["capkv", "h2o"], "allocations": ["own"], "budgets": [0.3, 1.0, 0.7], "model": folder}
    found = tune(PROMPTS, target_kl=5.0, max_new_tokens=4, run=RunOptions(tmp_path), **options)
    assert [trial.budget for trial in found.trials] == [1.0, 0.7, 0.3] * 2
    assert found.best.budget == 0.3
    assert found.next_smaller is None
    assert f"policy='{found.best.policy}', budget=0.3)" in found.code()
    assert "smallest budget that was tried" in found.summary()
    # Another target reads the same finished runs.
    tight = max(trial.bound for trial in found.trials if trial.budget == 1.0) + 1e-5
    strict = tune(PROMPTS, target_kl=tight, max_new_tokens=4, run=RunOptions(tmp_path), **options)
    assert strict.best.budget == 1.0
    assert strict.next_smaller.budget == 0.7
    assert "Budget 0.7 is not safe" in strict.summary()
    for trial in strict.trials:
        if trial.budget == 0.7:
            assert not trial.safe


def test_budgets_of_numpy_are_plain_numbers():
    grid = CacheGrid(["h2o"], ["own"], np.linspace(0.25, 0.75, 3))
    grid.check()
    caches = [cache[:3] for cache in grid.caches()]
    assert json.dumps(caches) == '[["h2o", "own", 0.25], ["h2o", "own", 0.5], ["h2o", "own", 0.75]]'
    assert json.dumps(CacheGrid(["h2o"], ["own"], [np.int64(40)]).budgets) == "[40]"


def test_bounds_have_bonferronis_correction(folder, tmp_path):
    options = {"policies": ["capkv", "h2o"], "allocations": ["own"], "budgets": [0.4], "model": folder}
    found = tune(PROMPTS, target_agreement=0.9, confidence=0.9, max_new_tokens=6, run=RunOptions(tmp_path), **options)
    for trial in found.trials:
        assert 0 <= trial.within <= 1
        assert trial.bound <= trial.mean
    kl = tune(PROMPTS, target_kl=0.1, confidence=0.9, max_new_tokens=6, run=RunOptions(tmp_path), **options)
    options["policies"] = ["h2o"]
    one = tune(PROMPTS, target_kl=0.1, confidence=0.95, max_new_tokens=6, run=RunOptions(tmp_path), **options)
    own = next(trial for trial in kl.trials if trial.policy == "h2o")
    assert one.trials[0].bound == pytest.approx(own.bound, rel=1e-3)


def test_a_target_that_no_budget_reaches_is_reported(folder):
    found = tune(PROMPTS, target_kl=1e-9, policies=["knorm"], allocations=["own"], budgets=[0.3], model=folder)
    assert found.best is None
    assert not found.code()
    assert "No budget reaches mean KL ≤ 1e-09" in found.summary()
    assert "Closest: knorm at budget 0.3" in found.summary()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_kl": None}, "exactly one"),
        ({"target_agreement": 0.9}, "exactly one"),
        ({"target_kl": 0.0}, "target_kl must be above 0 nats per token, got 0.0"),
        ({"target_kl": None, "target_agreement": 1.5}, "target_agreement must be above 0 and at most 1, got 1.5"),
        ({"confidence": 0.3}, "confidence must be above 0.5 and below 1, got 0.3"),
        ({"mode": "both"}, "mode must be one of aware, agnostic, got 'both'"),
        ({"budgets": []}, "budgets must hold at least one value"),
        ({"budgets": [2.0]}, "budget must be .*, got 2.0"),
        ({"policies": ["h3o"]}, "Did you mean 'h2o'"),
        ({"allocations": ["profil"]}, "Did you mean 'profile'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_tune_rejects_invalid_arguments_before_any_work(changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        tune(PROMPTS, **{"target_kl": 0.1, "model": "/nowhere", **changes})


def test_tune_rejects_a_single_prompt_and_missing_questions():
    with pytest.raises(ValueError, match=r"prompts must hold at least 2, .*, got 1"):
        tune(PROMPTS[:1], target_kl=0.1)
    with pytest.raises(ValueError, match="prompt 1 has no question"):
        tune([PROMPTS[0], "only text"], target_kl=0.1, mode="agnostic")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"tasks": ()}, "tasks must hold at least one"),
        ({"tasks": (("needle", "aware"),)}, "task must be one of .*, got 'needle'"),
        ({"tasks": (("text", "aware"),)}, "mode must be one of continuation for task 'text', got 'aware'"),
        ({"policies": ["capkv", "capkv"]}, "no duplicates"),
        ({"haystack": "/nowhere.txt"}, "haystack must be a text file, got '/nowhere.txt'"),
        (
            {"haystack": __file__, "tasks": (("qa", "aware"),)},
            "haystack must be None for task 'qa', .* with a haystack: text,",
        ),
        ({"haystack": "/dev/null"}, "haystack must contain at least one word, got '/dev/null', which is empty"),
        ({"greedy_tokens": -1}, "greedy_tokens must be at least 0, got -1"),
    ],
)
def test_compare_rejects_invalid_arguments_before_any_work(changes, words):
    with pytest.raises(ValueError, match=words):
        small_comparison("/nowhere", **changes)


def test_a_prompt_longer_than_the_window_fails_alone(folder, tmp_path):
    long = UserPrompt("many words " * 900)
    options = {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.5], "max_new_tokens": 4, "model": folder}
    with pytest.raises(SufficeError, match=r"1 of 3 samples are not done.*must have at most 1024 tokens"):
        tune([*PROMPTS[:2], long], target_kl=1.0, run=RunOptions(tmp_path), **options)


def test_prompts_are_read_from_json_lines_and_from_plain_text(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('"plain"\n\n{"prompt": "d", "question": "q"}\n{"document": "e"}\n', encoding="utf-8")
    assert read_user_prompts(lines) == [UserPrompt("plain"), UserPrompt("d", "q"), UserPrompt("e")]
    parts = tmp_path / "p.txt"
    parts.write_text("one\ntwo\n-----\n\nthree\n---\n", encoding="utf-8")
    assert read_user_prompts(parts) == [UserPrompt("one\ntwo"), UserPrompt("three")]
    for content in ("", "{", "7", '{"prompt": ""}', '{"prompt": "x", "question": 3}'):
        lines.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="prompts"):
            read_user_prompts(lines)
    with pytest.raises(ValueError, match="cannot be read"):
        read_user_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
def test_json_prompts_are_read_as_they_were_written(tmp_path, suffix, encoding, layout):
    """Against `json`: characters that `splitlines` splits at, a byte-order mark, Windows line ends."""
    prompts = [UserPrompt("a\u2028b\x85c\x0bd\x1ee\nf", "q\u2029?"), UserPrompt("g\x0c"), UserPrompt("ä 😀 []")]
    items = [{"prompt": one.document, "question": one.question} for one in prompts]
    file = tmp_path / f"p{suffix}"
    if layout == "lines":
        text = "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    else:
        text = json.dumps(items, ensure_ascii=False, indent=2 if layout == "pretty" else None)
    file.write_text(text, encoding=encoding, newline="")
    assert read_user_prompts(file) == prompts
    write_user_prompts(prompts, file)
    assert read_user_prompts(file) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "qestion": "b"}',
            "keys in line 1 of prompts '.*' must be among prompt, document, question, got 'qestion'. "
            r"Did you mean 'question'\?",
        ),
        ('["a", {"text": "b"}]', "keys in item 2 of prompts '.*' must be among .*, got 'text'"),
        ('{"prompt": "a", "document": "b"}', 'must have one of "prompt" and "document", got both'),
        ('"a"\n{"prompt": "a", "prompt": "b"}', "line 2 of prompts .*key 'prompt' is repeated"),
        (
            '{"prompt": "a", "question": ""}',
            '"question" in line 1 .* must contain text, or be null or left out, got ""',
        ),
        ('["a", 7]', 'item 2 of prompts .* must be a JSON string, or an object with "prompt" .*, got 7'),
        ('["a", ', "prompts '.*' must be a JSON array of prompts, got .* \\(Expecting value"),
        ("[]", "prompts must be a file with at least one prompt, got '.*', which holds none"),
    ],
)
def test_json_that_is_not_a_prompt_is_rejected(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_user_prompts(file)


def test_prompts_hold_text():
    with pytest.raises(ValueError, match="document must contain text, got ' '"):
        UserPrompt(" ")
    with pytest.raises(ValueError, match="question must contain text, or be None, got ''"):
        UserPrompt("a", "")


def test_plain_text_prompts_have_no_byte_order_mark(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n---\ntwo", encoding="utf-8-sig")
    assert read_user_prompts(file) == [UserPrompt("one"), UserPrompt("two")]


def test_commands_print_json_and_write_pages(folder, tmp_path):
    page, figure, table = tmp_path / "page.html", tmp_path / "curve.svg", tmp_path / "rows.parquet"
    arguments = [
        "--model",
        folder,
        "--policies",
        "capkv,h2o,knorm",
        "--budgets",
        "50%,30%",
        "--tasks",
        "multikey:aware",
    ]
    arguments += ["--tokens", "300", "--samples", "2", "--folder", str(tmp_path / "kept")]
    done = CliRunner().invoke(
        app,
        [
            "kv",
            "compare",
            *arguments,
            "--json",
            "--report",
            str(page),
            "--figure",
            str(figure),
            "--parquet",
            str(table),
        ],
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"settings", "rows", "mean_rank", "closer_methods", "capacity"} <= set(facts)
    assert len(facts["mean_rank"]) == 3
    assert "Paired differences" in page.read_text(encoding="utf-8")
    assert "<svg" in figure.read_text(encoding="utf-8")
    assert table.stat().st_size
    study = tmp_path / "study.html"
    told = CliRunner().invoke(app, ["report", str(tmp_path / "kept"), "--to", str(study)])
    assert told.exit_code == 0, told.output
    assert "Fidelity against bytes: multikey, aware" in study.read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["kv", "compare", *arguments, "--quiet"])
    assert "Best mean rank" in shown.stdout
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n---\n".join(one.document for one in PROMPTS), encoding="utf-8")
    tuned = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--max-new-tokens", "4", "--policies", "h2o"]
    tuned += ["--allocations", "own", "--budgets", "90%,50%", "--folder", str(tmp_path / "kept")]
    done = CliRunner().invoke(app, [*tuned, "--target-kl", "9"])
    assert done.exit_code == 0, done.output
    assert "cache = CompressedCache(model, policy='h2o', budget=0.5)" in done.stdout
    done = CliRunner().invoke(app, [*tuned, "--target-kl", "1e-9", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.strip().splitlines()[-1])["recommended"] is None


def test_an_allocation_that_equals_the_policys_own_is_measured_once():
    policies = ["capkv-profile", "pyramidkv", "capkv"]
    assert [cache[:3] for cache in CacheGrid(policies, ["own", "profile"], [0.5]).caches()] == [
        ("capkv-profile", "own", 0.5),
        ("pyramidkv", "own", 0.5),
        ("pyramidkv", "profile", 0.5),
        ("capkv", "own", 0.5),
        ("capkv", "profile", 0.5),
    ]
    assert len(CacheGrid(policies, ["profile"], [0.5]).caches()) == 3
