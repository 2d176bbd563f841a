"""Which layers of a model are compressed, and how the cache is built around the model's own cache."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from suffice.kv import CompressedCache, calibrate
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.prefill import prefill
from tests.kv.families import build as build_family
from tests.kv.families import model_classes, randomize, tiny_config
from tests.kv.family_cases import Case, MaskedOracle, get_case
from tests.kv.family_checks import CHECKS, kept_positions
from tests.kv.tiny import VOCABULARY, answer, left_padded, prompt

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3NextConfig": {**_LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Lfm2Config": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}


def build(config: str, attn: str = "sdpa", **changes: Any) -> Any:
    """Return a random model with this class of configuration; skip the test if transformers does not have it."""
    if not hasattr(transformers, config):
        pytest.skip(f"transformers has no {config}")
    torch.manual_seed(0)
    built = getattr(transformers, config)(**{**_SHARED, **_CONFIGS[config], **changes})
    return AutoModelForCausalLM.from_config(built, attn_implementation=attn).eval()


def has_layers_of_many_kinds() -> bool:
    """Return whether the cache of transformers has layers for the states of linear attention."""
    return hasattr(transformers.cache_utils, "LinearAttentionLayer")


@pytest.mark.skipif(not has_layers_of_many_kinds(), reason="hybrid models make caches of their own")
@pytest.mark.parametrize("config", ["Qwen3NextConfig", "Lfm2Config"])
def test_layers_without_attention_keep_the_states_of_the_models_own_cache(config):
    """A cache that keeps all gives the tokens of the stock cache; a padded batch gives those of single runs."""
    model = build(config)
    ids = prompt(40)
    expected = answer(model, {"input_ids": ids}, DynamicCache(config=model.config))
    assert torch.equal(answer(model, {"input_ids": ids}, CompressedCache(model, budget=1.0)), expected)
    cache = CompressedCache(model, "capkv-profile", 0.5, measure_capacity=False)
    answer(model, {"input_ids": ids}, cache, new=1)
    assert {head.layer for head in cache.report().heads} == {1}
    assert sum(head.tokens_kept for head in cache.report().heads) == 2 * 20
    prompts = [prompt(40), prompt(31, seed=2)]
    rows = answer(model, left_padded(prompts), CompressedCache(model, budget=0.5))
    single = [answer(model, {"input_ids": row}, CompressedCache(model, budget=0.5)) for row in prompts]
    assert torch.equal(rows, torch.cat(single))


@pytest.mark.skipif(not has_layers_of_many_kinds(), reason="hybrid models make caches of their own")
def test_profile_of_a_hybrid_model_is_the_largest_attention_of_its_attention_layers():
    """Against the attention weights that transformers' own eager attention returns."""
    model = build("Qwen3NextConfig", "eager")
    profile = calibrate(model, tokens=40, seed=3)
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attentions = model(torch.cat((ids, ids), 1), output_attentions=True).attentions
    assert profile.num_heads == [2]
    largest = attentions[-1][0, :, 40:, :40].amax(1)  # [heads, first copy]
    expected = largest.unflatten(0, (2, -1)).amax(1).mean(-1)
    torch.testing.assert_close(torch.tensor(profile.attention[0]), expected, atol=1e-5, rtol=1e-4)


_HYBRIDS = ("qwen3_next", "lfm2", "falcon_h1", "zamba2", "nemotron_h")
hybrids = pytest.mark.skipif(not has_layers_of_many_kinds(), reason="hybrid models make caches of their own")


def step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits of new tokens that continue from a cache."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


@hybrids
@pytest.mark.parametrize("family", _HYBRIDS)
def test_rows_are_repeated_and_selected_in_all_layers(family):
    model, ids = build_family(family), prompt(40)
    cache, single = (CompressedCache(model, "capkv", 12) for _ in range(2))
    step(model, ids, cache)
    step(model, ids, single)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    got = step(model, ids[:, :4].expand(2, -1), cache)
    wanted = step(model, ids[:, :4], single)
    torch.testing.assert_close(got, wanted.expand(2, -1, -1), rtol=1e-4, atol=1e-4)


