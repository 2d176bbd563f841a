"""`output_attentions=True` returns the weights of every layer over its kept entries, in every pass."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, OPTConfig

from suffice.kv import BatchedCaches, CompressedCache
from tests.kv.test_softcap_and_sinks import build as build_softmax_model
from tests.kv.tiny import VOCABULARY, build, left_padded, prompt


def model_of(family):
    return build_softmax_model(family) if family in ("gemma2", "gpt_oss") else build(family, "eager")


def read(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask, output_attentions=True).attentions


@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_weights_equal_those_of_the_full_cache_renormalized(family, policy):
    """Only the first compressed layer has the same queries as with the full cache; later ones read other inputs."""
    model, question = model_of(family), prompt(3, seed=1, rows=2)
    cache, stock = CompressedCache(model, policy, 0.5), DynamicCache(config=model.config)
    ids, mask = left_padded([prompt(40), prompt(29)]).values()
    for own, full in zip(read(model, cache, ids, mask), read(model, stock, ids, mask), strict=True):
        torch.testing.assert_close(own, full)
    mask = torch.cat((mask, mask.new_ones(2, 3)), dim=1)
    attentions, expected = read(model, cache, question, mask), read(model, stock, question, mask)
    assert len(attentions) == model.config.num_hidden_layers
    for layer in cache.compressed_layers:
        positions = cache.kept_positions(layer.index).repeat_interleave(2, 1)  # of query heads
        own, full = attentions[layer.index], expected[layer.index]
        assert own.shape == (2, 4, 3, positions.shape[2])
        empty = (positions < 0)[:, :, None]
        assert own.masked_select(empty).eq(0).all()
    first = cache.compressed_layers[0].index
    own, full = attentions[first], expected[first]
    positions = cache.kept_positions(first).long().repeat_interleave(2, 1)
    padding = torch.tensor([0, 11])[:, None, None]
    index = (positions + padding).clamp_min(0)[:, :, None].expand(-1, -1, 3, -1)
    same = full.gather(3, index).masked_fill((positions < 0)[:, :, None], 0)
    # The denominator of the softmax loses the evicted entries, and keeps the sink if there is one.
    evicted = full.sum(-1, keepdim=True) - same.sum(-1, keepdim=True)
    torch.testing.assert_close(own * (1 - evicted), same, atol=1e-6, rtol=1e-4)


def test_models_that_do_not_pass_the_option_on_return_weights_of_every_layer():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}
    config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for policy in ("capkv-profile", "capkv"):
        cache = CompressedCache(model, policy, 0.5, allocation="adakv" if policy == "capkv-profile" else None)
        for new, width in ((40, 40), (3, None)):
            attentions = read(model, cache, prompt(new))
            assert len(attentions) == 2
            if None in attentions:
                pytest.skip("OPT of this version neither passes the option on nor lets transformers record weights")
            for layer, weights in enumerate(attentions):
                assert weights.shape[-1] == (width or cache.kept_positions(layer).shape[-1])
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_kernel_implementations_return_no_weights():
    model = build("llama")
    for policy in ("capkv-profile", "capkv"):
        cache = CompressedCache(model, policy, 0.5)
        assert not read(model, cache, prompt(30))
        assert not read(model, cache, prompt(2))


def test_weights_are_computed_only_if_they_are_wanted(monkeypatch):
    model, cache = build("llama", "eager"), None
    monkeypatch.setattr("suffice.kv.storage.attention_weights.attention_weights", None)
    cache = CompressedCache(model, "capkv-profile", 0.5)
    with torch.no_grad():
        model(prompt(30), past_key_values=cache)
        model(prompt(2), past_key_values=cache)


def test_results_do_not_depend_on_whether_weights_are_returned():
    model, positions = build("llama", "eager"), []
    for wanted in (False, True):
        cache = CompressedCache(model, "capkv-profile", 20, evict="always", interval=4)
        with torch.no_grad():
            for number, length in enumerate((30, 9, 1, 1, 1, 1, 1)):
                model(prompt(length, seed=number), past_key_values=cache, output_attentions=wanted)
        positions.append([cache.kept_positions(layer.index) for layer in cache.compressed_layers])
    assert all(torch.equal(*pair) for pair in zip(*positions, strict=True))


def test_rows_of_batched_caches_are_right_aligned():
    model = build("llama", "eager")
    caches = [CompressedCache(model, policy, budget) for policy, budget in (("capkv-profile", 0.5), ("capkv", 0.2))]
    for cache in caches:
        read(model, cache, prompt(40))
    alone = [read(model, cache.copy(), prompt(2)) for cache in caches]
    together = read(model, BatchedCaches(caches), prompt(2).expand(2, -1))
    for layer, weights in enumerate(together):
        for row, own in enumerate(alone):
            width = own[layer].shape[-1]
            torch.testing.assert_close(weights[row, ..., -width:], own[layer][0], atol=1e-5, rtol=1e-4)
            assert weights[row, ..., :-width].eq(0).all()
