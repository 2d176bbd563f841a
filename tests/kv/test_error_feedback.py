"""Rounding of keys with feedback of the errors."""

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.query_moments import second_moments
from suffice.kv.storage.base import Entries
from suffice.kv.storage.bit_packing import unpack_bits
from suffice.kv.storage.error_feedback import RIDGE, ErrorFeedback
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.vector_format import VectorFormat
from tests.kv.test_quantized_attention import text
from tests.kv.tiny import build


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_one_by_one(x, scales, moment, largest):
    """Round one rotated vector, four dimensions at a time, in float64. Each block is chosen so that eᵀ M e is least."""
    moment = moment.double() + RIDGE * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    codes, error = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.float64)
    for start in reversed(range(0, len(x), 4)):
        own, stop = slice(start, start + 4), start + 4
        # With the errors e of the later dimensions given, and the earlier ones free to correct, the minimum of eᵀ M e
        # over the block is that of the Schur complement.
        earlier = torch.linalg.solve(moment[:start, :start], moment[:start, start:])
        rest = moment[start:, start:] - moment[start:, :start] @ earlier
        wanted = -torch.linalg.solve(rest[:4, :4], rest[:4, 4:] @ error[stop:])
        codes[own] = ((x[own] - wanted) / scales[own] + largest / 2).round().clamp(0, largest).float()
        error[own] = x[own] - scales[own] * (codes[own] - largest / 2)
    return codes, error