@hybrids
@pytest.mark.parametrize("family", _HYBRIDS)
def test_copied_saved_and_shared_caches_hold_the_states_of_linear_attention(family, tmp_path):
    model = build_family(family)
    ids, more = prompt(40), prompt(5, seed=3)
    cache = CompressedCache(model, "capkv", 0.5, measure_capacity=False)
    step(model, ids, cache)
    saved = cache.save(model, tmp_path / "cache.safetensors")
    first, second = cache.copy(), copy.deepcopy(cache)
    expected = [step(model, token, first) for token in more.split(1, 1)]
    shared = [CompressedCache(model, "capkv", 0.5, measure_capacity=False) for _ in range(2)]
    prefill(model, {"input_ids": ids}, shared)
    for other in (second, cache, CompressedCache.load(saved, model), *shared):
        for token, logits in zip(more.split(1, 1), expected, strict=True):
            torch.testing.assert_close(step(model, token, other), logits)


@hybrids
@pytest.mark.parametrize("family", _HYBRIDS)
def test_rows_of_a_batch_of_caches_equal_single_caches(family):
    model = build_family(family)
    caches = [CompressedCache(model, "capkv-profile", 0.5, measure_capacity=False) for _ in range(2)]
    for seed, cache in enumerate(caches):
        step(model, prompt(40, seed=seed), cache)
    single = [cache.copy() for cache in caches]
    batch, tokens = BatchedCaches(caches), prompt(3, rows=2)
    for token in tokens.split(1, 1):
        logits = step(model, token, batch)
        expected = [step(model, row, cache) for row, cache in zip(token.split(1), single, strict=True)]
        torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)
    # What the batch has read is in each cache.
    for row, (cache, own) in enumerate(zip(caches, single, strict=True)):
        token = tokens[row : row + 1, :1]
        torch.testing.assert_close(step(model, token, cache), step(model, token, own), atol=1e-4, rtol=1e-4)


@hybrids
@pytest.mark.parametrize("family", ["falcon_h1", "zaya"])
def test_states_of_linear_attention_follow_the_rows_of_the_batch(family):
    """Beam search reorders, repeats and selects rows: the result equals that of the stock cache."""
    model = build_family(family)
    ids, options = prompt(20), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=CompressedCache(model, "capkv", 1.0), **options), expected)
    cache = CompressedCache(model, "capkv", 0.5, measure_capacity=False)
    step(model, prompt(20, rows=2), cache)
    rows = cache.copy()
    rows.batch_repeat_interleave(2)
    rows.batch_select_indices(torch.tensor([3, 0]))
    rows.reorder_cache(torch.tensor([1, 0]))
    tokens = prompt(1, rows=2)
    torch.testing.assert_close(step(model, tokens, rows), step(model, tokens, cache))


