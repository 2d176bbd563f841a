"""Caches whose kept entries are quantized."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import cache_utils

from suffice.kv import CompressedCache
from suffice.kv.storage.quantized import Quantization, QuantizedStorage
from tests.kv.tiny import answer, build, left_padded, prompt, tiny

AVAILABLE = {
    "fp8": True,
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
    # For 16 dimensions: an exponent of one byte, or a scale and a shift in float32.
    scales = numbers // 16 * (1 if backend == "fp8" else 2 * 4)
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
            attention_mask=torch.cat((torch.zeros(1, 31), torch.ones(1, 24)), 1).long(),  # 31 tokens are padding
            position_ids=torch.tensor([[20, 21, 22]]),
        )
    for kept, layer in zip(before, quantized.compressed_layers, strict=True):
        assert torch.equal(kept, layer.storage.keys)


class SharedScaleLayer(cache_utils.QuantizedLayer):
    """A quantized layer whose scale is shared by all rows that it holds."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 7
        return (tensor / scale).round(), scale

    def _dequantize(self, qtensor):
        return qtensor[0] * qtensor[1]


@pytest.fixture
def shared_scales(monkeypatch):
    """The backend "quanto" is installed, and shares scales between rows."""
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", SharedScaleLayer)


ROWS = [prompt(40), prompt(9, seed=2), prompt(33, seed=5)]
# Early versions quantize all entries again at other steps, which depend on how many tokens come at a time.
_quanto = pytest.param(
    Quantization("quanto", residual_length=4),
    marks=pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="needs a newer transformers"),
)
any_backend = pytest.mark.parametrize("quantized", ["fp8", _quanto])


@any_backend
@pytest.mark.usefixtures("shared_scales")
@pytest.mark.parametrize("settings", [{}, {"evict": "always", "interval": 5}])
def test_row_of_a_batch_equals_the_row_alone(quantized, settings):
    model = tiny("qwen3")
    # Integers are quantized again when entries are evicted, which happens later for a row below the budget alone.
    rows = ROWS[::2] if settings and quantized != "fp8" else ROWS
    batched = CompressedCache(model, "keydiff", 12, quantized=quantized, **settings)
    tokens = answer(model, left_padded(rows), batched, new=9)
    for row, ids in enumerate(rows):
        alone = CompressedCache(model, "keydiff", 12, quantized=quantized, **settings)
        assert torch.equal(answer(model, {"input_ids": ids}, alone, new=9)[0], tokens[row])
        for own, other in zip(alone.compressed_layers, batched.compressed_layers, strict=True):
            width = own.storage.width
            assert torch.equal(own.storage.positions[0], other.storage.positions[row, :, -width:])
            for name in ("keys", "values"):
                # Rounding in the matrix products of the model may move a number to the next level.
                mine, theirs = getattr(own.storage, name)[0], getattr(other.storage, name)[row, :, -width:]
                assert float((mine - theirs).abs().max()) <= 0.15 * float(mine.abs().max())
                assert float(((mine - theirs).abs() > 1e-4).float().mean()) < 0.01


@any_backend
@pytest.mark.usefixtures("shared_scales")
def test_beam_search_equals_that_of_the_row_alone(quantized):
    model = tiny("qwen3")
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False}

    def search(inputs):
        cache = CompressedCache(model, "keydiff", 12, quantized=quantized)
        with torch.no_grad():
            out = model.generate(**inputs, **options, past_key_values=cache)
        return out[:, inputs["input_ids"].shape[1] :]

    found = search(left_padded(ROWS))
    for row, ids in enumerate(ROWS):
        assert torch.equal(search({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0], found[row])


@any_backend
@pytest.mark.usefixtures("shared_scales")
def test_selecting_rows_and_removing_new_entries_changes_no_number(quantized):
    model = tiny("qwen3")
    cache = CompressedCache(model, "keydiff", 12, quantized=quantized)
    fill(model, cache)
    storage = cache.compressed_layers[0].storage
    before = storage.keys, storage.values
    new = torch.randn(2, 2, 3, 16)
    storage.append(new, 2 * new, torch.tensor([[40, 41, 42], [9, 10, 11]]))
    storage.end_attention()
    longer = storage.keys, storage.values
    storage.drop_last(3)
    for old, found in zip(before, (storage.keys, storage.values), strict=True):
        assert torch.equal(old, found)
    storage.append(new, 2 * new, torch.tensor([[40, 41, 42], [9, 10, 11]]))
    other = storage.copy()
    other.select_rows(torch.tensor([1, 0, 1]))
    for old, found in zip(longer, (other.keys, other.values), strict=True):
        assert torch.equal(old[[1, 0, 1]], found)
    for old, found in zip(longer, (storage.keys, storage.values), strict=True):
        assert torch.equal(old, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rounds_each_vector_on_its_own(dtype):
    """The numbers next to a vector do not change it, and a second quantization does not change it either."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.linspace(-4, 4, 40)[:, None]
    keys = (torch.randn(2, 3, 40, 16, generator=generator) * scales).clamp(-6e4, 6e4).to(dtype)
    values = (torch.randn(2, 3, 40, 8, generator=generator) / scales).clamp(-6e4, 6e4).to(dtype)
    entries = Quantization("fp8").quantize(keys, values)
    found = entries.dequantize()
    for exact, rounded in zip((keys, values), found, strict=True):
        assert rounded.dtype == dtype
        largest = exact.float().abs().amax(-1, keepdim=True)
        # 3 bits of mantissa for numbers of at least 2^-14 of the largest one.
        error = (exact.float() - rounded.float()).abs()
        assert bool((error <= exact.float().abs().clamp_min(largest * 2**-13) / 16).all())
    again = Quantization("fp8").quantize(*found).dequantize()
    one_by_one = Quantization("fp8").quantize(keys[:, :, :0], values[:, :, :0])
    for token in range(40):
        appended = one_by_one.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    for index in (0, 1):
        assert torch.equal(found[index], again[index])
        assert torch.equal(found[index], appended[index])


def test_fp8_represents_the_smallest_and_the_largest_numbers():
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [3.4e38, 1.0], [256.0, -255.0]])[None, None]
    found, _ = Quantization("fp8").quantize(x, x).dequantize()
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[0, 0, 2:, 0], x[0, 0, 2:, 0], rtol=0.13, atol=0)
    assert float(found[0, 0, :2].abs().max()) <= 1e-30


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="needs a newer transformers")
def test_fp8_is_at_least_as_exact_as_the_layer_of_transformers():
    """Its scale is that of all entries of all rows, so the small numbers of other rows are lost."""
    keys = torch.randn(2, 2, 30, 16, generator=torch.Generator().manual_seed(1))
    keys[1] *= 1e-5
    stock = cache_utils.Fp8QuantizedLayer()
    stock.update(keys, keys)
    reference = stock.update(keys[:, :, :0], keys[:, :, :0])[0]
    found = Quantization("fp8").quantize(keys, keys).dequantize()[0]
    errors = [((x - keys).square().mean((1, 2, 3)) / keys.square().mean((1, 2, 3))) for x in (reference, found)]
    assert float(errors[1][0]) <= 1.1 * float(errors[0][0])
    assert float(errors[1][1]) < 0.01 < float(errors[0][1])


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
