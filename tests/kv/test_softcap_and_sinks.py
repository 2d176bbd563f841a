"""Models whose attention has a soft cap of the logits (Gemma 2, VaultGemma) or attention sinks (GPT-OSS)."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    VaultGemmaConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from suffice.kv import CompressedCache
from suffice.kv.budget.calibration import calibrate
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.layer_context import EntryPositions
from suffice.kv.policy.sampled_attention import sampled_attention
from suffice.kv.policy.weights import AccumulatedAttention, WindowAttention
from tests.kv.tiny import VOCABULARY, answer, left_padded, prompt

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.4,
}
LAYER_TYPES = ["full_attention", "sliding_attention"] * 2
CONFIGS = {
    "gemma2": lambda: Gemma2Config(
        **SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, layer_types=LAYER_TYPES, sliding_window=12
    ),
    "vaultgemma": lambda: VaultGemmaConfig(
        **SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, layer_types=LAYER_TYPES, sliding_window=12
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=LAYER_TYPES, sliding_window=12
    ),
}
every_model = pytest.mark.parametrize("name", CONFIGS)


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0, 2.0)
    return model


tiny = functools.cache(build)


def read(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@every_model
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv", "h2o"])
def test_full_budget_generates_the_same_tokens_as_the_stock_cache(name, policy):
    model, inputs = tiny(name), {"input_ids": prompt(40)}
    assert torch.equal(answer(model, inputs, CompressedCache(model, policy, 1.0)), answer(model, inputs))


@every_model
@pytest.mark.parametrize("evict", ["prefill", "always"])
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_rows_of_a_padded_batch_equal_single_runs(name, policy, evict):
    model, prompts = tiny(name), [prompt(30), prompt(44)]
    cache = CompressedCache(model, policy, 0.5, evict=evict)
    together = answer(model, left_padded(prompts), cache)
    for row, own in enumerate(prompts):
        alone = CompressedCache(model, policy, 0.5, evict=evict)
        assert torch.equal(answer(model, {"input_ids": own}, alone)[0], together[row])


@every_model
@pytest.mark.parametrize("allocation", ["profile", "adakv", "equal"])
@pytest.mark.parametrize("new", [7, 1])
def test_later_tokens_attend_to_exactly_the_kept_entries(name, allocation, new, masked_attention):
    document, question = prompt(40, rows=2), prompt(new, seed=1, rows=2)
    model = build(name)
    cache = CompressedCache(model, "capkv", 0.4, allocation=allocation)
    read(model, cache, document)
    kept = {layer.index: cache.kept_positions(layer.index).long() for layer in cache.compressed_layers}
    got = [read(model, cache, question), read(model, cache, question[:, :1])]
    del cache
    for index, positions in kept.items():
        masked_attention[index] = ~(positions[..., None] == torch.arange(40)).any(2)
    model.set_attn_implementation("test_masked_softmax")
    stock = DynamicCache(config=model.config)
    read(model, stock, document)
    torch.testing.assert_close(got[0], read(model, stock, question), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], read(model, stock, question[:, :1]), atol=2e-4, rtol=1e-4)


@pytest.fixture
def masked_attention():
    """Attention with soft cap and sinks that hides some prompt tokens of each head from queries after the prompt."""
    hidden = {}

    def attend(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **_):
        groups = module.num_key_value_groups
        logits = query @ key.repeat_interleave(groups, 1).mT * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits + attention_mask
        if module.layer_idx in hidden and query.shape[2] < key.shape[2]:
            evicted = hidden[module.layer_idx].repeat_interleave(groups, 1)
            logits[..., : evicted.shape[-1]].masked_fill_(evicted[:, :, None], float("-inf"))
        if s_aux is not None:
            logits = torch.cat((logits, s_aux[:, None, None].expand(*logits.shape[:-1], 1)), dim=-1)
        weights = logits.softmax(-1)[..., : key.shape[2]]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_masked_softmax", attend)
    AttentionMaskInterface.register("test_masked_softmax", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return hidden


@pytest.mark.parametrize("padding", [0, 9])
def test_scores_are_the_probabilities_of_the_model(padding):
    """Oracle: softmax over all logits and the sink, in float64, of each query alone."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    softcap, sinks = 1.5, torch.tensor([-3.0, 0.0, 2.0, 5.0])
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, :padding] = False
    exact = torch.zeros(2, 4, 50, 50, dtype=torch.float64)
    sampled = torch.zeros(2, 2, 50, dtype=torch.float64)
    for row in range(2):
        first = padding * row
        num_valid = 50 - first
        chosen = [first + (step * num_valid + 3) // 4 - 1 for step in range(1, 5)]
        chosen = [query for query in chosen if query - 6 >= first]
        for head in range(4):
            logits = 0.5 * queries[row, head].double() @ keys[row, head // 2].double().T
            logits = softcap * (logits / softcap).tanh()
            for query in range(first, 50):
                own = torch.cat((logits[query, first : query + 1], sinks[head : head + 1].double())).softmax(0)
                exact[row, head, query, first : query + 1] = own[:-1]
            for query in chosen:
                far = logits[query, first : query - 5].softmax(0)
                sampled[row, head // 2, first : query - 5] += far / (2 * len(chosen))
    positions = EntryPositions(valid=valid) if padding else None
    stats = AttentionStats(queries, keys, values, positions=positions, scaling=0.5, softcap=softcap, sink_logits=sinks)
    grouped = exact.view(2, 2, 2, 50, 50)
    options = {"atol": 1e-6, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(stats.attention_received(block_size=16), grouped.sum(3).mean(2), **options)
    torch.testing.assert_close(stats.window_attention(7), grouped[:, :, :, -7:].mean((2, 3)), **options)
    torch.testing.assert_close(sampled_attention(stats, 4, 6), sampled, **options)
    window = WindowAttention(window_size=7, kernel_size=1).log_weights(stats).exp()
    torch.testing.assert_close(window, grouped[:, :, :, -7:].mean((2, 3)), **options)
    received = AccumulatedAttention().log_weights(stats).exp()
    torch.testing.assert_close(received, grouped.sum(3).mean(2), **options)


def test_window_attention_applies_the_soft_cap_without_sinks():
    torch.manual_seed(0)
    tensors = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    stats = AttentionStats(*tensors, softcap=0.7)
    expected = stats.window_attention_weights(5).mean((2, 3))
    torch.testing.assert_close(stats.window_attention(5), expected)
    assert not torch.allclose(AttentionStats(*tensors).window_attention(5), expected, atol=1e-3)


def test_head_profile_is_measured_with_the_sinks_of_the_model():
    """A sink that takes most of the attention of a head leaves less for its entries."""
    model = build("gpt_oss")
    before = calibrate(model, tokens=300)
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks[:2] = 50.0  # the query heads of KV head 0
    after = calibrate(model, tokens=300)
    assert after.attention[0][0] < before.attention[0][0] / 3
    assert after.attention[0][1] == pytest.approx(before.attention[0][1], rel=1e-5)
