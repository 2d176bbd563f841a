"""Head profiles: what is measured, where profiles are stored, and which model they belong to."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from suffice.kv import CompressedCache
from suffice.kv.budget.allocation import BudgetRequest
from suffice.kv.budget.calibration import calibrate, get_profile
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.profile import Profile, read_profile, write_profile
from suffice.kv.budget.profile_from_weights import profile_from_weights
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.policy.layer_context import LayerContext
from tests.kv.tiny import FAMILIES, VOCABULARY, build, prompt, tiny


@pytest.fixture(autouse=True)
def _empty_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUFFICE_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_profile_is_the_largest_attention_while_the_text_is_repeated(family):
    """Against the attention weights that transformers' own eager attention returns."""
    model = build(family, "eager")
    profile = calibrate(model, tokens=40, seed=3)
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attentions = model(torch.cat((ids, ids), 1), output_attentions=True).attentions
    for numbers, attention in zip(profile.attention, attentions, strict=True):
        largest = attention[0, :, 40:, :40].amax(1)  # [heads, first copy]
        expected = largest.unflatten(0, (len(numbers), -1)).amax(1).mean(-1)
        torch.testing.assert_close(torch.tensor(numbers), expected, atol=1e-5, rtol=1e-4)


def test_only_layers_with_full_attention_are_measured():
    model = tiny("gemma3")
    config = model.config.get_text_config()
    full = [kind for kind in config.layer_types if kind == "full_attention"]
    assert len(calibrate(model, tokens=32).attention) == len(full) < config.num_hidden_layers


def test_profile_is_measured_once_and_the_measurement_is_logged(caplog, tmp_path):
    model = tiny("llama")
    first = get_profile(model)
    assert "measuring the head profile" in caplog.text
    caplog.clear()
    second = get_profile(model)
    assert not caplog.text
    assert second.model == first.model == fingerprint(model)
    for measured, stored in zip(first.attention, second.attention, strict=True):
        assert measured == pytest.approx(stored, rel=1e-4)
    assert read_profile(tmp_path / "profiles" / f"{first.model}.json") == second


def test_stored_profile_is_preferred_to_a_new_measurement():
    model = tiny("llama")
    stored = calibrate(model, tokens=33)
    write_profile(stored)
    assert get_profile(model).source == stored.source == "33 random tokens, seed 0"


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_the_same_in_every_dtype(family):
    model = build(family)
    original = fingerprint(model)
    assert fingerprint(build(family, "eager")) == original
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(build(family).to(dtype)) == original
        assert fingerprint(build(family).to(dtype), exact=True) != fingerprint(model, exact=True)


def test_magnitudes_of_the_fingerprint_survive_rounding_to_bfloat16():
    """No weight can be between two magnitudes in one dtype and not in the other: bfloat16 weights are the reference."""
    model = build("llama")
    for parameter in model.get_decoder().parameters():
        # Numbers around all boundaries between magnitudes, closer together than bfloat16 can tell apart.
        parameter.data = torch.linspace(0.99, 1.52, parameter.numel()).view_as(parameter)
    for scale in torch.linspace(0.5, 2, 40).tolist():
        scaled = copy.deepcopy(model)
        for parameter in scaled.parameters():
            parameter.data *= scale
        assert fingerprint(scaled) == fingerprint(scaled.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("up_proj", torch.Tensor.neg),
        ("norm", lambda weight: 1.5 * weight),
        ("v_proj", lambda weight: 0.1 * weight),
        ("v_proj", lambda weight: 0.5 * weight),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_fingerprint_depends_on_signs_and_magnitudes(part, change, exact):
    model = build("llama")
    original = fingerprint(model, exact=exact)
    with torch.no_grad():
        for name, weight in model.get_decoder().named_parameters():
            if part in name:
                weight.copy_(change(weight))
    assert fingerprint(model, exact=exact) != original


def test_exact_fingerprint_depends_on_small_changes_and_on_packed_weights():
    model = build("llama")
    projection = model.get_decoder().layers[1].self_attn.v_proj
    seen = {fingerprint(model, exact=True)}
    with torch.no_grad():
        projection.weight *= 1.001
        seen.add(fingerprint(model, exact=True))
        # Quantized weights are integers, whose dtype does not depend on that of the model.
        for values in (range(5), range(1, 6)):
            projection.register_buffer("packed", torch.tensor(values, dtype=torch.uint8))
            seen |= {fingerprint(model), fingerprint(model, exact=True)}
    assert len(seen) == 6


def test_calibration_restores_the_attention_implementation():
    model = tiny("llama")
    before = model.config._attn_implementation
    calibrate(model, tokens=32)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (31, "tokens must be at least 32, got 31"),
        (300, "tokens must be at most 240 for this model, .* got 300"),
    ],
)
def test_number_of_tokens_is_checked(tokens, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny("llama"), tokens=tokens)