@hybrids
def test_failed_pass_of_a_model_with_linear_states_makes_the_cache_refuse():
    model = build_family("falcon_h1")
    cache = CompressedCache(model, "capkv", 0.5)
    step(model, prompt(20), cache)
    model.model.layers[-1].feed_forward.forward = None
    with pytest.raises(TypeError):
        step(model, prompt(1), cache)
    del model.model.layers[-1].feed_forward.forward
    with pytest.raises(ValueError, match="whose last forward pass failed"):
        step(model, prompt(1), cache)
    with pytest.raises(ValueError, match="whose last forward pass failed"):
        cache.crop(-1)
    complete = CompressedCache(model, "capkv", 0.5)
    step(model, prompt(20), complete)
    with pytest.raises(ValueError, match="crop must not be called"):
        complete.crop(-1)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gptj", "must call transformers' attention interface .*, whose GPTJAttention computes attention itself"),
        ("bloom", "must call transformers' attention interface .*, whose BloomAttention computes attention itself"),
        ("falcon", "must call transformers' attention interface .*, whose FalconAttention computes attention itself"),
        (
            "openai-gpt",
            "must have an attention module in each layer .*, got OpenAIGPTLMHeadModel without one",
        ),
        ("jetmoe", "must pass the keys and values of its cache .*, whose JetMoeAttention changes them in between"),
        ("mamba", "must (have a KV cache|use the DynamicCache of transformers), got MambaForCausalLM"),
        ("xlnet", "must use the DynamicCache of transformers, got XLNetLMHeadModel, which makes a cache of its own"),
        pytest.param(
            "deepseek_v32",
            "must have layers with full attention or a sliding window, got DeepseekV32ForCausalLM, whose cache",
            marks=pytest.mark.skipif(not has_layers_of_many_kinds(), reason="transformers does not have it"),
        ),
        pytest.param(
            "diffllama",
            "must pass the keys and values of its cache .*, whose DiffLlamaAttention changes them in between",
            marks=pytest.mark.skipif(not has_layers_of_many_kinds(), reason="it computes attention itself"),
        ),
        pytest.param(
            "qwen3_next",
            "must use the DynamicCache of transformers, got Qwen3NextForCausalLM, which makes a cache of its own",
            marks=pytest.mark.skipif(has_layers_of_many_kinds(), reason="it uses DynamicCache"),
        ),
    ],
)
def test_models_that_are_not_supported_are_refused_at_construction(family, message):
    """Each with the reason, before the model is run or changed."""
    model = build_family(family)
    model.forward = None
    selected = model.config._attn_implementation
    for policy in ("capkv", "capkv-profile"):
        with pytest.raises(ValueError, match=f"model {message}"):
            CompressedCache(model, policy)
    with pytest.raises(ValueError, match=f"model {message}"):
        calibrate(model)
    assert model.config._attn_implementation == selected


def test_layers_that_read_an_encoder_are_left_as_they_are():
    """Mllama's cross-attention layers read images: their keys do not grow with the text."""
    model = build_family("mllama")
    cross = model.config.text_config.cross_attention_layers
    cache = CompressedCache(model, "capkv", 0.5)
    assert {layer.index for layer in cache.compressed_layers} == set(range(len(cache.layers))) - set(cross)


def build_sharing(family: str) -> Any:
    """Return a model whose last layers read the keys of earlier ones."""
    if family == "gemma3n_text":
        return build_family(family)
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers has no Gemma 4")
    config = tiny_config(family)
    config.num_kv_shared_layers = 2
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    model_class = getattr(transformers, model_classes()[family])
    model = model_class._from_config(type(config)(**config.to_dict()), attn_implementation="sdpa")
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("name", ["full", "half", "equal", "always", "untouched", "padding"])
def test_layers_read_what_the_layer_keeps_whose_keys_they_read(family, name):
    """Against the stock model with the evicted entries masked in both layers."""
    CHECKS[name](Case(family, build_sharing(family)))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_shared_prefill_of_a_model_that_shares_keys_equals_single_prefills(family):
    model = build_sharing(family)
    ids = prompt(40)
    alone, together = (CompressedCache(model, "capkv-profile", 0.5, measure_capacity=False) for _ in range(2))
    step(model, ids, alone)
    prefill(model, {"input_ids": ids}, [together])
    batch = BatchedCaches([alone.copy(), alone.copy()])
    for token in prompt(3, seed=5).split(1, 1):
        expected = step(model, token, alone)
        torch.testing.assert_close(step(model, token, together), expected)
        torch.testing.assert_close(step(model, token.expand(2, -1), batch), expected.expand(2, -1, -1))
    assert not hasattr(alone, "shared_layers")


