"""Vision-language models: prompts with an image, through `generate`."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from suffice.kv import CompressedCache
from tests.kv.families import build
from tests.kv.family_cases import MaskedOracle
from tests.kv.family_checks import kept_positions

# Number of tokens of an image of 32 × 32 pixels with patches of 8 × 8 pixels.
IMAGE_TOKENS = {
    "qwen2_vl": 4,
    "qwen2_5_vl": 4,
    "qwen3_vl": 4,
    "glm4v": 4,
    "gemma3": 4,
    "llava": 16,
    "smolvlm": 4,
    "idefics3": 4,
    "internvl": 4,
}
HAS_GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # images of any size, with positions on three axes


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def _model(family: str) -> PreTrainedModel:
    try:
        model = build(family)
    except KeyError:
        pytest.skip(f"this version of transformers has no {family}")
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # Gemma 3 initializes its projection of images with zeros
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def _image_token(model: Any) -> int:
    config = model.config
    return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index


def _inputs(family: str, seed: int = 0, before: int = 30, after: int = 12) -> dict[str, Tensor]:
    """Return a prompt of text, one image and text again."""
    model: Any = _model(family)
    generator = torch.Generator().manual_seed(seed)
    image_token, count = _image_token(model), IMAGE_TOKENS[family]
    text = torch.randperm(100, generator=generator)[: before + after] + 3
    text[text == image_token] = 2
    special = {"vision_start_token_id", "vision_end_token_id", "video_token_id", "image_start_token_id"}
    for name in special:
        text[text == getattr(model.config, name, -1)] = 2
    ids = torch.cat((text[:before], torch.full((count,), image_token), text[before:]))[None]
    is_image = (ids == image_token).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in HAS_GRID:
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # not in early versions
            inputs["mm_token_type_ids"] = is_image
    else:
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        inputs["pixel_values"] = pixels[None] if family in ("smolvlm", "idefics3") else pixels
        if family == "gemma3":
            inputs["token_type_ids"] = is_image
    return inputs


def _generate(family: str, inputs: dict[str, Tensor], cache: Any, new: int = 8) -> Tensor:
    model: Any = _model(family)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :]


def _stock(family: str) -> DynamicCache:
    return DynamicCache(config=_model(family).config)


@pytest.mark.parametrize("family", IMAGE_TOKENS)
@pytest.mark.parametrize("policy", ["capkv-profile"])
def test_full_budget_equals_the_stock_cache(family, policy):
    inputs = _inputs(family)
    expected = _generate(family, inputs, _stock(family))
    cache = CompressedCache(_model(family), policy, 1.0)
    assert torch.equal(_generate(family, inputs, cache), expected)
    # The image matters: another one gives another answer or other logits.
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    logits = [_model(family)(**each, use_cache=False).logits[:, -1] for each in (inputs, other)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("family", IMAGE_TOKENS)
@pytest.mark.parametrize("options", [{"policy": "capkv"}, {"evict": "always"}], ids=str)
def test_half_budget_keeps_half_of_text_and_image(family, options):
    inputs = _inputs(family)
    cache = CompressedCache(_model(family), budget=0.5, **options)
    _generate(family, inputs, cache, new=1)
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length
    kept = [head.tokens_kept for head in cache.report().heads]
    assert sum(kept) == len(kept) * (length // 2)


@pytest.mark.parametrize("family", IMAGE_TOKENS)
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_later_turns_read_the_kept_entries_of_text_and_image(family, policy):
    """The stock cache, in which the entries that are not kept are masked, gives the same logits."""
    inputs = _inputs(family)
    model: Any = _model(family)
    question = torch.tensor([[5, 7, 9, 11]])
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length - 2, length + 2)[None]  # as the model counts does not matter here
    more: dict[str, Any] = {"attention_mask": torch.ones(1, length + 4, dtype=torch.long)}
    more["position_ids"] = positions.expand(3, -1, -1) if family in HAS_GRID else positions

    cache = CompressedCache(model, policy, 0.5)
    first = model(**inputs, past_key_values=cache)
    kept = kept_positions(cache)
    got = model(question, past_key_values=cache, **more)

    def forward(ids: Tensor, stock: Any) -> Any:
        own = inputs if stock is None else {"input_ids": ids, **more}
        return model(**own, past_key_values=_stock(family) if stock is None else stock)

    case: Any = SimpleNamespace(model=model, forward=forward)
    oracle = MaskedOracle(case)
    torch.testing.assert_close(oracle.forward(inputs["input_ids"], {}), first.logits, rtol=1e-4, atol=1e-4)
    expected = oracle.forward(question, kept)
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, forward(question, forward(inputs["input_ids"], None).past_key_values).logits)


@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_generate_answers_a_second_turn(family):
    inputs, model = _inputs(family), _model(family)
    cache = CompressedCache(model, budget=0.5)
    first = _generate(family, inputs, cache)
    ids = torch.cat((inputs["input_ids"], first, torch.tensor([[5, 7, 9]])), dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = (ids == _image_token(model)).long()
    second = _generate(family, more, cache)
    assert second.shape == first.shape
    assert cache.get_seq_length() == ids.shape[1] + second.shape[1] - 1
