"""Conformance suite: what every named policy must do on every family of models."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from suffice.kv import CompressedCache, policies
from tests.kv.tiny import FAMILIES, answer, build, left_padded, prompt, tiny

POLICIES = tuple(policies(replay=False))
every_policy = pytest.mark.parametrize("name", POLICIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def prefill(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True)


@every_family
@every_policy
def test_full_budget_generates_the_same_tokens_as_the_stock_cache(name, family):
    model, inputs = tiny(family), {"input_ids": prompt(23)}
    assert torch.equal(answer(model, inputs, CompressedCache(model, name, 1.0)), answer(model, inputs))


@every_family
@every_policy
def test_rows_of_a_padded_batch_equal_single_runs(name, family):
    model, prompts = tiny(family), [prompt(17), prompt(29), prompt(22)]
    for budget in (0.5, 14):
        cache = CompressedCache(model, name, budget)
        together = answer(model, left_padded(prompts), cache)
        for row, own in enumerate(prompts):
            alone = CompressedCache(model, name, budget)
            assert torch.equal(answer(model, {"input_ids": own}, alone)[0], together[row])
            for layer in alone.compressed_layers:
                single = layer.storage.positions[0]
                batched = cache.kept_positions(layer.index)[row]
                assert torch.equal(batched[batched >= 0], single[single >= 0])


@every_family
@every_policy
def test_budget_is_met_exactly(name, family):
    model = tiny(family)
    for budget, kept in ((0.25, 10), (0.5, 20), (13, 13)):
        cache = CompressedCache(model, name, budget)
        prefill(model, prompt(40), cache)
        heads = cache.report().heads
        expected = 40 if name == "full" else kept
        assert {head.tokens_seen for head in heads} == {40}
        assert sum(head.tokens_kept for head in heads) == expected * len(heads)
        if name != "pyramidkv" and not cache.policy.allocation.per_head:
            assert {head.tokens_kept for head in heads} == {expected}


@every_family
@every_policy
def test_kept_entries_equal_those_of_the_full_cache_at_their_positions(name, family):
    model, ids = tiny(family), prompt(31)
    cache, stock = CompressedCache(model, name, 0.4), DynamicCache(config=model.config)
    prefill(model, ids, cache)
    prefill(model, ids, stock)
    for layer in cache.compressed_layers:
        positions = cache.kept_positions(layer.index).long()
        is_entry = positions >= 0
        assert bool(((positions.diff(dim=-1) > 0) | ~is_entry[..., 1:]).all())
        full, entries = stock.layers[layer.index], layer.storage.entries
        for own, whole in ((entries.keys, full.keys), (entries.values, full.values)):
            index = positions.clamp_min(0)[..., None].expand(-1, -1, -1, whole.shape[-1])
            torch.testing.assert_close(own[is_entry], whole.gather(2, index)[is_entry])


@every_family
@every_policy
def test_reported_bytes_equal_those_of_the_tensors(name, family):
    model = tiny(family)
    cache = CompressedCache(model, name, 0.3)
    answer(model, left_padded([prompt(33), prompt(20)]), cache, new=3)
    report = cache.report()
    sliding = [layer for layer in cache.layers if layer not in cache.compressed_layers]
    assert report.bytes_kept == sum(
        own.nbytes
        for own in [*(x for layer in cache.compressed_layers for x in layer.storage.buffers)]
        + [x for layer in sliding for x in (layer.keys, layer.values)]
    )
    for layer in cache.compressed_layers:
        # The memory behind the kept tensors holds at most a sixteenth of spare slots.
        if name != "full":
            for own in layer.storage.buffers:
                assert own.untyped_storage().nbytes() <= own.nbytes * 17 / 16
    stock = DynamicCache(config=model.config)
    answer(model, left_padded([prompt(33), prompt(20)]), stock, new=3)
    assert report.bytes_full == sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)


@every_family
@every_policy
def test_results_are_reproducible(name, family):
    model, inputs = tiny(family), {"input_ids": prompt(26)}
    caches = [CompressedCache(model, name, 0.4) for _ in range(2)]
    first, second = (answer(model, inputs, cache) for cache in caches)
    assert torch.equal(first, second)
    for layer in caches[0].compressed_layers:
        assert torch.equal(layer.storage.positions, caches[1].kept_positions(layer.index))


@every_family
@every_policy
def test_sinks_and_window_are_protected(name, family):
    model = tiny(family)
    cache = CompressedCache(model, name, 12, sinks=3, window=5)
    prefill(model, prompt(40), cache)
    for layer in cache.compressed_layers:
        for head in cache.kept_positions(layer.index)[0].tolist():
            assert {0, 1, 2, 35, 36, 37, 38, 39} <= set(head)


@every_family
@every_policy
def test_quantized_entries_are_those_of_the_cache_without_bits(name, family):
    """The prefill keeps the same entries, and with 8 bits the tokens after it get nearly the same logits."""
    model, inputs, question = tiny(family), left_padded([prompt(85), prompt(72)]), prompt(3, seed=1, rows=2)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(question)), 1)
    position_ids = (mask.cumsum(-1) - 1)[:, -question.shape[1] :]
    logits, caches = [], [CompressedCache(model, name, 60, bits=bits) for bits in (None, 8)]
    with torch.no_grad():
        for cache in caches:
            first = model(**inputs, past_key_values=cache).logits[:, -1]
            kept = {layer.index: cache.kept_positions(layer.index) for layer in cache.compressed_layers}
            later = model(question, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
            logits.append((first, later, kept))
    (first, later, kept), (first_quantized, later_quantized, kept_quantized) = logits
    assert torch.equal(first, first_quantized)
    for index, positions in kept.items():
        for own, others in zip(positions.flatten(0, 1), kept_quantized[index].flatten(0, 1), strict=True):
            assert torch.equal(own[own >= 0], others[others >= 0])
    differences, sizes = (later - later_quantized).norm(dim=-1), later.norm(dim=-1)
    assert 0 < (differences / sizes).median() < 0.05
    if family != "mixtral":  # whose router may choose other experts for a token after the smallest change
        assert differences.norm() < 0.05 * sizes.norm()
    errors = [error for head in caches[1].report().heads for error in (head.key_error, head.value_error)]
    assert all(0 < error < 0.02 for error in errors)
    assert caches[1].report().bytes_kept < caches[0].report().bytes_kept


@pytest.mark.parametrize(
    ("name", "allocation"),
    [*((name, None) for name in POLICIES), ("capkv", "adakv"), ("h2o", "marginal"), ("keydiff", "marginal")],
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("new", [7, 1])
def test_later_tokens_attend_to_exactly_the_kept_entries(name, allocation, attn, family, new, masked_attention):
    """The oracle is dense attention over all entries with a mask that hides the evicted ones of each head."""
    document, question = prompt(30, rows=2), prompt(new, seed=1, rows=2)
    model = build(family, attn)
    cache = CompressedCache(model, name, 0.4, allocation=allocation)
    prefill(model, document, cache)
    kept = {layer.index: cache.kept_positions(layer.index).long() for layer in cache.compressed_layers}
    got = prefill(model, question, cache).logits
    del cache

    hidden = {}
    for index, positions in kept.items():
        visible = (positions[..., None] == torch.arange(30)).any(2)
        hidden[index] = ~visible
    masked_attention.update(hidden)
    model.set_attn_implementation("test_masked")
    stock = DynamicCache(config=model.config)
    prefill(model, document, stock)
    expected = prefill(model, question, stock).logits
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.fixture
def masked_attention():
    """Eager attention that hides some prompt tokens of each head from queries after the prompt."""
    hidden: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling, **_):
        logits = query @ key.repeat_interleave(module.num_key_value_groups, 1).mT * scaling + attention_mask
        if module.layer_idx in hidden and query.shape[2] < key.shape[2]:
            evicted = hidden[module.layer_idx].repeat_interleave(module.num_key_value_groups, 1)
            logits[..., : evicted.shape[-1]].masked_fill_(evicted[:, :, None], float("-inf"))
        out = logits.softmax(-1) @ value.repeat_interleave(module.num_key_value_groups, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_masked", attend)
    AttentionMaskInterface.register("test_masked", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return hidden