def test_profile_counts_the_attention_of_every_layer_that_reads_the_keys():
    """Against the attention weights that transformers' own eager attention returns."""
    model = build_sharing("gemma3n_text")
    model.set_attn_implementation("eager")
    profile = calibrate(model, tokens=40, seed=3)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attentions = model(torch.cat((ids, ids), 1), output_attentions=True).attentions
    first_reader = model.config.num_hidden_layers - model.config.num_kv_shared_layers
    full = [index for index, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    source = [index for index in full if index < first_reader][-1]
    layers = [source, *(index for index in full if index >= first_reader)]
    assert len(layers) > 1
    largest = torch.stack([attentions[layer][0, :, 40:, :40].amax(1) for layer in layers]).amax(0)
    expected = largest.unflatten(0, (profile.num_heads[-1], -1)).amax(1).mean(-1)
    torch.testing.assert_close(torch.tensor(profile.attention[-1]), expected, atol=1e-5, rtol=1e-4)


_LATENTS = ("deepseek_v3", "glm4_moe_lite", "kimi_linear")
latents = pytest.mark.skipif(not has_layers_of_many_kinds(), reason="early versions cache the keys of all heads")


@latents
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "longcat_flash"])
def test_latents_are_scored_as_one_head_with_the_attention_of_all_heads(family):
    """Scores of H2O against the attention weights that transformers' own eager attention returns."""
    model = build_family(family)
    model.set_attn_implementation("eager")
    ids = prompt(30)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    cache = CompressedCache(model, "h2o", 12, sinks=0, window=0)
    step(model, ids, cache)
    kept = [layer.storage.positions[0].tolist() for layer in cache.compressed_layers]
    assert len(attentions) == len(kept)
    for attention, positions in zip(attentions, kept, strict=True):
        received = attention[0].sum((0, 1))
        assert positions == [sorted(received.topk(12).indices.tolist())]


@latents
@pytest.mark.parametrize("family", _LATENTS)
@pytest.mark.parametrize("policy", ["criticalkv", "capkv-profile"])
def test_caches_of_latents_are_copied_saved_shared_and_batched(family, policy, tmp_path):
    model = build_family(family)
    ids, more = prompt(40), prompt(4, seed=3)
    cache = CompressedCache(model, policy, 0.5, measure_capacity=False)
    step(model, ids, cache)
    assert {storage.num_kept.shape[1] for storage in (layer.storage for layer in cache.compressed_layers)} == {1}
    saved = cache.save(model, tmp_path / "cache.safetensors")
    batch = BatchedCaches([cache.copy(), cache.copy()])
    first = cache.copy()
    expected = [step(model, token, first) for token in more.split(1, 1)]
    shared = [CompressedCache(model, policy, 0.5, measure_capacity=False) for _ in range(2)]
    prefill(model, {"input_ids": ids}, shared)
    for other in (cache, CompressedCache.load(saved, model), *shared):
        for token, logits in zip(more.split(1, 1), expected, strict=True):
            torch.testing.assert_close(step(model, token, other), logits)
    for token, logits in zip(more.split(1, 1), expected, strict=True):
        torch.testing.assert_close(step(model, token.expand(2, -1), batch), logits.expand(2, -1, -1))


@latents
def test_output_weights_map_latents_to_the_output():
    """The product with a latent equals the output projection of the values of all heads, one head at a time."""
    model = build_family("deepseek_v3")
    cache = CompressedCache(model, "capkv", 0.5)
    layer, module = cache.compressed_layers[0], model.model.layers[0].self_attn
    c, r = torch.randn(1, 1, 5, module.kv_lora_rank), torch.randn(1, 1, 5, module.qk_rope_head_dim)
    layer._latents = c, r
    weight = layer.output_weight()().unflatten(1, (module.num_heads, -1))
    _, values = module.expand_kv(c, r)
    for head in range(module.num_heads):
        only = torch.zeros_like(values)
        only[:, head] = values[:, head]
        expected = module.o_proj(only.transpose(1, 2).flatten(2))
        torch.testing.assert_close(c[:, 0] @ weight[:, head].T, expected, atol=1e-4, rtol=1e-4)


@latents
def test_settings_that_latents_do_not_support_are_refused():
    model = build_family("deepseek_v3")
    with pytest.raises(ValueError, match="allocation must give each layer a budget of its own for DeepseekV3ForCausal"):
        CompressedCache(model, "capkv", allocation="marginal")
    with pytest.raises(ValueError, match="rerotate must be False for DeepseekV3ForCausalLM"):
        CompressedCache(model, "capkv", rerotate=True)


