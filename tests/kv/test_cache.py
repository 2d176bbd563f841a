"""Errors, several caches and models, rows, copies and reports of a cache; policies have a conformance suite."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from suffice.information import capacity
from suffice.kv import CompressedCache, Policy, policies
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.capacity_share import capacity_share
from suffice.kv.policy.weights import KeyNorm, WindowAttention
from tests.kv.tiny import answer, build, left_padded, prompt, tiny


@pytest.fixture
def model():
    return tiny("llama")


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0, ValueError, "budget must be a number of tokens .*, got 0$"),
        (-3, ValueError, "budget must be a number of tokens .*, got -3$"),
        (0.0, ValueError, "budget must be .* a fraction of the prompt .*, got 0.0$"),
        (-0.5, ValueError, "budget must be .* a fraction of the prompt .*, got -0.5$"),
        (1.5, ValueError, "budget must be .* a fraction of the prompt .*, got 1.5$"),
        (float("nan"), ValueError, "budget must be .* a fraction of the prompt .*, got nan$"),
        (True, TypeError, "budget must be a number of tokens .*, got True$"),
        ("half", TypeError, "budget must be a number of tokens .*, got 'half'$"),
    ],
)
def test_invalid_budget_is_rejected(model, budget, error, message):
    with pytest.raises(error, match=message):
        CompressedCache(model, budget=budget)


def test_budget_without_room_for_the_protected_entries_is_rejected(model):
    with pytest.raises(ValueError, match=r"budget must be at least 12 tokens, because 4 sinks .* of 8 .*, got 10"):
        CompressedCache(model, budget=10, sinks=4, window=8)
    with pytest.raises(ValueError, match="sinks must be at least 0, got -1"):
        CompressedCache(model, sinks=-1)
    cache = CompressedCache(model, budget=0.25, sinks=4, window=20)
    with pytest.raises(ValueError, match=r"budget must be at least 24 tokens, .*, got a budget of 10 for this row"):
        model(prompt(40), past_key_values=cache)


def test_unknown_policy_is_rejected_with_the_known_names(model):
    message = "policy must be one of capkv-salience, .*streaming-llm.*, got 'capvk'. Did you mean 'capkv'"
    with pytest.raises(ValueError, match=message):
        CompressedCache(model, "capvk")
    with pytest.raises(TypeError, match=r"policy must be an instance of Policy or one of .*, got 3"):
        CompressedCache(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weights must be an instance of .*Weights, got 'attention'"):
        Policy(weights="attention")  # type: ignore[arg-type]


def test_model_of_the_wrong_type_is_rejected():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got str"):
        CompressedCache("llama")  # type: ignore[arg-type]


def test_right_padding_is_rejected(model):
    ids, mask = prompt(20, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, -4:] = 0
    cache = CompressedCache(model)
    with pytest.raises(ValueError, match="attention_mask must pad on the left, got a row whose last token is masked"):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("other", ["llama", "qwen2"])
@pytest.mark.parametrize("has_own_cache", [False, True])
def test_cache_of_another_model_is_rejected(model, other, has_own_cache):
    other_model = build(other, seed=1)
    own_cache = CompressedCache(other_model) if has_own_cache else None
    message = "past_key_values must be a CompressedCache of the model that is called, .*calls do not reach"
    with pytest.raises(ValueError, match=message):
        other_model(prompt(20), past_key_values=CompressedCache(model))
    del own_cache


def test_change_of_the_attention_implementation_is_rejected():
    model = build("llama")
    cache = CompressedCache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention implementation that the model had when the cache was made"):
        model(prompt(20), past_key_values=cache)


def test_unsupported_attention_implementation_is_rejected():
    model = build("llama")
    model.config._attn_implementation = "paged|eager"
    message = (
        "attn_implementation of the model must be 'sdpa', .* with the mask function of one of these, got 'paged|eager'"
    )
    with pytest.raises(ValueError, match=message):
        CompressedCache(model)


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile"])
def test_crop_after_an_eviction_removes_new_tokens_and_the_window_but_no_more(model, policy):
    cache = CompressedCache(model, policy, budget=20, window=6)
    model(prompt(40), past_key_values=cache)
    model(prompt(5, seed=1), past_key_values=cache)
    expected = cache.copy()
    model(prompt(3, seed=2), past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 45
    assert torch.equal(cache.kept_positions(1), expected.kept_positions(1))
    rest = prompt(4, seed=3)
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    torch.testing.assert_close(got, wanted)

    cache.crop(-4 - 5 - 2)  # two tokens of the protected window
    positions = cache.kept_positions(1)
    assert int(positions.max()) == cache.get_seq_length() - 1 == 37
    message = "crop must remove at most 4 tokens from a CompressedCache, whose heads have evicted .* got 5"
    with pytest.raises(ValueError, match=message):
        cache.crop(-5)
    model(rest, past_key_values=cache)
    assert cache.get_seq_length() == 42


def test_crop_before_an_eviction_equals_that_of_the_stock_cache(model):
    cache, stock = CompressedCache(model, budget=1.0), DynamicCache(config=model.config)
    for each in (cache, stock):
        model(prompt(20), past_key_values=each)
        each.crop(-6)
    assert cache.get_seq_length() == 14
    rest = prompt(5, seed=3)
    got, expected = (model(rest, past_key_values=each).logits for each in (cache, stock))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", list(policies(replay=False)))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_rejected(name, bad):
    model = build("llama")
    cache = CompressedCache(model, name, 0.5)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = bad
    with pytest.raises(ValueError, match="keys and values of layer 1 must be finite, got NaN or infinite values"):
        model(prompt(20), past_key_values=cache)
    assert cache.compressed_layers[1].storage is None


def test_caches_of_two_models_do_not_interfere():
    first, second = build("llama", seed=1), build("llama", seed=2)
    inputs = {"input_ids": prompt(24)}
    alone = [answer(m, inputs, CompressedCache(m, budget=0.5)) for m in (first, second)]
    caches = [CompressedCache(m, budget=0.5) for m in (first, second)]
    together = [answer(m, inputs, cache) for m, cache in zip((first, second), caches, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_model_is_restored_when_its_last_cache_is_deleted():
    model = build("llama")
    expected = answer(model, {"input_ids": prompt(20)})
    first, second = CompressedCache(model), CompressedCache(model)
    assert torch.equal(answer(model, {"input_ids": prompt(20)}), expected)
    copied = copy.deepcopy(second)
    del first, second
    gc.collect()
    assert model.config._attn_implementation == "suffice_sdpa"
    del copied
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks
    assert torch.equal(answer(model, {"input_ids": prompt(20)}), expected)


@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_deleted_cache_is_freed_without_a_garbage_collection(model, policy):
    gc.disable()
    try:
        cache = CompressedCache(model, policy, budget=0.5)
        answer(model, {"input_ids": prompt(20)}, cache)
        keys = weakref.ref(cache.compressed_layers[0].storage.buffers[0])
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_answering_from_a_copy_leaves_the_original_unchanged(model, policy):
    document, question = prompt(30), prompt(6, seed=1)
    cache = CompressedCache(model, policy, budget=0.5)
    model(document, past_key_values=cache)
    before = cache.compressed_layers[0].storage.entries.keys.clone()
    both = torch.cat((document, question), 1)
    first = answer(model, {"input_ids": both}, copy.deepcopy(cache))
    assert torch.equal(answer(model, {"input_ids": both}, copy.deepcopy(cache)), first)
    assert torch.equal(cache.compressed_layers[0].storage.entries.keys, before)
    assert cache.get_seq_length() == 30


def test_beam_search_with_full_budget_equals_the_stock_cache(model):
    inputs = {"input_ids": prompt(20), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(
        model.generate(**inputs, **options, past_key_values=CompressedCache(model, budget=1.0)), expected
    )


def test_rows_can_be_reordered_repeated_and_selected(model):
    prompts = [prompt(17), prompt(29)]
    cache = CompressedCache(model, "capkv", budget=0.5)
    model(**left_padded(prompts), past_key_values=cache)
    positions = cache.kept_positions(0).clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.kept_positions(0), positions[[1, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.kept_positions(0), positions[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([2]))
    assert torch.equal(cache.kept_positions(0), positions[[0]])
    assert {head.tokens_seen for head in cache.report().heads} == {17}


def test_reset_empties_the_cache(model):
    cache = CompressedCache(model, budget=0.5)
    first = answer(model, {"input_ids": prompt(20)}, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.report().heads
    assert torch.equal(answer(model, {"input_ids": prompt(20)}, cache), first)


def test_sliding_window_layers_are_not_compressed():
    model = tiny("gemma3")
    cache = CompressedCache(model, budget=0.5)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "CompressedLayer"] * 2


def test_report_states_what_is_kept(model):
    cache = CompressedCache(model, "capkv", budget=0.5)
    assert str(cache.report()) == "no tokens seen yet"
    model(prompt(40), past_key_values=cache)
    report = cache.report()
    assert "20 of 40 tokens" in str(report)
    assert "CompressedCache(policy='capkv', budget=0.5, 20 of 40 tokens" in repr(cache)
    facts = report.to_dict()
    assert facts["tokens_seen"] == 40
    assert len(facts["heads"]) == 6
    assert facts["bytes_index"] == 3 * 2 * (20 + 1) * 4  # positions, and the capacity of each head
    assert report.table().row_count == 3
    assert len(report.figure().axes) == 4
    with pytest.raises(ValueError, match=r"layer must be a layer with kept entries \(\[0, 1, 2\]\), got 7"):
        cache.kept_positions(7)


def test_capacity_is_not_measured_if_switched_off(model):
    cache = CompressedCache(model, budget=0.5, measure_capacity=False)
    model(prompt(40), past_key_values=cache)
    assert cache.report().capacity_retained is None


def test_capacity_share_equals_that_of_suffice_information():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 30, 8), 50 * torch.randn(2, 2, 30, 8)
    stats = AttentionStats(torch.randn(2, 4, 30, 8), keys, values)
    kept = torch.randperm(30)[:9].sort().values.expand(2, 2, 9)
    weights = policies()["capkv-profile"].weights.log_weights(stats).exp()
    expected = capacity(values, weights, subset=kept) / capacity(values, weights)
    torch.testing.assert_close(capacity_share(stats, kept), expected, rtol=1e-4, atol=1e-5)
    everything = torch.arange(30).expand(2, 2, 30)
    torch.testing.assert_close(capacity_share(stats, everything), torch.ones(2, 2), rtol=1e-5, atol=1e-5)


def test_composed_policy_is_used(model):
    own = Policy(weights=WindowAttention(window_size=8) + 0.5 * KeyNorm(), name="mine")
    cache = CompressedCache(model, own, 0.5)
    model(prompt(40), past_key_values=cache)
    assert cache.report().policy == "mine"
    assert Policy(weights=KeyNorm()).name == "custom"


def test_entries_are_stored_in_the_dtype_of_the_model():
    model = build("llama").to(torch.bfloat16)
    cache = CompressedCache(model, budget=0.5)
    answer(model, {"input_ids": prompt(30)}, cache)
    assert cache.compressed_layers[0].storage.entries.keys.dtype == torch.bfloat16
    assert 0 < cache.report().capacity_retained <= 1
