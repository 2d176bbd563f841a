"""Caches whose kept entries are stored in the quantized layers of transformers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import cache_utils

from suffice.kv import CompressedCache
from suffice.kv.storage.quantized import Quantization, QuantizedStorage
from tests.kv.tiny import answer, build, left_padded, prompt, tiny

AVAILABLE = {
    "fp8": hasattr(cache_utils, "Fp8QuantizedLayer"),
    "quanto": importlib.util.find_spec("optimum") is not None
    and importlib.util.find_spec("optimum.quanto") is not None,
    "hqq": importlib.util.find_spec("hqq") is not None,
}
BITS = {"fp8": 8, "quanto": 4, "hqq": 4}
# Largest error of a number, relative to the largest of the 16 numbers that share a scale.
ERROR = {"fp8": 0.04, "quanto": 0.08, "hqq": 0.15}
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(not available, reason=f"needs {name}"))
        for name, available in AVAILABLE.items()
    ],
)


def caches(backend, **settings):
    """Return a model, an empty cache of it, and the same cache quantized."""
    model = tiny("qwen3")  # its heads have 16 dimensions
    return model, *(
        CompressedCache(model, "keydiff", 12, quantized=quantized, **settings) for quantized in (None, backend)
    )


def batch():
    return left_padded([prompt(40), prompt(9, seed=2)])  # the row shorter than the budget has empty slots


def fill(model, cache):
    with torch.no_grad():
        return model(**batch(), past_key_values=cache).logits[:, -1]


@backends
@pytest.mark.parametrize("allocation", ["equal", "pyramid"])
def test_quantized_entries_equal_the_kept_entries_up_to_rounding(backend, allocation):
    model, plain, quantized = caches(backend, allocation=allocation)
    torch.testing.assert_close(
        fill(model, quantized), fill(model, plain)
    )  # the prefill attends to entries that are not quantized yet
    for own, other in zip(plain.compressed_layers, quantized.compressed_layers, strict=True):
        assert isinstance(other.storage, QuantizedStorage)
        assert torch.equal(own.storage.positions, other.storage.positions)
        for name in ("keys", "values"):
            exact, found = getattr(own.storage, name), getattr(other.storage, name)
            assert found.shape == exact.shape
            assert found.dtype == exact.dtype
            assert bool(((found - exact).abs() <= ERROR[backend] * 2 * exact.abs().amax()).all())
            assert not torch.equal(found, exact)


@backends
def test_reported_bytes_are_those_of_the_quantized_entries(backend):
    model, plain, quantized = caches(backend)
    fill(model, plain)
    fill(model, quantized)
    full, kept = plain.report(), quantized.report()
    assert kept.bytes_full == full.bytes_full
    numbers = full.bytes_kept // 4  # float32
    scales = 0 if backend == "fp8" else numbers // 16 * 2 * 4  # a scale and a shift for 16 dimensions
    assert numbers * BITS[backend] // 8 + scales <= kept.bytes_kept <= numbers * BITS[backend] // 8 + scales + 64
    assert kept.bytes_index == full.bytes_index


@backends
@pytest.mark.parametrize("settings", [{}, {"evict": "always", "interval": 3}])
def test_generation_continues_from_a_quantized_cache(backend, settings):
    """Copies are independent, and dequantized entries are freed after each attention call."""
    model, plain, quantized = caches(backend, **settings)
    tokens = answer(model, batch(), quantized, new=12)
    answer(model, batch(), plain, new=12)
    assert [head.tokens_kept for head in quantized.report().heads] == [
        head.tokens_kept for head in plain.report().heads
    ]
    assert tokens.shape == (2, 12)
    for layer in quantized.compressed_layers:
        assert layer.storage._dequantized is None
        assert bool(torch.isfinite(layer.storage.keys).all())
    other = quantized.copy()
    before = [layer.storage.keys for layer in quantized.compressed_layers]
    other.batch_select_indices(torch.tensor([1]))
    with torch.no_grad():
        model(
            prompt(3),
            past_key_values=other,
            attention_mask=torch.ones(1, 55),
            position_ids=torch.tensor([[20, 21, 22]]),
        )
    for kept, layer in zip(before, quantized.compressed_layers, strict=True):
        assert torch.equal(kept, layer.storage.keys)


@pytest.mark.skipif(not AVAILABLE["fp8"], reason="needs a newer transformers")
def test_fp8_numbers_beyond_the_scale_are_clamped():
    """The first entries set the scale of 8-bit numbers; torch would turn larger numbers into NaN."""
    model, _, cache = caches("fp8")
    fill(model, cache)
    storage = cache.compressed_layers[0].storage
    largest = float(storage.keys.abs().amax())
    new = torch.full((2, 2, 1, 16), 100 * largest)
    storage.append(new, new, torch.tensor([[40], [9]]))
    torch.testing.assert_close(storage.keys[:, :, -1], torch.full((2, 2, 16), largest), rtol=0.05, atol=0)


def test_invalid_settings_are_rejected(tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match="quantized must be one of 'quanto', 'hqq', 'fp8' or None, got 'int4'"):
        CompressedCache(model, "capkv", quantized="int4")
    with pytest.raises(TypeError, match="quantized must be a name, a Quantization or None, got 4"):
        CompressedCache(model, quantized=4)
    with pytest.raises(ValueError, match="residual_length must be at least 1, got 0"):
        Quantization(residual_length=0)
    message = (
        r"quantized must be None for heads of unequal length .*, got 'quanto'. Use allocation='equal' or 'pyramid'"
    )
    with pytest.raises(ValueError, match=message):
        CompressedCache(model, allocation="adakv", quantized="quanto")
    for backend, available in AVAILABLE.items():
        if not available:
            with pytest.raises(ImportError, match=f"quantized='{backend}' needs .*. Install it, or choose"):
                CompressedCache(model, "capkv", quantized=backend)
            continue
        cache = CompressedCache(model, "keydiff", 12, quantized=backend)
        answer(model, {"input_ids": prompt(20)}, cache)
        with pytest.raises(ValueError, match="quantized must be None for a cache that is saved, got a quantized cache"):
            cache.save(model, tmp_path / "x")