def test_profile_of_another_model_is_rejected():
    profile = calibrate(tiny("qwen2"), tokens=32)
    with pytest.raises(ValueError, match=f"profile must be of this model .*, got one of the model {profile.model}"):
        CompressedCache(tiny("llama"), allocation=HeadProfile(profile))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"attention": [[1.0]]}', '{"model": "m", "source": "s", "attention": [[0]]}']
)
def test_file_without_a_profile_is_named_in_the_error(tmp_path, content):
    file = tmp_path / "profile.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"profile\.json must contain a head profile, got other content"):
        read_profile(file)


@pytest.mark.parametrize(
    ("version", "remedy"), [(None, "Measure it again with `suffice kv calibrate`"), (3, "Update suffice")]
)
def test_profile_in_another_format_is_rejected(tmp_path, version, remedy):
    """Early versions wrote no format, and identified models in another way."""
    file = write_profile(calibrate(tiny("llama"), tokens=32), tmp_path / "mine.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["format"]
    file.write_text(json.dumps(content if version is None else {**content, "format": version}), encoding="utf-8")
    message = rf"mine\.json must contain a head profile of format 2, got one of format {version or 1}\. {remedy}"
    with pytest.raises(ValueError, match=message):
        read_profile(file)


def test_profile_is_stored_as_plain_json(tmp_path):
    path = write_profile(calibrate(tiny("llama"), tokens=32), tmp_path / "out" / "mine.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"format", "model", "source", "attention"}
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ((), r"at least one layer, and at least one head in every layer, got \[\] heads"),
        (((0.1, 0.2), ()), r"at least one layer, and at least one head in every layer, got \[2, 0\] heads"),
        (((0.1, 0.0),), "a positive finite number for every head, got 0.0"),
        (((0.1, float("nan")),), "a positive finite number for every head, got nan"),
    ],
)
def test_profile_must_be_a_table_of_positive_numbers(attention, message):
    with pytest.raises(ValueError, match=message):
        Profile(attention, "model", "source")


def test_head_profile_requires_a_profile_with_the_shape_of_the_model():
    request = BudgetRequest((8,), (20,), (0,), torch.full((1, 2), 20), lambda: torch.rand(1, 2, 20), LayerContext(0, 3))
    with pytest.raises(ValueError, match="profile must be a Profile, got None"):
        HeadProfile().entries_per_head(request)
    with pytest.raises(ValueError, match="must have 3 layers and, in layer 0, 2 heads, got 1 layers with 2 heads"):
        HeadProfile(Profile(((0.1, 0.2),), "model", "source")).entries_per_head(request)


