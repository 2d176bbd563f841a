"""Head profiles: what is measured, where it is kept, and whose it is."""

from __future__ import annotations

import json

import pytest
import torch

from suffice.kv import (
    CompressedCache,
    HeadProfile,
    calibrate,
    profile_from_weights,
    profile_of,
    read_profile,
    write_profile,
)
from suffice.kv.hf.fingerprint import fingerprint
from tests.kv.tiny import FAMILIES, VOCABULARY, build, prompt, tiny


@pytest.fixture(autouse=True)
def _own_profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("SUFFICE_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_profile_is_the_most_attention_of_one_reconstruction(family):
    """Against the attention matrices of transformers' own eager attention."""
    model = build(family, "eager")
    found = calibrate(model, tokens=40, seed=3)
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attentions = model(torch.cat((ids, ids), 1), output_attentions=True).attentions
    for layer, attention in zip(found.attention, attentions, strict=True):
        again = attention[0, :, 40:, :40].amax(1)  # [heads, first]
        expected = again.unflatten(0, (len(layer), -1)).amax(1).mean(-1)
        torch.testing.assert_close(torch.tensor(layer), expected, atol=1e-5, rtol=1e-4)


def test_only_compressed_layers_are_measured():
    model = tiny("gemma3")
    full = [kind for kind in model.config.get_text_config().layer_types if kind == "full_attention"]
    assert len(calibrate(model, tokens=32).attention) == len(full) < model.config.get_text_config().num_hidden_layers


def test_profile_is_measured_once_and_said(caplog, tmp_path):
    model = tiny("llama")
    found = profile_of(model)
    assert "measuring the head profile" in caplog.text
    caplog.clear()
    again = profile_of(model)
    assert not caplog.text
    assert again.model == found.model == fingerprint(model)
    for one, other in zip(found.attention, again.attention, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert read_profile(tmp_path / "profiles" / f"{found.model}.json") == again


def test_own_measurement_comes_before_any_other(tmp_path):
    model = tiny("llama")
    write_profile(mine := calibrate(model, tokens=33))
    assert profile_of(model).source == mine.source == "33 random tokens, seed 0"


def test_identity_is_of_weights_and_shape_alone():
    model = build("llama")
    name = fingerprint(model)
    assert fingerprint(build("llama").to(torch.bfloat16)) == name
    assert fingerprint(build("llama", "eager")) == name
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.neg_()
    assert fingerprint(model) != name


def test_model_is_left_as_it_was():
    model = tiny("llama")
    before = model.config._attn_implementation
    calibrate(model, tokens=32)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("tokens", "words"), [(31, "at least 32"), (300, "at most 240 for this model")])
def test_lengths_are_checked(tokens, words):
    with pytest.raises(ValueError, match=f"tokens is {tokens}.*{words}"):
        calibrate(tiny("llama"), tokens=tokens)


def test_profile_of_another_model_is_refused():
    profile = calibrate(tiny("qwen2"), tokens=32)
    with pytest.raises(ValueError, match="profile is that of model"):
        CompressedCache(tiny("llama"), allocation=HeadProfile(profile))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"attention": [[1.0]]}', '{"model": "m", "source": "s", "attention": [[0]]}']
)
def test_broken_file_is_named(tmp_path, content):
    file = tmp_path / "profile.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"profile\.json holds no head profile"):
        read_profile(file)


def test_file_holds_plain_numbers(tmp_path):
    path = write_profile(calibrate(tiny("llama"), tokens=32), tmp_path / "out" / "mine.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert set(facts) == {"model", "source", "attention"}
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("family", FAMILIES)
def test_profile_from_weights_is_the_share_of_slow_pairs(family):
    model = build(family)
    found = profile_from_weights(model)
    layers = CompressedCache(model, "capkv").compressed_layers
    assert len(found.attention) == len(layers)
    for own, layer in zip(found.attention, layers, strict=True):
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
        torch.testing.assert_close(torch.tensor(own), share.amax(-1).detach() ** 8.5, rtol=1e-4, atol=1e-9)


def test_profile_from_weights_follows_a_head_that_turns_slowly():
    model = build("llama")
    module = model.get_decoder().layers[1].self_attn
    with torch.no_grad():  # of the second KV head only the slowest pair is left
        module.k_proj.weight[12:][[i for i in range(12) if i not in (5, 11)]] = 0
    found = profile_from_weights(model)
    assert found.attention[1][1] == max(value for layer in found.attention for value in layer) == pytest.approx(1)
    cache = CompressedCache(model, budget=40, allocation=HeadProfile(profile=found))
    model(prompt(90), past_key_values=cache)
    kept = {(head.layer, head.head): head.tokens_kept for head in cache.report().heads}
    assert max(kept, key=kept.get) == (1, 1)


def test_profile_from_weights_needs_projections_that_it_knows():
    model = build("llama")
    for layer in model.get_decoder().layers:
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ValueError, match="LlamaAttention has neither q_proj and k_proj nor qkv_proj"):
        profile_from_weights(model)


def test_models_without_room_or_sense_are_refused():
    short = build("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match="a window of 96 tokens, this one has 64; accepted: 'equal'"):
        CompressedCache(short)
    model = build("llama", seed=5)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="attention is NaN or infinite"):
        CompressedCache(model)


def test_profile_that_can_not_be_kept_is_used_all_the_same(caplog, tmp_path):
    (tmp_path / "profiles").write_text("a file where the folder should be")
    model = build("llama", seed=6)
    first, second = (CompressedCache(model).policy.allocation.profile for _ in range(2))
    assert first == second
    assert "can't be kept" in caplog.text


def test_heads_keep_no_more_than_half_a_window_where_keys_are_moved_together():
    model = build("llama", max_position_embeddings=128)
    ids = prompt(95).repeat(1, 4)
    for positions, limit in (("original", 10**9), ("compact", 64)):
        cache = CompressedCache(model, "capkv-profile", 40, evict="always", positions=positions)
        for start in range(0, ids.shape[1], 60):
            model(ids[:, start : start + 60], past_key_values=cache)
        kept = [head.tokens_kept for head in cache.report().heads]
        assert sum(kept) == 40 * len(kept)
        assert max(kept) <= limit