def moments_of(heads, dim, seed=1):
    """Second moments of queries that mostly lie in a few directions."""
    queries = normal(heads, 200, 5, seed=seed) @ normal(heads, 5, dim, seed=seed + 1) + 0.3 * normal(heads, 200, dim)
    return queries.mT @ queries / 200


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [16, 64, 96, 100])
def test_each_dimension_minimizes_the_error_of_the_products(bits, dim):
    form, moments, counts = VectorFormat(dim, bits), moments_of(2, dim), [3, 4]
    x, scales = normal(7, dim), torch.rand(2, dim, generator=torch.Generator().manual_seed(3)) + 0.5
    rotation = form.rotation(x)
    feedback = ErrorFeedback.from_moments(moments, scales, rotation, counts)
    vectors, errors = form.quantize(x, feedback)
    codes = unpack_bits(vectors.codes, bits, torch.empty(7, form.padded_dim))
    own_scales = torch.exp2(vectors.scales / 4 - 40).double().repeat_interleave(form.group_size, 1)
    for index, head in enumerate([0, 0, 0, 1, 1, 1, 1]):
        moment = rotation.mT @ (moments[head] / scales[head] / scales[head][:, None]) @ rotation
        rotated = (x[index] @ rotation).double()
        expected, error = round_one_by_one(rotated, own_scales[index], moment, 2**bits - 1)
        # Rounding errors of float32 may change integers that are halfway between two.
        assert float((codes[index] != expected).float().mean()) < 0.03
        if torch.equal(codes[index], expected):
            torch.testing.assert_close(float(errors[index]), float(error.square().sum()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_products_with_queries_are_closer_than_with_plain_rounding(bits):
    entries = Entries(normal(1, 2, 300, 64), normal(1, 2, 300, 64, seed=5), torch.arange(300).expand(1, 1, 300))
    moments = moments_of(2, 64)
    queries = torch.linalg.cholesky(moments + 1e-4 * torch.eye(64)) @ normal(2, 64, 100, seed=7)
    index = torch.arange(300).expand(1, 2, 300)
    sizes = moments.diagonal(dim1=-2, dim2=-1).sqrt()[None]
    empty = QuantizedEntries.empty(entries, (bits, bits), sizes)
    plain, shaped = empty.append(entries, index), empty.append(entries, index, moments[None])
    errors = [
        ((x.dequantize()[0].view(2, 300, 64) - entries.keys[0]) @ queries).square().mean() for x in (plain, shaped)
    ]
    assert float(errors[1]) < 0.5 * float(errors[0])
    assert torch.equal(plain.values.codes, shaped.values.codes)
    # The keys themselves are farther away: only what the queries see is closer.
    distances = [float(x.relative_errors[0][0]) for x in (plain, shaped)]
    assert distances[0] < distances[1]


def test_parts_of_limited_size_give_the_same_integers(monkeypatch):
    form, counts = VectorFormat(64, 4), [0, 30, 7, 0, 13]
    feedback = ErrorFeedback.from_moments(moments_of(5, 64), torch.ones(5, 64), form.rotation(torch.ones(1)), counts)
    expected, errors = form.quantize(normal(50, 64), feedback)
    for limit in (1, 64 * 4, 64 * 20, 64 * 70):
        monkeypatch.setattr("suffice.kv.storage.error_feedback._MAX_NUMBERS", limit)
        found, found_errors = form.quantize(normal(50, 64), feedback)
        assert float((found.codes != expected.codes).float().mean()) < 0.01
        assert torch.equal(found.scales, expected.scales)
        torch.testing.assert_close(found_errors, errors, rtol=0.05, atol=0)


def test_heads_without_queries_are_rounded_plainly():
    form, x = VectorFormat(64, 4), normal(20, 64)
    moments = torch.stack((torch.zeros(64, 64), torch.full((64, 64), torch.nan)))
    feedback = ErrorFeedback.from_moments(moments, torch.ones(2, 64), form.rotation(x), [10, 10])
    vectors, _ = form.quantize(x, feedback)
    rotated, restored = x @ form.rotation(x), form.dequantize(vectors)
    scales = torch.exp2(vectors.scales / 4 - 40).repeat_interleave(form.group_size, 1)
    assert bool(((rotated - restored).abs() <= scales / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_errors_of_numbers_that_cannot_be_stored_are_not_finite(bad):
    form, x = VectorFormat(64, 4), normal(20, 64)
    x[5, 3] = bad
    feedback = ErrorFeedback.from_moments(moments_of(2, 64), torch.ones(2, 64), form.rotation(x), [10, 10])
    _, errors = form.quantize(x, feedback)
    assert errors.isfinite().tolist() == [index != 5 for index in range(20)]


@pytest.fixture
def moments(monkeypatch):
    """Collect the second moments of queries that all layers of a cache compute."""
    collected = []
    original = CompressedLayer.query_moments

    def query_moments(self, call):
        result = original(self, call)
        collected.append((self.order, call.query, result))
        return result

    monkeypatch.setattr(CompressedLayer, "query_moments", query_moments)
    return collected


def expected_moment(queries):
    """Return the second moment of the queries of one KV head, [group, queries, head_dim]."""
    dim = queries.shape[-1]
    every, last = (x.reshape(-1, dim) for x in (queries, queries[:, -32:]))
    moment = 0.9 * every.mT @ every / len(every) + 0.1 * last.mT @ last / len(last)
    return moment + moment.diagonal().mean() * dim / len(every) * torch.eye(dim)


def test_second_moments_of_long_texts_are_those_of_parts():
    """Every third part of 64 tokens, counted from the end; a short row, which is padded on the left, has the last."""
    length = 3 * 1024 + 100
    queries, is_token = normal(2, 4, length, 16), torch.ones(2, length, dtype=torch.bool)
    is_token[1, :-50] = False
    queries[1, :, :-50] = 0
    found = second_moments(queries, is_token, num_heads=2)
    distance = torch.arange(length).flip(0)
    parts = ((distance // 64 % 3 == 0) & (distance < 3 * 1024)).nonzero().squeeze(-1)
    assert len(parts) == 1024
    for row, tokens in ((0, parts), (1, torch.arange(length - 50, length))):
        for head in (0, 1):
            own = queries[row, 2 * head : 2 * head + 2]
            every, last = (own[:, index].reshape(-1, 16) for index in (tokens, slice(-32, None)))
            moment = 0.9 * every.mT @ every / len(every) + 0.1 * last.mT @ last / len(last)
            moment += moment.diagonal().mean() * 16 / len(every) * torch.eye(16)
            torch.testing.assert_close(found[row, head], moment, rtol=1e-4, atol=1e-5)


def test_second_moments_are_those_of_the_tokens_of_each_row(moments):
    model = build("llama")
    ids = text(90).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :35] = 0
    model(ids, attention_mask=mask, past_key_values=CompressedCache(model, "capkv", 0.9, bits=4))
    assert [order for order, *_ in moments] == list(range(model.config.num_hidden_layers))
    for _, queries, found in moments:
        group = queries.shape[1] // found.shape[1]
        for row, head in ((0, 0), (1, 0), (1, 1)):
            own = queries[row, head * group : (head + 1) * group, 35 * row :]
            torch.testing.assert_close(found[row, head], expected_moment(own), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_later_entries_learn_from_remembered_queries(moments, evict):
    """With `evict="always"`, the layers remember queries. Without them, keys are rounded to the nearest integers."""
    model = build("llama")
    cache = CompressedCache(model, "capkv", 0.9, bits=4, evict=evict)
    ids = text(200)
    model(ids[:, :90], past_key_values=cache)
    del moments[:]
    for token in ids[:, 90:].split(1, 1):
        model(token, past_key_values=cache)
    assert all(queries.shape[2] == 1 for _, queries, _ in moments)
    assert bool(moments) == (evict == "always")


def test_moments_of_remembered_queries_are_those_of_the_tokens_of_each_row(monkeypatch):
    """Rows with left padding and masked tokens: only the queries of tokens count."""
    model = build("llama")
    cache = CompressedCache(model, "capkv", 70, bits=4, evict="always", interval=90)
    layer = cache.compressed_layers[1]
    seen, found = [], []  # queries of all tokens so far, and whether they are tokens; moments
    original = CompressedLayer.query_moments

    def query_moments(self, call):
        if self is layer:
            found.append((original(self, call), len(self.state.queries), sum(x.shape[2] for x, _ in seen)))
        return original(self, call)

    monkeypatch.setattr(CompressedLayer, "query_moments", query_moments)
    ids, mask = text(230, rows=2), torch.ones(2, 230, dtype=torch.long)
    mask[1, :35] = 0
    mask[0, 100::3] = 0
    mask[1, 190:] = 0
    layer.on_attention = lambda own, call: seen.append((call.query, own.new_positions >= 0))
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids[:, :90], attention_mask=mask[:, :90], position_ids=position_ids[:, :90], past_key_values=cache)
    del found[:]
    for end in range(91, 231):
        now = slice(end - 1, end)
        model(ids[:, now], attention_mask=mask[:, :end], position_ids=position_ids[:, now], past_key_values=cache)
    assert len(found) >= 2
    queries, is_token = torch.cat([x for x, _ in seen], dim=2), torch.cat([x for _, x in seen], dim=1)
    for moments, num_remembered, stop in found:
        remembered = slice(stop - num_remembered, stop)
        for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            own = queries[row, 2 * head : 2 * head + 2, remembered]
            valid = is_token[row, remembered]
            every, last = own[:, valid].flatten(0, 1), own[:, -32:][:, valid[-32:]].flatten(0, 1)
            expected = 0.9 * every.mT @ every / len(every) + 0.1 * last.mT @ last / max(1, len(last))
            ridge = expected.diagonal().mean() * len(expected) / len(every)
            torch.testing.assert_close(
                moments[row, head], expected + ridge * torch.eye(len(expected)), rtol=1e-4, atol=1e-6
            )


def test_later_chunks_learn_from_their_own_queries(moments):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 200, bits=4, evict="always")
    for chunk in text(300).split(100, 1):
        model(chunk, past_key_values=cache)
    for _, queries, found in moments:
        group = queries.shape[1] // found.shape[1]
        torch.testing.assert_close(found[0, 0], expected_moment(queries[0, :group]), rtol=1e-4, atol=1e-6)
    assert len(moments) >= 3 * model.config.num_hidden_layers


def test_autocast_does_not_change_the_moments(moments):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 80, bits=4, evict="always")
    with torch.autocast("cpu", torch.bfloat16):
        for ids in text(190).split(40, 1):
            model(ids, past_key_values=cache)
    assert cache.compressed_layers[0].storage.quantized.width > 0
    for _, queries, found in moments:
        group = queries.shape[1] // found.shape[1]
        if queries.shape[2] >= 32:
            expected = expected_moment(queries[0, :group].float())
            torch.testing.assert_close(found[0, 0], expected, rtol=1e-4, atol=1e-6)


def entries_of(dtype):
    """Return 90 entries of 2 heads of 64 dimensions."""
    keys, values = normal(1, 2, 90, 64).to(dtype), normal(1, 2, 90, 64, seed=5).to(dtype)
    return Entries(keys, values, torch.arange(90).expand(1, 1, 90))


def quantize(moments, entries):
    kept = torch.arange(90).expand(1, 2, 90)
    return QuantizedStorage.gather(entries, kept, Quantization(4, 4, window=0), moments).quantized


def assert_same(found, expected):
    for a, b in zip((*found.tensors, found.error_sums), (*expected.tensors, expected.error_sums), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_does_not_change_the_integers():
    entries, moments = entries_of(torch.float32), moments_of(2, 64)[None]
    expected = quantize(moments, entries)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(quantize(moments, entries), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_change_the_integers(dtype):
    entries, moments = entries_of(torch.float32), moments_of(2, 64)[None]
    expected = quantize(moments, entries)
    torch.set_default_dtype(dtype)
    try:
        found = quantize(moments, entries)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_queries_that_are_not_finite_do_not_count(bad):
    """Keys of a head without usable queries are rounded to the nearest integers, with equal sizes of the queries."""
    moments = moments_of(2, 64)[None]
    moments[0, 1] = bad
    found, expected = (quantize(x, entries_of(torch.float32)) for x in (moments, moments_of(2, 64)[None]))
    unknown = moments.clone()
    unknown[0, 1] = torch.eye(64)
    half = len(found.keys) // 2
    assert torch.equal(found.keys.codes[:half], expected.keys.codes[:half])
    assert torch.equal(found.scales[0, 1], quantize(unknown, entries_of(torch.float32)).scales[0, 1])
    assert found.relative_errors[1][0] < 0.12
    assert bool(found.dequantize()[0].isfinite().all())


def test_large_queries_of_float16_models():
    """The sizes of dimensions that float16 cannot represent become its largest number."""
    moments = moments_of(2, 64)[None]
    found = quantize(moments * 1e9, entries_of(torch.float16))
    assert bool(found.scales.isfinite().all())
    sizes = moments.diagonal(dim1=-2, dim2=-1).mul(1e9).sqrt()
    assert float(sizes.max()) > 65504
    errors = [x.relative_errors[0][0] for x in (found, quantize(moments, entries_of(torch.float16)))]
    assert errors[0] < 1.2 * errors[1]