@latents
def test_latents_of_several_threads_stay_apart(monkeypatch):
    model = build_family("deepseek_v3")
    prompts = [prompt(30 + 5 * number) for number in range(3)]
    expected = [step(model, ids, CompressedCache(model, "capkv", 12)) for ids in prompts]
    # All threads give their latents to a layer before one of them computes its attention.
    barrier, kind = threading.Barrier(len(prompts), timeout=10), type(model.model.layers[0].self_attn)
    expand = kind.expand_kv

    def expand_together(module, latents, rotated):
        barrier.wait()
        return expand(module, latents, rotated)

    monkeypatch.setattr(kind, "expand_kv", expand_together)
    got = {}

    def read(number):
        got[number] = step(model, prompts[number], CompressedCache(model, "streaming-llm", 12))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        torch.testing.assert_close(got[number], logits)


@latents
def test_profile_of_latents_is_the_largest_attention_of_all_heads():
    model = build_family("deepseek_v3")
    model.set_attn_implementation("eager")
    profile = calibrate(model, tokens=40, seed=3)
    ids = torch.randint(model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attentions = model(torch.cat((ids, ids), 1), output_attentions=True).attentions
    for numbers, attention in zip(profile.attention, attentions, strict=True):
        expected = attention[0, :, 40:, :40].amax((0, 1)).mean()
        torch.testing.assert_close(torch.tensor(numbers), expected[None], atol=1e-5, rtol=1e-4)


_SLIDING = ("mistral", "moshi", "recurrent_gemma")


@pytest.mark.parametrize("family", _SLIDING)
@pytest.mark.parametrize("name", ["full", "half", "equal", "always", "padding", "window"])
def test_layers_of_models_with_sliding_windows_only_are_compressed(family, name):
    """Against the stock model with the evicted entries masked, for prompts longer and shorter than the window."""
    if family != "mistral" and not has_layers_of_many_kinds():
        pytest.skip("it makes a cache of its own, or computes attention itself")
    CHECKS[name](Case(family, build_family(family)))


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile", "h2o"])
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_entries_that_left_the_window_are_dropped(policy, evict):
    """Every token is compared with a full cache, whose mask has the window and hides what is not kept."""
    model = build_family("mistral")  # a window of 16 tokens
    ids = torch.cat((prompt(40), prompt(50, seed=1)), 1)
    cache = CompressedCache(model, policy, 8, evict=evict, interval=3)
    step(model, ids[:, :40], cache)
    oracle = MaskedOracle(Case("mistral", model))
    oracle.forward(ids[:, :40], {})
    for position, token in enumerate(ids[:, 40:].split(1, 1), 40):
        kept = kept_positions(cache)
        logits = step(model, token, cache)
        torch.testing.assert_close(logits, oracle.forward(token, kept), atol=1e-3, rtol=1e-3)
        for layer in cache.compressed_layers:
            positions = layer.storage.positions
            assert positions.max() == position
            assert positions[positions >= 0].min() > position - 16
    assert max(head.tokens_kept for head in cache.report().heads) <= 16
    assert cache.report().bytes_full == 15 * 2 * cache.compressed_layers[0].storage.bytes_per_entry * 4


def test_text_that_fits_into_the_window_is_compressed_as_with_full_attention():
    windowed, full = (build_family("mistral", window=window) for window in (64, 10_000))
    for policy in ("capkv", "snapkv", "capkv-profile"):
        kept = []
        for model in (windowed, full):
            cache = CompressedCache(model, policy, 0.5)
            step(model, prompt(40), cache)
            kept.append([layer.storage.positions for layer in cache.compressed_layers])
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_caches_of_sliding_windows_are_copied_saved_shared_and_batched(tmp_path):
    model = build_family("mistral")
    ids, more = prompt(40), prompt(20, seed=3)
    cache = CompressedCache(model, "capkv-profile", 0.5, measure_capacity=False)
    step(model, ids, cache)
    saved = cache.save(model, tmp_path / "cache.safetensors")
    batch, first = BatchedCaches([cache.copy(), cache.copy()]), cache.copy()
    expected = [step(model, piece, first) for piece in more.split([1, 4, 1, 14], 1)]
    shared = [CompressedCache(model, "capkv-profile", 0.5, measure_capacity=False) for _ in range(2)]
    prefill(model, {"input_ids": ids}, shared)
    for other in (cache, CompressedCache.load(saved, model), *shared):
        for piece, logits in zip(more.split([1, 4, 1, 14], 1), expected, strict=True):
            torch.testing.assert_close(step(model, piece, other), logits)
    for piece, logits in zip(more.split([1, 4, 1, 14], 1), expected, strict=True):
        torch.testing.assert_close(step(model, piece.expand(2, -1), batch), logits.expand(2, -1, -1))


def test_settings_that_sliding_windows_do_not_support_are_refused():
    model = build_family("mistral")
    with pytest.raises(ValueError, match="allocation must give each layer a budget of its own for MistralForCausalLM"):
        CompressedCache(model, "capkv", allocation="marginal")
    with pytest.raises(ValueError, match="rerotate must be False for MistralForCausalLM"):
        CompressedCache(model, "capkv", rerotate=True)
    cache = CompressedCache(model, "capkv")
    step(model, prompt(20), cache)
    with pytest.raises(ValueError, match="crop must be called while the text is shorter than the window of 16 tokens"):
        cache.crop(-1)
    assert not cache.compressed_layers[0].is_croppable


@pytest.mark.parametrize("family", ["m2m_100", "pegasus_x", "florence2"])
@pytest.mark.parametrize("name", ["full", "half", "equal", "always", "padding"])
def test_self_attention_of_decoders_with_an_encoder_is_compressed(family, name):
    """Against the stock model with the evicted entries masked; cross-attention reads all of the encoder."""
    CHECKS[name](Case(family, build_family(family)))


def test_cache_of_an_encoder_decoder_model_must_come_with_one_for_cross_attention():
    model = build_family("m2m_100")
    inputs = {"input_ids": prompt(20), "decoder_input_ids": prompt(10)}
    cache = CompressedCache(model, "capkv")
    with pytest.raises(ValueError, match=r"past_key_values must be EncoderDecoderCache\(CompressedCache"):
        model(**inputs, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


_KINDS = ["gemma3", "gemma3n_text", "gpt_oss", "lfm2", "qwen3_next", "jamba", "falcon_h1", "deepseek_v3", "mistral"]


@pytest.mark.parametrize("family", _KINDS)
def test_caches_that_autograd_has_recorded_are_copied_saved_and_reset(family, tmp_path):
    """Sliding windows, linear states and latents: copies continue as a cache without gradients does."""
    if family not in model_classes():
        pytest.skip("needs a newer transformers")
    case = get_case(family)
    if transformers.__version__.startswith("5.2.") and family in ("gemma3", "gemma3n_text", "gpt_oss"):
        pytest.skip("needs a newer transformers: 5.2 masks several tokens behind a sliding window wrongly")
    try:
        cache, plain = (CompressedCache(case.model, "capkv", 0.5) for _ in range(2))
    except ValueError as error:  # test_families.py checks that the newest transformers is supported
        pytest.skip(f"needs a newer transformers: {error}")
    ids, more = case.prompt(), case.prompt(3, seed=1)
    with torch.enable_grad():
        case.model(ids, past_key_values=cache)
    case.forward(ids, plain)
    saved = cache.save(case.model, tmp_path / "cache.safetensors")
    first, batch, loaded = cache.copy(), BatchedCaches([cache.copy()]), CompressedCache.load(saved, case.model)
    copied = copy.deepcopy(batch)
    expected = step(case.model, more, plain)
    for other in (first, batch, copied, loaded):
        torch.testing.assert_close(step(case.model, more, other), expected)
    cache.reset()
    case.forward(ids, cache)
    torch.testing.assert_close(step(case.model, more, cache), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_flow_through_copies(family):
    case = get_case(family)
    ids, more = case.prompt(), case.prompt(3, seed=1)
    embedding = case.model.get_input_embeddings().weight
    with torch.enable_grad():
        cache = CompressedCache(case.model, "full", 1.0)
        case.model(ids, past_key_values=cache)
        logits = [case.model(more, past_key_values=own).logits for own in (cache.copy(), cache)]
        gradients = [torch.autograd.grad(x.sum(), embedding, retain_graph=True)[0] for x in logits]
    assert bool((gradients[0][ids.unique()] != 0).any(-1).all())  # not only the new tokens
    torch.testing.assert_close(*gradients)
