"""Comparisons and tuning, on a tiny model from a folder: the same numbers as by hand, kept, and said in words."""

from __future__ import annotations

import json

import pytest
from scipy.stats import spearmanr
from scipy.stats import t as student
from typer.testing import CliRunner

from suffice import SufficeError
from suffice.cli import app
from suffice.kv import load_model
from suffice.kv.eval.compare import Comparison, compare, ranked, spearman
from suffice.kv.eval.fidelity import Cell, evaluate
from suffice.kv.eval.prompts import UserPrompt, read_prompts
from suffice.kv.eval.runs import contestants
from suffice.kv.eval.tasks import make
from suffice.kv.eval.tune import tune
from suffice.study.results import Group
from tests.kv.tiny import TOKENS, build, tokenizer

PROMPTS = [
    UserPrompt("The parrot is called Otto and the cat is called Mia. " * 3, "What is the cat called?"),
    UserPrompt("Water boils sooner on a mountain, since the air is thinner. " * 3, "Where does it boil sooner?"),
    UserPrompt("Anna was born in Vienna, Peter in Linz; both moved to Graz. " * 3, "Where was Anna born?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ein Modell – ü")
    build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return str(place)


def small(place, **more):
    tasks = (("text", "continuation"), ("multikey", "agnostic"))
    return compare(
        **{
            "policies": ["capkv", "h2o"],
            "allocations": ["own", "adakv"],
            "budgets": [0.5, 40],
            "tasks": tasks,
            "tokens": 300,
            "samples": 2,
            "model": place,
            **more,
        }
    )


def test_comparison_is_what_each_sample_gives_by_hand(folder, tmp_path):
    found = small(folder, folder=tmp_path)
    assert found.contestants == ["capkv", "capkv/pooled", "h2o", "h2o/pooled"]
    assert found.cells == [
        (t, m, b) for t, m in (("text", "continuation"), ("multikey", "agnostic")) for b in (0.5, 40)
    ]
    network, reader = load_model(folder)
    for seed in (0, 1):
        example = make("multikey", reader, tokens=300, seed=seed)
        cells = [Cell("h2o", 0.5), Cell("capkv", 40, "adakv")]
        rows = evaluate(network, reader, example, cells, mode="agnostic", measure_capacity=True)
        for row, name, budget in ((rows[1], "h2o", 0.5), (rows[2], "capkv/pooled", 40)):
            own = found.find(name, ("multikey", "agnostic", budget))
            for metric in ("kl", "score", "bytes_kept", "capacity_retained"):
                assert own.values[metric][seed] == pytest.approx(row[metric], abs=1e-4)
    again = small(folder, folder=tmp_path)
    assert again.rows() == found.rows()
    assert found.to_dict()["mean_rank"] == found.ranks()


def test_finished_samples_are_not_measured_again(folder, tmp_path, monkeypatch):
    small(folder, folder=tmp_path, samples=1)
    monkeypatch.setattr("suffice.kv.eval.runs.evaluate", lambda *_, **__: pytest.fail("measured again"))
    small(folder, folder=tmp_path, samples=1)


def group_of(policy, mode, budget, values, **more):
    settings = {"task": "multikey", "mode": mode, "policy": policy, "allocation": "own", "budget": budget}
    return Group(settings, {"kl": dict(enumerate(values)), **{k: dict(enumerate(v)) for k, v in more.items()}})


def test_ranks_and_losses():
    groups = [
        group_of("a", "aware", 0.5, [0.1, 0.2, 0.3], capacity_retained=[0.9] * 3),
        group_of("b", "aware", 0.5, [0.3, 0.4, 0.5], capacity_retained=[0.8] * 3),
        group_of("c", "aware", 0.5, [0.6, 0.5, 0.9], capacity_retained=[0.7] * 3),
        group_of("a", "agnostic", 0.5, [0.5, 0.6, 0.7]),
        group_of("b", "agnostic", 0.5, [0.4, 0.5, 0.61]),
        group_of("c", "agnostic", 0.5, [1.0, 2.0, 3.0]),
        group_of("full", "aware", 1.0, [0.0] * 3),
    ]
    found = Comparison({}, groups)
    assert found.ranks() == {"a": 1.5, "b": 1.5, "c": 3.0}
    (loss,) = found.losses("a")
    assert (loss["of"], loss["mode"]) == ("b", "agnostic")
    half = student.ppf(0.975, 2) * (1 / 3e4) ** 0.5 / 3**0.5
    assert loss["mean"] == pytest.approx(-0.29 / 3)
    assert loss["high"] - loss["mean"] == pytest.approx(half, rel=1e-3)
    (rho,) = found.capacity()
    assert rho["spearman"] == pytest.approx(-1)


def test_rank_correlation_is_scipys():
    one, other = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 4.0, 4.0, 2.0, 0.0]
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert ranked([5.0, 1.0, 5.0]) == [2.5, 1.0, 2.5]
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0


def test_tuning_finds_the_smallest_safe_budget(folder, tmp_path):
    options = {"policies": ["capkv", "h2o"], "allocations": ["own"], "budgets": [0.3, 1.0, 0.7], "model": folder}
    found = tune(PROMPTS, target_kl=5.0, new_tokens=4, folder=tmp_path, **options)
    assert [trial.budget for trial in found.trials] == [1.0, 0.7, 0.3] * 2
    assert found.best.budget == 0.3
    assert found.beyond is None
    assert f"policy='{found.best.policy}', budget=0.3)" in found.code()
    assert "smallest budget that was tried" in found.words()
    # From what was kept: another target is another reading of the same runs.
    tight = max(trial.bound for trial in found.trials if trial.budget == 1.0) + 1e-5
    strict = tune(PROMPTS, target_kl=tight, new_tokens=4, folder=tmp_path, **options)
    assert strict.best.budget == 1.0
    assert strict.beyond.budget == 0.7
    assert "At 0.7 that is no longer shown" in strict.words()
    for trial in strict.trials:
        if trial.budget == 0.7:
            assert not trial.safe