def test_layers_may_have_different_numbers_of_heads():
    """Each head of a layer gets what it would get in a table with one layer, and the total is met exactly."""
    attention = ((0.1, 0.4, 0.3), (0.9,), (0.2, 0.05))
    allocation = HeadProfile(Profile(attention, "model", "source"))
    flat = HeadProfile(Profile((sum(attention, ()),), "model", "source"))
    for budget in (4, 17, 60, 100):
        entries = allocation.entries(budget, 100, min_entries=4)
        assert [len(layer) for layer in entries] == [3, 1, 2]
        assert [count for layer in entries for count in layer] == flat.entries(budget, 100, min_entries=4)[0]
        assert sum(sum(layer) for layer in entries) == 6 * budget
    contributions = torch.rand(1, 1, 100)
    request = BudgetRequest((17,), (100,), (4,), torch.full((1, 1), 100), lambda: contributions, LayerContext(1, 3))
    assert allocation.entries_per_head(request).tolist() == [allocation.entries(17, 100, 4)[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_profile_from_weights_is_the_share_of_slow_pairs(family):
    model = build(family)
    profile = profile_from_weights(model)
    layers = CompressedCache(model, "capkv").compressed_layers
    assert len(profile.attention) == len(layers)
    for numbers, layer in zip(profile.attention, layers, strict=True):
        module = model.get_decoder().layers[layer.index].self_attn
        dim = module.head_dim
        if hasattr(module, "qkv_proj"):
            q, k, _ = module.qkv_proj.weight.split([4 * dim, 2 * dim, 2 * dim])
        else:
            q, k = module.q_proj.weight, module.k_proj.weight
        q, k = q.unflatten(0, (2, 2, dim)), k.unflatten(0, (2, dim))
        if hasattr(module, "q_norm"):
            ones = torch.ones(dim)
            q, k = q * module.q_norm(ones)[:, None], k * module.k_norm(ones)[:, None]
        energies = []
        for pair in range(dim // 2):
            both = [pair, pair + dim // 2]
            energies.append(q[:, :, both].flatten(2).norm(dim=-1) * k[:, both].flatten(1).norm(dim=-1)[:, None])
        energies = torch.stack(energies, -1)
        base = 1e6 if family in ("gemma3", "mixtral") else 1e4
        turns = 512 * torch.tensor(base) ** (-torch.arange(dim // 2) * 2 / dim) / (2 * torch.pi)
        assert 0 < int((turns < 1).sum()) < dim // 2
        share = energies[..., turns < 1].sum(-1) / energies.sum(-1)
        torch.testing.assert_close(torch.tensor(numbers), share.amax(-1).detach() ** 8.5, rtol=1e-4, atol=1e-9)


def test_head_with_slow_pairs_only_keeps_the_most_entries():
    model = build("llama")
    module = model.get_decoder().layers[1].self_attn
    with torch.no_grad():  # the second KV head keeps only its slowest pair
        module.k_proj.weight[12:][[i for i in range(12) if i not in (5, 11)]] = 0
    profile = profile_from_weights(model)
    largest = max(value for layer in profile.attention for value in layer)
    assert profile.attention[1][1] == largest == pytest.approx(1)
    cache = CompressedCache(model, budget=40, allocation=HeadProfile(profile=profile))
    model(prompt(90), past_key_values=cache)
    kept = {(head.layer, head.head): head.tokens_kept for head in cache.report().heads}
    assert max(kept, key=kept.get) == (1, 1)


def test_profile_from_weights_requires_known_projections():
    model = build("llama")
    for layer in model.get_decoder().layers:
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ValueError, match="must have q_proj and k_proj, or qkv_proj, got LlamaAttention"):
        profile_from_weights(model)


def test_models_that_cannot_be_measured_are_rejected():
    short = build("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"must be at least 96 tokens .*, got 64\. Use the allocation 'equal'"):
        CompressedCache(short)
    model = build("llama", seed=5)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model must have finite attention .*, got NaN or infinite values"):
        CompressedCache(model)
    config = MusicgenDecoderConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, bos_token_id=0
    )
    music = MusicgenForCausalLM(config).eval()  # its tokens come in one row for each codebook
    with pytest.raises(ValueError, match=r"model must run on tokens alone.*got MusicgenForCausalLM.*RuntimeError"):
        CompressedCache(music)
    CompressedCache(music, "capkv")


def test_lack_of_memory_is_not_reported_as_an_unsupported_model(monkeypatch):
    def run_out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    model = build("llama", seed=7)
    monkeypatch.setattr(model, "forward", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        calibrate(model, tokens=32)


def test_profile_that_cannot_be_stored_is_used_all_the_same(caplog, tmp_path):
    (tmp_path / "profiles").write_text("a file where the folder should be")
    model = build("llama", seed=6)
    first, second = (CompressedCache(model).policy.allocation.profile for _ in range(2))
    assert first == second
    assert "cannot store the head profile" in caplog.text


def test_heads_keep_at_most_half_of_the_context_window_if_keys_are_rerotated():
    model = build("llama", max_position_embeddings=128)
    ids = prompt(95).repeat(1, 4)
    for rerotate, limit in ((False, 10**9), (True, 64)):
        cache = CompressedCache(model, "capkv-profile", 40, evict="always", rerotate=rerotate)
        for start in range(0, ids.shape[1], 60):
            model(ids[:, start : start + 60], past_key_values=cache)
        kept = [head.tokens_kept for head in cache.report().heads]
        assert sum(kept) == 40 * len(kept)
        assert max(kept) <= limit
