"""Packed integers, the rotation, and the format of quantized vectors."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from suffice.kv.storage.base import Entries
from suffice.kv.storage.bit_packing import num_bytes, pack_bits, unpack_bits
from suffice.kv.storage.quantization import SUPPORTED_BITS
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.rotation import padded_dim, rotation
from suffice.kv.storage.vector_format import QuantizedVectors, VectorFormat

every_bits = pytest.mark.parametrize("bits", SUPPORTED_BITS)
every_dim = pytest.mark.parametrize("dim", [12, 64, 80, 96, 100, 128, 576])
# Mean squared error of numbers with a standard normal distribution.
LARGEST_ERROR = {2: 0.12, 3: 0.035, 4: 0.0095, 5: 0.0025, 8: 5e-5}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restore(form, vectors, dtype=torch.float64):
    """Return the vectors that quantized ones stand for."""
    rotated = form.dequantize(vectors, dtype)
    return rotated @ form.rotation(rotated).mT


@every_bits
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_packed_integers_are_restored(bits, data):
    dim = 8 * data.draw(st.integers(1, 12))
    shape = *data.draw(st.lists(st.integers(0, 3), max_size=2)), dim
    seed = data.draw(st.integers(0, 1000))
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], num_bytes(dim, bits))
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(unpack_bits(packed, bits, torch.empty(shape, dtype=dtype)), codes.to(dtype))


@every_bits
def test_packed_integers_use_every_bit(bits):
    """Each bit of an integer sets one bit of the bytes, and no two the same."""
    codes = torch.stack(
        [
            torch.nn.functional.one_hot(torch.tensor(index), 24).to(torch.uint8) << bit
            for index, bit in itertools.product(range(24), range(bits))
        ]
    )
    packed = pack_bits(codes, bits)
    assert packed.shape == (24 * bits, 3 * bits)
    is_set = (packed[..., None] >> torch.arange(8)) & 1
    assert bool((is_set.sum((1, 2)) == 1).all())
    assert bool((is_set.sum(0) == 1).all())


@every_dim
def test_rotation_is_orthonormal_and_spreads_outliers(dim):
    matrix = rotation(dim, torch.float64, torch.device("cpu"))
    assert matrix.shape == (dim, padded_dim(dim))
    assert padded_dim(dim) % 8 == 0
    assert dim <= padded_dim(dim) < dim + 8
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(matrix.abs().max()) <= (2 / dim) ** 0.5 + 1e-9


@every_bits
@every_dim
def test_reported_error_is_that_of_the_restored_vectors(bits, dim):
    form = VectorFormat(dim, bits)
    scales = 10.0 ** torch.linspace(-3, 3, 60)[:, None]
    x = torch.cat((normal(60, dim) * scales, normal(60, dim, seed=1) ** 3))
    vectors, errors = form.quantize(x)
    assert vectors.codes.dtype == vectors.scales.dtype == torch.uint8
    assert vectors.nbytes == len(x) * form.bytes_per_vector
    found = restore(form, vectors)
    # Numbers that were padded are quantized too: their error is counted, but it is outside of the vectors.
    rotated = x.double() @ rotation(dim, torch.float64, x.device)
    expected = (form.dequantize(vectors, torch.float64) - rotated).square().sum(-1)
    torch.testing.assert_close(errors.double(), expected, rtol=2e-4, atol=0)
    actual = (found - x).square().sum(-1)
    assert bool((actual <= expected * (1 + 1e-9)).all())
    if dim % 8 == 0:
        torch.testing.assert_close(actual, expected)


@every_bits
@every_dim
def test_error_of_normal_numbers(bits, dim):
    form, x = VectorFormat(dim, bits), normal(2000, dim)
    error = (restore(form, form.quantize(x)[0]) - x).square().mean()
    # 100 dimensions, padded to 104, form one large group.
    assert float(error) < LARGEST_ERROR[bits] * (1.05 if form.group_size > 64 else 1)


@every_bits
def test_each_vector_is_quantized_on_its_own(bits):
    form, x = VectorFormat(96, bits), normal(50, 96)
    together, errors = form.quantize(x)
    for index in range(0, 50, 7):
        alone, error = form.quantize(x[index : index + 1])
        assert torch.equal(alone.codes[0], together.codes[index])
        assert torch.equal(alone.scales[0], together.scales[index])
        torch.testing.assert_close(error[0], errors[index])


def test_blocks_of_many_vectors_are_joined_in_order(monkeypatch):
    form, x = VectorFormat(64, 4), normal(50, 64)
    expected, errors = form.quantize(x)
    monkeypatch.setattr("suffice.kv.storage.vector_format._BLOCK", 7)
    found, found_errors = form.quantize(x)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    torch.testing.assert_close(found_errors, errors)


@every_bits
@every_dim
def test_zeros_and_tiny_numbers_stay_tiny(bits, dim):
    form = VectorFormat(dim, bits)
    x = torch.stack((torch.zeros(dim), torch.full((dim,), 1e-38), torch.full((dim,), -1e-20)))
    vectors, errors = form.quantize(x)
    assert float(restore(form, vectors).abs().max()) < 1e-9
    assert float(errors.max()) < 1e-18


@every_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_like_float32(bits, dtype):
    form, x = VectorFormat(80, bits), (100 * normal(30, 80)).to(dtype)
    (found, _), (expected, _) = form.quantize(x), form.quantize(x.float())
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert form.dequantize(found, dtype).dtype == dtype


def test_no_vectors():
    form = VectorFormat(100, 3)
    vectors, errors = form.quantize(torch.empty(0, 100))
    assert (len(vectors), len(errors), vectors.nbytes) == (0, 0, 0)
    assert form.dequantize(vectors).shape == (0, 104)
    assert isinstance(vectors.map(lambda x: x), QuantizedVectors)


@every_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_numbers_that_have_no_scale_are_rejected(bits, bad, name):
    tensors = {"keys": normal(1, 2, 9, 64), "values": normal(1, 2, 9, 64, seed=1)}
    positions = torch.arange(9).expand(1, 2, 9)
    good = Entries(tensors["keys"].clone(), tensors["values"].clone(), positions)
    tensors[name][0, 1, 5, 3] = bad
    entries = Entries(tensors["keys"], tensors["values"], positions)
    slots = torch.arange(9).expand(1, 2, 9)
    empty = QuantizedEntries.empty(entries, (bits, bits))
    with pytest.raises(ValueError, match="keys and values must be finite"):
        empty.append(entries, slots)
    assert len(empty.keys) == 0
    # The vector that cannot be represented may be left out.
    others = slots.clone()
    others[0, 1, 5] = -1
    assert empty.append(entries, others).lengths == [[9, 8]]
    assert empty.append(good, slots).lengths == [[9, 9]]


@every_bits
@pytest.mark.parametrize("largest", [1e-6, 1.0, 6e4])
def test_large_and_small_numbers_have_the_same_relative_error(bits, largest):
    form, x = VectorFormat(128, bits), largest * normal(200, 128) / 4
    _, errors = form.quantize(x)
    assert float(errors.sum() / x.square().sum()) < LARGEST_ERROR[bits] * 1.05


@every_bits
@every_dim
def test_unpacked_groups_stand_for_the_dequantized_vectors(bits, dim):
    form = VectorFormat(dim, bits)
    vectors, _ = form.quantize(normal(50, dim))
    groups = form.unpack(vectors.codes, torch.float64)
    scales, middles = form.unpack_scales(vectors.scales, torch.float64), form.middles(groups)
    assert groups.shape == (form.num_groups, 50, form.group_size)
    found = (groups - middles[:, None, None]) * scales[..., None]
    expected = form.dequantize(vectors, torch.float64)
    torch.testing.assert_close(found.movedim(0, 1).flatten(1), expected, rtol=1e-6, atol=0)
    # Queries that are multiplied by this matrix become rotated queries and their products with the middles.
    matrix = form.rotation_and_middles(groups)
    rotated, of_middles = matrix.split((form.padded_dim, form.num_groups), dim=1)
    assert torch.equal(rotated, form.rotation(groups))
    sums = rotated.unflatten(1, (form.num_groups, -1)).sum(-1)
    torch.testing.assert_close(of_middles, -sums * middles)


@every_bits
def test_relative_errors_of_zeros_are_zero(bits):
    """Zeros are stored with tiny errors. In the second head, only the mean key is subtracted to zeros."""
    positions = torch.arange(5).expand(1, 2, 5)
    keys, values = torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64)
    keys[:, 1] = 1.0
    values[:, 1] = normal(5, 64)
    entries = Entries(keys, values, positions)
    empty = QuantizedEntries.empty(entries, (bits, bits))
    assert empty.relative_errors == [None, None]
    first, second = empty.append(entries, positions).relative_errors
    assert first == (0.0, 0.0)
    assert second[0] == 0.0
    assert second[1] > 0
