"""Caches after forward passes that failed: unchanged, or refused."""

import copy
import gc
import pickle
import sys
import threading

import pytest
import torch
import transformers

from suffice.kv import BatchedCaches, CompressedCache, prefill
from suffice.kv.attention.implementation import selected_implementation
from tests.kv.tiny import build, prompt


class PassError(Exception):
    """Raised in the middle of a forward pass."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _fail_in_layer(model, index, error=PassError):
    """Make one MLP of the model raise an error; return the handle that removes the failure."""

    def fail(*_):
        raise error

    return model.model.layers[index].mlp.register_forward_pre_hook(fail)


def _describe(cache):
    layers = cache.compressed_layers
    return [(layer.get_seq_length(), layer.storage.num_kept.tolist(), layer.state.num_appended) for layer in layers]


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("new", [1, 7])
def test_a_failed_pass_leaves_the_cache_as_it_was(policy, layer, new):
    model = build("llama")
    cache = CompressedCache(model, policy, 20)
    model(prompt(40), past_key_values=cache)
    model(prompt(3, seed=1), past_key_values=cache)
    expected, before = cache.copy(), _describe(cache)
    handle = _fail_in_layer(model, layer)
    with pytest.raises(PassError):
        model(prompt(new, seed=2), past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 43
    assert _describe(cache) == before
    rest = prompt(5, seed=3)
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options", [{}, {"policy": "capkv", "allocation": "marginal"}, {"policy": "capkv", "evict": "always"}]
)
def test_a_failed_prefill_leaves_the_cache_empty(family, options):
    model = build(family)
    cache, fresh = CompressedCache(model, budget=20, **options), CompressedCache(model, budget=20, **options)
    handle = _fail_in_layer(model, 2)
    with pytest.raises(PassError):
        model(prompt(40), past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 0
    got, wanted = (model(prompt(40), past_key_values=each).logits for each in (cache, fresh))
    assert torch.equal(got, wanted)
    assert cache.report() == fresh.report()


def test_a_pass_that_failed_after_evictions_damages_the_cache():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20, evict="always")
    model(prompt(40), past_key_values=cache)
    usable = cache.copy()
    handle = _fail_in_layer(model, 1)
    with pytest.raises(PassError):
        model(prompt(9, seed=1), past_key_values=cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(ValueError, match="past_key_values must hold the tokens of complete forward passes"):
            model(prompt(9, seed=1), past_key_values=cache)
    model(prompt(9, seed=1), past_key_values=usable)
    cache.reset()
    model(prompt(40), past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_a_pass_that_failed_in_a_model_with_sliding_windows_damages_the_cache():
    model = build("gemma3")
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    handle = _fail_in_layer(model, 2)
    with pytest.raises(PassError):
        model(prompt(9, seed=1), past_key_values=cache)
    handle.remove()
    with pytest.raises(ValueError, match="past_key_values must hold the tokens of complete forward passes"):
        model(prompt(9, seed=1), past_key_values=cache)


def test_an_interrupted_pass_is_undone_at_the_next_pass():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    expected = cache.copy()
    handle = _fail_in_layer(model, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(9, seed=1), past_key_values=cache)
    handle.remove()
    rest = prompt(5, seed=3)
    with pytest.raises(ValueError, match="was interrupted"):
        model(rest, past_key_values=cache)
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)


def test_copies_of_a_damaged_cache_are_refused(tmp_path):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20, evict="always")
    model(prompt(40), past_key_values=cache)
    handle = _fail_in_layer(model, 1)
    with pytest.raises(PassError):
        model(prompt(9, seed=1), past_key_values=cache)
    handle.remove()
    for use in (cache.copy, lambda: cache.save(model, tmp_path / "cache"), lambda: cache.crop(-1)):
        with pytest.raises(ValueError, match="past_key_values must hold the tokens of complete forward passes"):
            use()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.copy(),
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(39),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
    ],
)
def test_an_interrupted_pass_is_undone_before_the_cache_is_changed(change):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    expected = cache.copy()
    handle = _fail_in_layer(model, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(9, seed=1), past_key_values=cache)
    handle.remove()
    caches = [change(each) or each for each in (cache, expected)]
    rest = prompt(5, seed=3).expand(len(caches[1].layers[0].state.rows), -1)
    assert _describe(caches[0]) == _describe(caches[1])
    got, wanted = (model(rest, past_key_values=each).logits for each in caches)
    assert torch.equal(got, wanted)


def test_earlier_tokens_that_a_failed_pass_has_masked_stay_masked():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    model(prompt(3, seed=1), past_key_values=cache)
    mask = torch.ones(1, 47, dtype=torch.long)
    mask[0, 41:43] = 0
    inputs = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -4:] - 1}
    expected = cache.copy()
    wanted = model(prompt(4, seed=2), past_key_values=expected, **inputs).logits
    handle = _fail_in_layer(model, 1)
    with pytest.raises(PassError):
        model(prompt(4, seed=2), past_key_values=cache, **inputs)
    handle.remove()
    with pytest.raises(ValueError, match="attention_mask must mask all tokens that it masked before"):
        model(prompt(4, seed=2), past_key_values=cache, attention_mask=torch.ones_like(mask))
    assert torch.equal(model(prompt(4, seed=2), past_key_values=cache, **inputs).logits, wanted)


def test_a_crop_that_one_layer_refuses_changes_no_layer():
    types = ["full_attention", "sliding_attention"] * 2
    model = build("gemma3", layer_types=types)
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    model(prompt(3, seed=1), past_key_values=cache)
    before = _describe(cache)
    with pytest.raises((RuntimeError, ValueError)):
        cache.crop(-2)
    assert _describe(cache) == before


def test_a_cache_is_reused_for_another_batch_after_reset():
    model = build("llama")
    options = {"policy": "capkv", "budget": 20, "allocation": "marginal"}
    cache, fresh = CompressedCache(model, **options), CompressedCache(model, **options)
    model(prompt(60), past_key_values=cache)
    cache.reset()
    for each in (cache, fresh):
        model(prompt(40, seed=5, rows=2), past_key_values=each)
    assert _describe(cache) == _describe(fresh)


def test_a_group_of_caches_refuses_the_same_cache_twice():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    with pytest.raises(ValueError, match="caches must be different"):
        prefill(model, {"input_ids": prompt(40)}, [cache, cache])
    model(prompt(40), past_key_values=cache)
    with pytest.raises(ValueError, match="caches must be different"):
        BatchedCaches([cache, cache])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_wrong_number_of_rows_is_refused_before_anything_is_stored(family):
    model = build(family)
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    expected, rest = cache.copy(), prompt(5, seed=3)
    with pytest.raises(ValueError, match=r"input_ids must have 1 rows, .* got 2.*batch_repeat_interleave"):
        model(rest.expand(2, -1), past_key_values=cache)
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)


def test_another_dtype_is_refused_before_anything_is_stored():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    model(prompt(40), past_key_values=cache)
    expected, rest = cache.copy(), prompt(5, seed=3)
    model.double()
    with pytest.raises(ValueError, match=r"keys of the model must have the dtype of the cache, torch.float32"):
        model(rest, past_key_values=cache)
    model.float()
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("both_have_caches", [False, True])
def test_the_cache_of_another_model_is_refused_before_anything_is_stored(both_have_caches):
    """The first layer of these models has a sliding window, so that it is not compressed."""
    model, other = build("gemma3"), build("gemma3", seed=1)
    cache = CompressedCache(model, "capkv", 20)
    keep = CompressedCache(other, "capkv", 20) if both_have_caches else None
    model(prompt(40), past_key_values=cache)
    expected, rest = cache.copy(), prompt(5, seed=3)
    with pytest.raises(ValueError, match="past_key_values must be a CompressedCache of the model that is called"):
        other(rest, past_key_values=cache)
    got, wanted = (model(rest, past_key_values=each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)
    del keep


def test_a_copied_model_does_not_keep_the_attention_function():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del cache
    gc.collect()
    expected = model(prompt(9)).logits
    for other in (copied, unpickled):
        assert torch.equal(other(prompt(9)).logits, expected)
        assert selected_implementation(other.model) == selected_implementation(other) == "sdpa"
        assert not other.model._forward_pre_hooks
        assert not other.model._forward_hooks
        own = CompressedCache(other, "capkv", 20)
        other(prompt(40), past_key_values=own)
        assert own.report().tokens_kept < own.report().tokens_seen


def test_caches_are_made_and_deleted_in_several_threads():
    model = build("llama")
    errors = []

    def work():
        try:
            for _ in range(40):
                cache = CompressedCache(model, "capkv", 0.5)
                assert selected_implementation(model.model) == "suffice_sdpa"
                del cache
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    assert not errors
    assert selected_implementation(model.model) == "sdpa"
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("failing_layer", [0, 2])
def test_a_failed_pass_leaves_a_batch_of_caches_as_it_was(failing_layer):
    model = build("llama")
    caches = [CompressedCache(model, "capkv", 20), CompressedCache(model, "capkv-profile", 30)]
    for row, cache in enumerate(caches):
        model(prompt(40, seed=row), past_key_values=cache)
    expected = [cache.copy() for cache in caches]
    ids = prompt(3, seed=5, rows=2)
    handle = _fail_in_layer(model, failing_layer)
    with pytest.raises(PassError):
        model(ids, past_key_values=BatchedCaches(caches))
    handle.remove()
    got, wanted = (model(ids, past_key_values=BatchedCaches(each)).logits for each in (caches, expected))
    assert torch.equal(got, wanted)


def test_a_failed_shared_prefill_leaves_the_caches_empty():
    model = build("llama")
    caches = [CompressedCache(model, "capkv", 20), CompressedCache(model, "capkv-profile", 30)]
    handle = _fail_in_layer(model, 1)
    with pytest.raises(PassError):
        prefill(model, {"input_ids": prompt(40)}, caches)
    handle.remove()
    assert [cache.get_seq_length() for cache in caches] == [0, 0]
    prefill(model, {"input_ids": prompt(40)}, caches)


@pytest.mark.parametrize("options", [{}, {"policy": "capkv", "evict": "always", "rerotate": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("length", [5, 30, 40, 42])
def test_a_prompt_that_does_not_continue_the_tokens_of_the_cache_is_refused(family, options, length):
    """`generate` skips 42 tokens of an unrelated, shorter prompt, and of the same prompt again."""
    model = build(family)
    cache = CompressedCache(model, budget=20, **options)

    def ask(ids):
        inputs = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
        return model.generate(ids, **inputs, max_new_tokens=3, do_sample=False)

    first = ask(prompt(40))
    expected, before = cache.copy(), _describe(cache)
    error, message = ValueError, f"must be longer than the 42 tokens .* got ({length}|no further) tokens. For another"
    if transformers.__version__.startswith("5.2."):
        error, message = IndexError, "out of bounds"  # of `generate` itself, before it calls the model
    with pytest.raises(error, match=message):
        ask(first[:, :42] if length == 42 else prompt(length))
    assert _describe(cache) == before
    more = torch.cat((first, prompt(5, seed=3)), dim=1)
    got = ask(more)
    cache = expected
    assert torch.equal(got, ask(more))


def test_inputs_without_tokens_and_short_masks_are_refused():
    model = build("llama")
    cache = CompressedCache(model, "capkv", 20)
    with pytest.raises(ValueError, match="input_ids must have at least 1 token, got none"):
        model(prompt(0), past_key_values=cache)
    model(prompt(40), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"the 40 tokens that the CompressedCache already holds, .* got no further tokens"
    ):
        model(prompt(0), past_key_values=cache)
    with pytest.raises(ValueError, match=r"the 40 tokens that the CompressedCache already holds, .* got 5 tokens"):
        model(prompt(5), attention_mask=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 40
