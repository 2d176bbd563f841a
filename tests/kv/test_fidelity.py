"""`evaluate`: its rows equal what each cache gives alone; answers, agreement, and rejected arguments."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from suffice.kv import CompressedCache, Policy
from suffice.kv.budget.allocation import Equal
from suffice.kv.budget.calibration import calibrate
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.eval.fidelity import CacheConfig, evaluate, kl_divergence
from suffice.kv.eval.tasks import make_example
from suffice.kv.policy.selection import Selection
from suffice.kv.policy.weights import Uniform
from tests.kv.tiny import TOKENS, build, tokenizer

CONFIGS = [
    CacheConfig("capkv", 0.5),
    CacheConfig("h2o", 60, "adakv"),
    CacheConfig("keydiff", 0.3, "marginal"),
    CacheConfig("snapkv", 1.0),
]


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=TOKENS, max_position_embeddings=2048, seed=3)


def read(model, config, prompt, rest):
    """Fill a new cache and feed the rest token by token; return the log-probabilities before each token and after."""
    cache = CompressedCache(model, config.policy, config.budget, allocation=config.allocation)
    rows = []
    with torch.no_grad():
        rows.append(model(prompt, past_key_values=cache).logits[0, -1])
        rows += [model(token[None, None], past_key_values=cache).logits[0, -1] for token in rest]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize(
    ("task", "mode", "chat"),
    [("multikey", "agnostic", False), ("multikey", "aware", True), ("text", "continuation", False)],
)
def test_rows_equal_what_each_cache_gives_alone(model, task, mode, chat):
    example = make_example(task, tokenizer(chat), tokens=400, seed=2)
    parts, gold = example.prompt(tokenizer(chat)), example.answer_ids(tokenizer(chat))[0]
    configs = [*CONFIGS, CacheConfig("capkv", 0.5, HeadProfile(calibrate(model, tokens=64)))]
    rows = evaluate(model, tokenizer(chat), example, configs, mode=mode, greedy_tokens=12, measure_capacity=True)
    assert len(rows) == 1 + len(configs)
    first = parts.document if mode == "agnostic" else parts.input_ids[:, :-1]
    rest = torch.cat((parts.input_ids[0, first.shape[1] :], gold))
    full, whole = None, []
    for row, config in zip(rows, [CacheConfig("full", 1.0), *configs], strict=True):
        own = read(model, config, first, rest)[-len(gold) - 1 : -1]
        full = own if full is None else full
        assert (row["task"], row["mode"], row["policy"], row["budget"]) == (task, mode, config.policy, config.budget)
        kl = functional.kl_div(own, full, log_target=True, reduction="sum") / len(gold)
        assert row["kl"] == pytest.approx(float(kl), abs=2e-4)
        likelihood = -functional.cross_entropy(own, gold)
        assert row["log_likelihood"] == pytest.approx(float(likelihood), abs=1e-3)
        change = float(likelihood + functional.cross_entropy(full, gold))
        assert row["log_likelihood_change"] == pytest.approx(change, abs=1e-3)
        assert row["top1"] == pytest.approx(float((own.argmax(-1) == full.argmax(-1)).float().mean()))
        cache = CompressedCache(model, config.policy, config.budget, allocation=config.allocation)
        with torch.no_grad():
            model(first, past_key_values=cache)
        report = cache.report()
        assert (row["tokens_kept"], row["bytes_kept"]) == (report.tokens_kept, report.bytes_kept)
        assert row["bytes"] == report.bytes
        assert row["capacity_retained"] == (
            report.capacity_retained and pytest.approx(report.capacity_retained, rel=1e-4)
        )
        options = {"attention_mask": torch.ones_like(parts.input_ids), "do_sample": False, "max_new_tokens": 12}
        told = model.generate(parts.input_ids, past_key_values=cache, **options)[0, parts.input_ids.shape[1] :].tolist()
        whole = whole or told
        same = [a == b for a, b in zip(whole, told, strict=True)]
        assert row["agreement"] == pytest.approx(sum(same) / 12)
        assert row["agreed_tokens"] == (same.index(False) if False in same else 12)
    assert rows[1]["kl"] > 0.01
    assert [row["allocation"] for row in rows[-3:]] == ["marginal", "equal", "head profile"]


class Fixed(Selection):
    """Keeps given tokens in each head, whatever the budget."""

    def __init__(self, kept):
        self.kept = kept

    def select(self, estimator, objective, budget):
        width = max(map(len, self.kept))
        return torch.tensor([[[-1] * (width - len(own)) + own for own in self.kept]])


class Ragged(Equal):
    @property
    def per_head(self):
        return True


@pytest.mark.parametrize(
    ("allocation", "kept"),
    [(Ragged(), [[0, 3, 50, 51, 200], [7, 90]]), (Equal(), [[0, 3, 50], [7, 90, 210]]), (Ragged(), [[], [5]])],
)
def test_a_selection_may_keep_different_numbers_per_head(model, allocation, kept):
    example = make_example("text", tokenizer(), tokens=300, seed=4)
    parts, gold = example.prompt(tokenizer()).input_ids, example.answer_ids(tokenizer())
    config = CacheConfig(Policy(weights=Uniform(), selection=Fixed(kept), allocation=allocation), 0.5)
    _, row = evaluate(model, tokenizer(), example, [config], mode="continuation")
    # The stock model over the whole sequence, with a mask for each head.
    ids, seen = torch.cat((parts, gold), dim=1), parts.shape[1] - 1
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = causal.repeat(1, 4, 1, 1)
    for head in range(4):
        gone = [token for token in range(seen) if token not in kept[head // 2]]
        mask[0, head, seen:, gone] = False
    with torch.no_grad():
        full, own = (
            model(ids, attention_mask=m, use_cache=False).logits[0, seen:-1].log_softmax(-1)
            for m in (causal[None, None], mask)
        )
    kl = functional.kl_div(own, full, log_target=True, reduction="sum") / gold.shape[1]
    assert row["kl"] == pytest.approx(float(kl), abs=2e-4)
    assert row["tokens_kept"] == sum(map(len, kept)) / 2


def test_a_cache_that_keeps_everything_equals_the_full_cache(model):
    example = make_example("single", tokenizer(), tokens=300)
    first, *_, last = evaluate(model, tokenizer(), example, CONFIGS, mode="agnostic", greedy_tokens=8)
    for row in (first, last):
        assert row["kl"] == pytest.approx(0, abs=1e-5)
        assert row["log_likelihood_change"] == pytest.approx(0, abs=1e-5)
        assert (row["top1"], row["agreement"], row["agreed_tokens"]) == (1, 1, 8)
        assert row["bytes_kept"] == row["bytes_full"]
        assert row["score"] == row["full_score"]
        assert row["answer"] == first["answer"]


def test_rows_are_plain_values_and_answers_are_scored(model):
    example = make_example("multikey", tokenizer(), tokens=300)
    rows = evaluate(model, tokenizer(), example, CONFIGS[:1], mode="aware")
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["score"] == example.score(row["answer"])
        assert row["chance"] == 0.25
        assert row["agreement"] is None
    silent = evaluate(model, tokenizer(), example, CONFIGS[:1], mode="aware", answer=False)
    assert [row["answer"] for row in silent] == [row["score"] for row in silent] == [None, None]
    assert [row["kl"] for row in silent] == [row["kl"] for row in rows]
    assert [row["allocation"] for row in rows] == ["equal", "equal"]


def test_an_answer_ends_at_the_end_of_text_token():
    model = build("llama", vocab_size=TOKENS, max_position_embeddings=2048, seed=3)
    example = make_example("single", tokenizer(), tokens=300)
    full, _ = evaluate(model, tokenizer(), example, [CacheConfig("tova", 0.2)], mode="aware", greedy_tokens=20)
    ids = example.prompt(tokenizer()).input_ids
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[
        0, ids.shape[1] :
    ]
    model.generation_config.eos_token_id = int(told[5])
    stop = told.tolist().index(int(told[5]))
    ended, _ = evaluate(model, tokenizer(), example, [CacheConfig("tova", 0.2)], mode="aware", greedy_tokens=20)
    assert ended["agreed_tokens"] == stop + 1
    assert full["agreed_tokens"] == 20
    assert ended["answer"] == tokenizer().decode(told[: stop + 1], skip_special_tokens=True).strip()


def test_kl_divergence_of_distributions_with_zeros():
    reference = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    own = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(reference), torch.distributions.Categorical(own)
    )
    torch.testing.assert_close(kl_divergence(reference.log(), own.log()), expected)
    assert kl_divergence(own.log(), reference.log())[0] == float("inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "blind"}, "mode must be one of agnostic, aware for task 'single', got 'blind'"),
        ({"greedy_tokens": -1}, "greedy_tokens must be at least 0, got -1"),
        ({"greedy_tokens": 5000}, "must have at most 2048 tokens, the model's context window"),
        ({"configs": [CacheConfig("h3o")]}, "Did you mean 'h2o'"),
        ({"configs": [CacheConfig("h2o", 1.5)]}, "budget must be .*, got 1.5"),
        ({"configs": [CacheConfig("h2o", 0.5, "pyramids")]}, "Did you mean 'pyramid'"),
    ],
)
def test_invalid_arguments_are_rejected(model, options, words):
    example = make_example("single", tokenizer(), tokens=300)
    with pytest.raises(ValueError, match=words):
        evaluate(model, tokenizer(), example, **{"configs": CONFIGS, **options})


@pytest.mark.model
def test_the_default_model_finds_a_needle_unless_the_cache_drops_it():
    from suffice.kv import load_model

    small, own = load_model(dtype="float32")
    example = replace(make_example("single", own, tokens=300, seed=1), max_new_tokens=8)
    configs = [CacheConfig("streaming-llm", 0.15), CacheConfig("capkv", 0.5, "profile")]
    full, lost, kept = evaluate(small, own, example, configs, mode="agnostic")
    assert full["score"] == kept["score"] == 1
    assert lost["score"] == 0
    assert kept["kl"] < 0.1 < lost["kl"]


@pytest.mark.model
def test_the_example_of_the_documentation_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "measure-fidelity.md").read_text(encoding="utf-8")
    code = next(code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "evaluate" in code)
    exec(compile(code, "measure-fidelity.md", "exec"), {})
    full, equal, profile, quantized, repaired = (line.split() for line in capsys.readouterr().out.splitlines())
    assert full[:2] == ["full", "equal"]
    assert profile[:2] == ["capkv", "profile"]
    assert quantized[:4] == ["capkv", "equal", "4", "False"]
    assert repaired[:4] == ["capkv", "equal", "None", "True"]
    assert float(full[4]) == 0
    assert float(profile[4]) < float(equal[4])
    assert float(repaired[4]) != float(equal[4])
