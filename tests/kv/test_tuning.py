"""What `tune` tries by default, what it leaves out, what it recommends, and the program that it prints."""

from __future__ import annotations

from statistics import fmean

import pytest
from typer.testing import CliRunner

from suffice import SufficeError
from suffice.cli import app
from suffice.kv import CompressedCache, load_model, prefill, tune
from suffice.kv.eval.cache_grid import mean_bytes
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.tune import DEFAULT_MEMORY, Trial, TuningResult, make_trials
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.kv.hf.loading import ModelSource
from suffice.study.results import Group
from suffice.study.store import Store
from tests.kv.tiny import TOKENS, build, tokenizer

QUESTION = "Where does the parrot live?"
LONG = [UserPrompt(f"{name} is called Otto, and {name} lives in a small house. " * 9, QUESTION) for name in "AB"]
SHORT = UserPrompt("The parrot is called Otto.", "What is it called?")
ARMS = [(policy, repair) for policy in ("capkv-salience", "capkv-replay") for repair in (False, True)]
TINY = {"max_new_tokens": 2, "target_kl": 90.0}


def arms(result):
    return list(dict.fromkeys((trial.policy, trial.repair) for trial in result.trials))


def test_limits_are_tried_with_and_without_replay_and_repair(folder, tmp_path):
    found = tune(LONG, model=folder, run=RunOptions(tmp_path), **TINY)
    assert arms(found) == ARMS
    limits = [trial.memory for trial in found.trials if trial.arm == found.trials[0].arm]
    assert limits == list(DEFAULT_MEMORY[: len(limits)])
    assert len(limits) > 4
    # The target is met by every cache, and of those with the smallest limit, the first arm takes the least time.
    assert (found.best.policy, found.best.repair, found.best.memory) == ("capkv-salience", False, limits[-1])
    # Greedy answers are not generated without need.
    with Store(tmp_path, read_only=True) as store:
        (record, *_) = store.records(store.study_name())
        assert all("agreement" not in values for _, values in record.rows())


def test_limits_that_are_too_small_for_a_prompt_are_left_out(folder):
    options = {"policies": ["h2o"], "model": folder, **TINY}
    alone, found = (tune(prompts, **options) for prompts in (LONG, [*LONG, SHORT]))
    smallest = [min(trial.memory for trial in result.trials) for result in (alone, found)]
    assert smallest[0] < smallest[1] < max(DEFAULT_MEMORY)
    assert {trial.memory for trial in found.trials} < {trial.memory for trial in alone.trials}
    with pytest.raises(SufficeError, match=r"prompt 2: memory must be at least .* got 0.04"):
        tune([*LONG, SHORT], memory=[0.04], **options)


def test_a_replay_that_does_not_fit_into_the_context_window_is_left_out(tmp_path):
    save(build("llama", vocab_size=TOKENS, max_position_embeddings=512, seed=3), tmp_path / "model")
    prompts = [UserPrompt("A is called Otto, and A lives in a small house. " * count, QUESTION) for count in (5, 13)]
    num_tokens = tokenize_prompt(tokenizer(), prompts[1].document, QUESTION).input_ids.shape[1]
    assert 430 < num_tokens < 500
    found = tune(prompts, memory=[0.5], model=str(tmp_path / "model"), **TINY)
    assert arms(found) == ARMS[:2]
    with pytest.raises(SufficeError, match=r"prompt 1: inputs must have at most .* for a policy with a replay"):
        tune(prompts, policies=["capkv-replay"], model=str(tmp_path / "model"), **TINY)


def test_arms_that_the_model_does_not_support_are_left_out(tmp_path):
    model = build("mistral", vocab_size=TOKENS, max_position_embeddings=1024, sliding_window=64)
    save(model, tmp_path / "model")
    found = tune(LONG, memory=[0.5], model=str(tmp_path / "model"), **TINY)
    assert arms(found) == ARMS[:1]
    with pytest.raises(SufficeError, match="allocation must give each layer a budget of its own"):
        tune(LONG, policies=["capkv-salience", "capkv-replay"], model=str(tmp_path / "model"), **TINY)