def test_bound_is_students_with_the_arms_paid_for(folder, tmp_path):
    options = {"policies": ["capkv", "h2o"], "allocations": ["own"], "budgets": [0.4], "model": folder}
    found = tune(PROMPTS, target_agreement=0.9, confidence=0.9, new_tokens=6, folder=tmp_path, **options)
    for trial in found.trials:
        assert 0 <= trial.within <= 1
        assert trial.bound <= trial.mean
    kl = tune(PROMPTS, target_kl=0.1, confidence=0.9, new_tokens=6, folder=tmp_path, **options)
    one = tune(
        PROMPTS, target_kl=0.1, confidence=0.95, new_tokens=6, folder=tmp_path, **{**options, "policies": ["h2o"]}
    )
    own = next(trial for trial in kl.trials if trial.policy == "h2o")
    assert one.trials[0].bound == pytest.approx(own.bound, rel=1e-3)


def test_a_target_that_no_budget_reaches_is_said(folder):
    found = tune(PROMPTS, target_kl=1e-9, policies=["knorm"], allocations=["own"], budgets=[0.3], model=folder)
    assert found.best is None
    assert not found.code()
    assert "No budget reaches mean KL ≤ 1e-09" in found.words()
    assert "Closest: knorm at budget 0.3" in found.words()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_kl": None}, "exactly one"),
        ({"target_agreement": 0.9}, "exactly one"),
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_kl": None, "target_agreement": 1.5}, "target_agreement is 1.5"),
        ({"confidence": 0.3}, "confidence is 0.3"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"budgets": []}, "budgets is"),
        ({"budgets": [2.0]}, "budget is 2.0"),
        ({"policies": ["h3o"]}, "Did you mean 'h2o'"),
        ({"allocations": ["profil"]}, "Did you mean 'profile'"),
        ({"new_tokens": 0}, "new_tokens is 0"),
    ],
)
def test_impossible_tuning_is_refused_before_any_work(changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        tune(PROMPTS, **{"target_kl": 0.1, "model": "/nowhere", **changes})


def test_one_prompt_or_no_question_is_refused():
    with pytest.raises(ValueError, match="prompts has 1"):
        tune(PROMPTS[:1], target_kl=0.1)
    with pytest.raises(ValueError, match="prompt 1 has no question"):
        tune([PROMPTS[0], "only text"], target_kl=0.1, mode="agnostic")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"tasks": ()}, "tasks is"),
        ({"tasks": (("needle", "aware"),)}, "task is 'needle'"),
        ({"tasks": (("text", "aware"),)}, "mode is 'aware'"),
        ({"policies": ["capkv", "capkv"]}, "each once"),
        ({"haystack": "/nowhere.txt"}, "haystack is '/nowhere.txt'"),
        ({"greedy_tokens": -1}, "greedy_tokens is -1"),
    ],
)
def test_impossible_comparisons_are_refused_before_any_work(changes, words):
    with pytest.raises(ValueError, match=words):
        small("/nowhere", **changes)


def test_a_prompt_longer_than_the_window_keeps_the_others(folder, tmp_path):
    long = UserPrompt("many words " * 900)
    options = {"policies": ["h2o"], "allocations": ["own"], "budgets": [0.5], "new_tokens": 4, "model": folder}
    with pytest.raises(SufficeError, match=r"1 of 3 samples are not done.*more than the model's window"):
        tune([*PROMPTS[:2], long], target_kl=1.0, folder=tmp_path, **options)


def test_prompts_are_read_from_lines_and_from_parts(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('"plain"\n\n{"prompt": "d", "question": "q"}\n{"document": "e"}\n', encoding="utf-8")
    assert read_prompts(lines) == [UserPrompt("plain"), UserPrompt("d", "q"), UserPrompt("e")]
    parts = tmp_path / "p.txt"
    parts.write_text("one\ntwo\n-----\n\nthree\n---\n", encoding="utf-8")
    assert read_prompts(parts) == [UserPrompt("one\ntwo"), UserPrompt("three")]
    for content in ("", "{", "7", '{"prompt": ""}', '{"prompt": "x", "question": 3}'):
        lines.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="prompts"):
            read_prompts(lines)
    with pytest.raises(ValueError, match="can't be read"):
        read_prompts(tmp_path / "none.txt")


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
    assert {"settings", "rows", "mean_rank", "losses", "capacity"} <= set(facts)
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
    tuned = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--new-tokens", "4", "--policies", "h2o"]
    tuned += ["--allocations", "own", "--budgets", "90%,50%", "--folder", str(tmp_path / "kept")]
    done = CliRunner().invoke(app, [*tuned, "--target-kl", "9"])
    assert done.exit_code == 0, done.output
    assert "cache = CompressedCache(model, policy='h2o', budget=0.5)" in done.stdout
    done = CliRunner().invoke(app, [*tuned, "--target-kl", "1e-9", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.strip().splitlines()[-1])["recommended"] is None


def test_an_allocation_that_is_the_policys_own_is_measured_once():
    settings = {
        "policies": ["capkv-profile", "pyramidkv", "capkv"],
        "allocations": ["own", "profile"],
        "budgets": [0.5],
    }
    assert contestants(settings) == [
        ("capkv-profile", "own", 0.5),
        ("pyramidkv", "own", 0.5),
        ("pyramidkv", "profile", 0.5),
        ("capkv", "own", 0.5),
        ("capkv", "profile", 0.5),
    ]
    assert len(contestants({**settings, "allocations": ["profile"]})) == 3
