"""Options that models pass to their attention function are supported or refused, never ignored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from suffice.kv import CompressedCache
from suffice.kv.attention.options import check_attention_options
from tests.kv.tiny import build, prompt, tiny


class Attention(nn.Module):
    """Attention with a bias, which may be None."""

    def __init__(self, bias=None):
        super().__init__()
        self.position_bias = bias

    def forward(self, query, key, value, mask, **kwargs):
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attention_interface(
            self, query, key, value, mask, scaling=1.0, position_bias=self.position_bias, indices=None, **kwargs
        )


class AnnotatedAttention(nn.Module):
    """Attention whose options are computed in the forward pass."""

    def forward(self, query, key, value, mask):
        function: object = ALL_ATTENTION_FUNCTIONS["sdpa"]
        other = max
        other(1, 2, key=None)
        indices = query.argmax(-1)
        return function(self, query, key, value, mask, indices=indices)


def test_unsupported_options_are_refused():
    message = "got Attention, which passes position_bias to its attention function"
    with pytest.raises(ValueError, match=message):
        check_attention_options(Attention(torch.zeros(3)))
    with pytest.raises(ValueError, match="which passes indices"):
        check_attention_options(AnnotatedAttention())


def test_options_that_are_none_are_accepted():
    check_attention_options(Attention())


def test_modules_without_source_code_are_accepted():
    namespace = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    check_attention_options(namespace["Hidden"]())


def test_cache_of_a_model_with_an_unsupported_option_is_refused_at_construction(monkeypatch):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.position_bias = torch.zeros(3)
    attention.__class__ = type("BiasedAttention", (type(attention),), {"forward": Attention.forward})
    with pytest.raises(ValueError, match="got BiasedAttention, which passes position_bias"):
        CompressedCache(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_supported_models_are_accepted(family):
    for layer in tiny(family).model.layers:
        check_attention_options(layer.self_attn)


def test_dropout_is_refused_before_anything_is_stored():
    model = build("llama", attention_dropout=0.25).train()
    cache = CompressedCache(model, "capkv", 0.5)
    with pytest.raises(ValueError, match=r"evaluation mode, got attention dropout with probability 0\.25"):
        model(prompt(20), past_key_values=cache)
    assert cache.get_seq_length() == 0
    model.eval()
    model(prompt(20), past_key_values=cache)
    assert cache.get_seq_length() == 20
