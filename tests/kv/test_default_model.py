"""The default model, and commands that use it. It is downloaded once and then cached."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from suffice.cli import app
from suffice.cli.kv_options import parse_budget
from suffice.kv import CompressedCache, load_model, policies
from suffice.kv.budget.calibration import get_profile
from suffice.kv.budget.profile import read_profile
from suffice.kv.eval.answer import answer
from suffice.kv.eval.demo import run_demo
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.tasks import planted_facts

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded():
    return load_model(dtype="float32")


def test_it_is_the_expected_model(loaded):
    model, tokenizer = loaded
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    found, _ = answer(model, tokenizer, "What is the capital of France?", policy="full", max_new_tokens=8)
    assert "Paris" in found.answer


def test_its_tokenizer_is_that_of_the_published_model(loaded):
    model, tokenizer = loaded
    ids = tokenizer("The quick brown fox").input_ids
    assert ids == [504, 2365, 6354, 16438]
    text = "The  file\n\n def f(x): 1.25 é 日本 ▁"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids == [1, 4093, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode([1, 504, 2], skip_special_tokens=True) == "The"
    # A wrong tokenizer shows in the probability of plain English. Guessing has −10.8.
    passage = "The capital of France is Paris. The sun rises in the east and sets in the west."
    tokens = torch.tensor([tokenizer(passage).input_ids])
    with torch.no_grad():
        log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
    assert float(log_probs.gather(1, tokens[0, 1:, None]).mean()) > -2


def test_full_budget_generates_the_tokens_of_the_stock_cache(loaded):
    model, tokenizer = loaded
    ids = planted_facts(tokenizer, tokens=300, num_facts=2)[0].prompt(tokenizer).input_ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=CompressedCache(model, budget=1.0), **options), plain)


@pytest.mark.parametrize(("budget", "aware"), [(0.25, True), (0.5, False)])
def test_a_compressed_cache_still_answers(loaded, budget, aware):
    model, tokenizer = loaded
    example = planted_facts(tokenizer, tokens=700, num_facts=2, seed=3)[1]
    question = example.question
    found, report = answer(model, tokenizer, example.document, question, budget=budget, aware=aware, max_new_tokens=16)
    assert example.score(found.answer) == 1
    assert found.bytes_kept < (budget + 0.1) * found.bytes_full
    assert budget < report.capacity_retained < 1


def test_the_demo_measures_no_divergence_for_the_full_cache(loaded):
    found = run_demo(*loaded, tokens=400, num_facts=2, policies=("capkv", "streaming-llm"), budgets=(0.5,), seed=1)
    assert abs(found.tokens - 400) < 80
    assert len(found.rows) == 6
    for row in found.rows:
        assert len(row.kl) == len(row.correct) == 2
        assert min(row.kl) > -1e-6
        if row.policy == "full":
            assert max(row.kl) < 1e-6
            assert row.bytes_kept == row.bytes_full


def test_planted_facts_fill_the_requested_length(loaded):
    _, tokenizer = loaded
    examples = planted_facts(tokenizer, tokens=1000, seed=5)
    document = examples[0].document
    assert abs(len(tokenizer(document).input_ids) - 1000) < 60
    assert len({example.references for example in examples}) == 4
    assert all(document.count(example.references[0]) == 1 and example.answer in document for example in examples)
    assert planted_facts(tokenizer, tokens=1000, seed=5) == examples


def test_prompt_is_split_where_the_document_ends(loaded):
    _, tokenizer = loaded
    parts = tokenize_prompt(tokenizer, "  A short text.  ", "What is it?")
    assert tokenizer.decode(parts.document[0]).endswith("A short text.")
    assert "What is it?" in tokenizer.decode(parts.question[0])
    with pytest.raises(ValueError, match="document must contain text"):
        tokenize_prompt(tokenizer, " \n")


def command(*arguments, text=None):
    return CliRunner().invoke(app, list(arguments), input=text)


def test_generate_command_prints_json(tmp_path):
    file = tmp_path / "ein Text – ü.txt"
    file.write_text("The parrot is called Otto. " * 12, encoding="utf-8")
    done = command(
        "kv", "generate", "--prompt-file", str(file), "--question", "What is the parrot called?", "--agnostic",
        "--budget", "50%", "--max-new-tokens", "12", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"answer", "tokens_seen", "tokens_kept", "bytes_full", "bytes_kept", "capacity_retained"} <= set(facts)
    assert "Otto" in facts["answer"]
    assert facts["bytes_kept"] < facts["bytes_full"]


def test_generate_command_with_allocation_and_chunks(tmp_path):
    figure, page = tmp_path / "heads.svg", tmp_path / "page.html"
    done = command(
        "kv", "generate", "--budget", "60", "--allocation", "profile", "--chunk-size", "50", "--interval", "8",
        "--rerotate", "--max-new-tokens", "4", "--json", "--figure", str(figure), "--report", str(page),
        text="The parrot is called Otto. " * 20,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert facts["tokens_seen"] > 130
    assert 60 <= facts["tokens_kept"] < 68
    assert "<svg" in figure.read_text(encoding="utf-8")
    assert "Tokens of the prompt that were kept" in page.read_text(encoding="utf-8")


def test_token_shares_add_up_to_the_budget(loaded):
    model, tokenizer = loaded
    found, report = answer(model, tokenizer, "The parrot is called Otto. " * 12, budget=40, max_new_tokens=2)
    pieces, shares = zip(*found.token_shares, strict=True)
    assert "".join(pieces).count("Otto") == 12
    assert len(pieces) > 60
    # Every head keeps the first and the last tokens; the shares of all tokens add up to the budget.
    assert shares[0] == shares[-1] == 1
    assert sum(shares) == pytest.approx(40, abs=1e-3)
    assert "token_shares" not in found.to_dict()
    assert report.tokens_kept == 41


def test_calibrate_command_writes_a_profile(tmp_path):
    file = tmp_path / "profile.json"
    done = command("kv", "calibrate", "--tokens", "40", "--to", str(file), "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(facts["attention"]) == 30
    assert len(facts["attention"][0]) == 3
    assert facts["source"] == "40 tokens of the Python manual"
    assert read_profile(file).model == facts["model"]
    assert f"Profile: {file}" in command("kv", "calibrate", "--random", "--tokens", "40", "--to", str(file)).stdout


def test_calibrate_command_rejects_a_text_file_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8-sig")
    done = command("kv", "calibrate", "--text-file", str(tmp_path / "empty.txt"))
    assert str(done.exception) == f"--text-file must contain text, got '{tmp_path / 'empty.txt'}', which is empty"


def test_calibrate_command_rejects_two_sources():
    done = command("kv", "calibrate", "--random", "--text-file", "x")
    assert "got --text-file and --random" in str(done.exception)


def test_the_default_models_profile_is_shipped(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("SUFFICE_CACHE", str(tmp_path))
    found = get_profile(loaded[0])
    assert "Python manual" in found.source
    assert len(found.attention) == 30
    assert not list(tmp_path.iterdir())


def test_generate_command_reads_standard_input():
    done = command("kv", "generate", "--max-new-tokens", "4", "--layers", text="Say hello to the world, please.")
    assert done.exit_code == 0, done.output
    assert "tokens" in done.stdout


def test_policies_command_lists_all_policies():
    listed = json.loads(command("kv", "policies", "--json").stdout)
    assert [entry["name"] for entry in listed["policies"]] == list(policies())
    assert listed["default"] == "capkv-salience"
    assert "streaming-llm" in command("kv", "policies").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "hi", "--budget", "2.5"), "got '2.5'"),
        (
            ("--prompt", "hi", "--budget", "lots"),
            "--budget must be a number of tokens (500), a fraction (0.25) or a percentage (25%), got 'lots'",
        ),
        (("--prompt", "hi", "--policy", "h3o"), "Did you mean 'h2o'"),
        (("--prompt", "hi", "--allocation", "profil"), "Did you mean 'profile'"),
        (("--prompt", "hi", "--chunk-size", "0"), "--chunk-size must be at least 1 token, got 0"),
        (("--prompt", "hi", "--interval", "0"), "interval must be at least 1, got 0"),
        (("--prompt", "hi", "--prompt-file", "x"), "only one of --prompt and --prompt-file may be given, got both"),
        (
            ("--prompt-file", "/nowhere/at all"),
            "--prompt-file must be a text file, got '/nowhere/at all', which cannot be read",
        ),
        (("--prompt", "  "), "the prompt must contain text, got '  '"),
        (("--prompt", "hi", "--question", ""), "--question must contain text, got ''"),
        (("--prompt", "hi", "--dtype", "int4"), "dtype must be one of auto, float32, bfloat16, float16, got 'int4'"),
        (("--prompt", "hi", "--device", "cuda:99"), "device must be one that torch can use here, got 'cuda:99'"),
        (("--prompt", "hi", "--attn", "flash"), "attn_implementation must be sdpa, eager, flex_attention, flash_att"),
        (("--prompt", "hi", "--attn", "flash_attention_2"), "must be one that is installed here, got 'flash_att"),
        (
            ("--prompt", "hi", "--model", "/no/model"),
            "model must be a folder with a model or a known model id, got '/no/model'",
        ),
        (("--prompt", "hi", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
        (("--prompt", "word " * 9000), "must have at most 8192 tokens, the model's context window"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, words):
    done = command("kv", "generate", *arguments)
    assert isinstance(done.exception, (ValueError, TypeError))
    assert words in str(done.exception)


def test_budgets_on_the_command_line():
    assert [parse_budget(text) for text in ("500", "0.25", "25%", "1.0")] == [500, 0.25, 0.25, 1.0]
    assert isinstance(parse_budget("1"), int)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("Repo id must be in the form 'a/b': 'x'. Use `repo_type` argument if needed.", "cannot be found or read"),
        ("We couldn't connect to 'https://hub'.", "is not stored here, and Hugging Face cannot be reached"),
        ("You are trying to access a gated repo.", "needs a login at Hugging Face: hf auth login"),
    ],
)
def test_errors_of_transformers_are_told_in_words_of_this_package(monkeypatch, error, reason):
    def fail(*_, **__):
        raise OSError(error)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match="known model id") as refused:
        load_model("gemma3-270")
    accepted = "model must be a folder with a model or a known model id"
    assert str(refused.value) == f"{accepted}, got 'gemma3-270', which {reason}. Did you mean 'gemma3-270m'?"