def save(model, place):
    model.save_pretrained(place)
    tokenizer().save_pretrained(place)


def test_the_agreement_is_measured_for_its_target(folder, tmp_path):
    options = {"policies": ["h2o"], "memory": [0.5], "max_new_tokens": 3, "model": folder}
    found = tune(LONG, target_agreement=0.1, run=RunOptions(tmp_path), **options)
    assert found.metric == "agreement"
    assert 0 <= found.trials[0].mean <= 1


CACHES = [
    {"policies": ["h2o"], "budgets": [0.5]},
    {"policies": ["h2o"], "budgets": [0.5], "bits": [(4, 2)], "repair": [True], "allocations": ["pyramid"]},
    {"policies": ["h2o"], "memory": [0.4], "repair": [True]},
    {"policies": ["kvzip"], "memory": [0.4]},
    {"policies": ["capkv-replay"], "memory": [0.4], "repair": [True]},
    {"policies": ["capkv-replay"], "budgets": [0.4], "bits": [4], "repair": [True]},
]


@pytest.mark.parametrize(
    ("caches", "mode"), [*((caches, "aware") for caches in CACHES), (CACHES[1], "agnostic"), (CACHES[4], "agnostic")]
)
def test_the_program_uses_the_cache_that_was_measured(folder, caches, mode, capsys):
    source = ModelSource(folder, attn_implementation="eager")
    found = tune(LONG, target_kl=90.0, mode=mode, max_new_tokens=2, model=source, **caches)
    program = found.code().replace("Your document.", LONG[0].document).replace("Your question?", QUESTION)
    names = {}
    exec(program, names)
    cache, model = names["cache"], names["model"]
    assert model.config._attn_implementation == "suffice_eager"
    assert capsys.readouterr().out
    assert (cache.policy.name, cache.settings.repair) == (caches["policies"][0], caches.get("repair", [False])[0])
    # What generation has added is kept too; the rest is what the trial kept.
    network, reader = load_model(folder)
    prompt = tokenize_prompt(reader, LONG[0].document, QUESTION)
    compressed = prompt.document if mode == "agnostic" else prompt.input_ids[:, :-1]
    size = {"budget": caches["budgets"][0]} if "budgets" in caches else {"memory": caches["memory"][0]}
    bits, allocation = caches.get("bits", [None])[0], caches.get("allocations", [None])[0]
    options = {"bits": bits, "allocation": allocation, "repair": caches.get("repair", [False])[0], **size}
    own = CompressedCache(network, caches["policies"][0], evict="prefill", **options)
    prefill(network, {"input_ids": compressed}, [own], tokenizer=reader)
    for layer in own.compressed_layers:
        kept, all_kept = own.kept_positions(layer.index), cache.kept_positions(layer.index)
        added = prompt.input_ids.shape[1] + 1 - compressed.shape[1]
        assert all_kept[..., -kept.shape[-1] - added : -added].tolist() == kept.tolist()


def make_trial(policy="h2o", **more):
    values = {"allocation": "own", "budget": None, "mean": 0.1, "bound": 0.1, "within": 1.0, "safe": True}
    return Trial(policy, **{**values, "bytes_kept": 90.0, "bytes": 100.0, "memory": 0.2, **more})


def test_of_equal_limits_the_cache_that_takes_the_least_time_is_best():
    def best(*trials):
        return TuningResult("kl", 0.2, 0.95, 30, list(trials), {}).best

    plain, repaired = make_trial(bytes=104.0, mean=0.12), make_trial(repair=True)
    replayed = make_trial("kvzip", bytes=98.0, mean=0.01)
    assert best(replayed, repaired, plain) == plain
    assert best(replayed, repaired) == repaired
    assert best(replayed, repaired, make_trial("tova", mean=0.11, bytes=103.0), plain).policy == "tova"
    smaller = make_trial("kvzip", memory=0.1, bytes=50.0, repair=True)
    assert best(plain, smaller) == smaller
    assert best(make_trial(budget=0.5, memory=None, bytes=60.0), make_trial(budget=0.6, memory=None)).budget == 0.5


