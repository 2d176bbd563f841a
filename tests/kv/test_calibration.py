"""Head profiles: what is measured, where it is kept, and whose it is."""

from __future__ import annotations

import json

import pytest
import torch

from retain.kv import HeadProfile, RetainCache, calibrate, profile_of, read_profile, write_profile
from retain.kv.identity import fingerprint
from tests.kv.tiny import VOCABULARY, build, tiny


@pytest.fixture(autouse=True)
def _own_profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path))


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
        RetainCache(tiny("llama"), allocation=HeadProfile(profile))


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