def test_all_bytes_of_a_cache_are_compared(folder, tmp_path):
    """The numbers that repair adds to the logits count, also where keys and values take the same bytes."""
    options = {"policies": ["knorm"], "budgets": [0.5], "repair": [False, True], "model": folder, **TINY}
    found = tune(LONG, run=RunOptions(tmp_path), **options)
    plain, repaired = found.trials
    assert plain.bytes_kept == repaired.bytes_kept < plain.bytes < repaired.bytes
    assert found.best == plain
    with Store(tmp_path, read_only=True) as store:
        values = [list(record.rows()) for record in store.records(store.study_name())]
    for trial, index in ((plain, 1), (repaired, 2)):
        assert trial.bytes == fmean(rows[index][1]["bytes"] for rows in values)


def test_samples_that_were_stored_without_all_bytes_are_compared_by_keys_and_values():
    settings = {"policy": "h2o", "allocation": "own", "budget": 0.5}
    complete, mixed = {"bytes_kept": {0: 8.0, 1: 10.0}, "bytes": {0: 9.0, 1: 12.0}}, {"bytes": {1: 12.0}}
    assert mean_bytes(Group(settings, complete)) == 10.5
    assert mean_bytes(Group(settings, {**complete, **mixed})) == 9.0
    assert mean_bytes(Group(settings, {"bytes_kept": {0: 8.0}})) == 8.0


def test_caches_that_were_not_measured_on_all_prompts_are_not_decided():
    def group(policy, memory, values):
        settings = {"policy": policy, "allocation": "own", "budget": None, "memory": memory}
        by_prompt = dict(enumerate(values))
        return Group(settings, {"kl": by_prompt, "bytes_kept": dict.fromkeys(by_prompt, 10.0)})

    full = group("full", None, [0.0, 0.0, 0.0])
    groups = [full, group("h2o", 0.5, [0.1, 0.2, 0.1]), group("h2o", 0.1, [0.1, 0.2]), group("kvzip", 0.5, [0.1])]
    (trial,) = make_trials(groups, "kl", 0.5, 0.95)
    assert (trial.policy, trial.memory) == ("h2o", 0.5)
    # The error rate is not divided by arms that were not measured.
    (alone,) = make_trials(groups[:2], "kl", 0.5, 0.95)
    assert trial == alone


def test_few_prompts_are_mentioned():
    few, enough = (TuningResult("kl", 0.2, 0.95, count, [make_trial()], {}) for count in (19, 20))
    assert "Use at least 20 prompts" in few.summary()
    assert "Use at least" not in enough.summary()


def test_the_command_searches_by_default(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n---\n".join(one.document for one in LONG), encoding="utf-8")
    arguments = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--target-kl", "90", "--memory", "50%"]
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [(row[1].strip(), row[4].strip() == "yes") for row in rows] == ARMS
    assert "cache = CompressedCache(model, policy='capkv-salience', memory=0.5, evict=\"prefill\")" in done.stdout
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2", "--no-repair"])
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["capkv-salience", "capkv-replay"]


@pytest.mark.parametrize(
    ("targets", "got"),
    [([], "neither"), (["--target-kl", "0.1", "--target-agreement", "0.5"], "0.1 and 0.5")],
)
def test_the_command_names_the_options_of_the_target(targets, got):
    done = CliRunner().invoke(app, ["kv", "tune", "--prompts", "/nowhere.txt", *targets])
    expected = f"exactly one of --target-kl and --target-agreement must be given, got {got}"
    assert str(done.exception) == expected
