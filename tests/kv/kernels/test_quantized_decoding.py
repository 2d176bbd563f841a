"""Attention over quantized entries by kernels, run by Triton's interpreter; the oracle is plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.gpu import KernelFallbackError
from suffice.kv.attention.quantized_attention import ExactEntries, attend_quantized
from suffice.kv.backend.triton_backend import TRITON_BACKEND
from suffice.kv.kernels import quantized_decoding
from suffice.kv.storage.base import LOGIT_BIAS, Entries
from suffice.kv.storage.quantized_entries import QuantizedEntries

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The kernel computes in bfloat16 for both 16-bit dtypes.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def entries_of(lengths, dims, bits, dtype, width=7, biased=False):
    """Return quantized entries of heads of some lengths, and exact ones of which some slots are empty."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(lengths)
    slots = torch.arange(int(counts.max())).expand(*counts.shape, -1)
    keys, values = (torch.randn(*slots.shape, dim, generator=generator) for dim in dims)
    keys = keys * torch.linspace(0.3, 2, dims[0]) + 0.7
    columns = {LOGIT_BIAS: 2 * torch.randn(slots.shape, generator=generator)} if biased else {}
    entries = Entries(keys.to(dtype), values.to(dtype), slots, columns=columns)
    query_sizes = torch.rand(*counts.shape, dims[0], generator=generator) + 0.5
    empty = QuantizedEntries.empty(entries, bits, query_sizes)
    quantized = empty.append(entries, slots.where(slots < counts[..., None], -1))
    # As in a storage, spare slots follow.
    keys, values = (torch.randn(*counts.shape, width + 3, dim, generator=generator).to(dtype) for dim in dims)
    positions = torch.randint(-1, 2, (*counts.shape, width + 3), generator=generator, dtype=torch.int32)
    positions[..., width - 1] = 9
    bias = torch.randn(positions.shape, generator=generator)[:, :, :width] if biased else None
    return quantized, ExactEntries(*(x[:, :, :width] for x in (keys, values, positions)), logit_bias=bias)


def assert_equal_to_torch(quantized, exact, groups, softcap=None, sinks=None):
    batch, heads, _, dim = exact.keys.shape
    query = torch.randn(batch, groups * heads, 1, dim, generator=torch.Generator().manual_seed(1)).to(exact.keys.dtype)
    arguments = (quantized, exact, None, 0.2, softcap, sinks)
    expected = attend_quantized(query.double(), *arguments)
    output = TRITON_BACKEND.quantized_attention(query, *arguments)
    assert output.dtype == query.dtype
    assert output.is_contiguous()
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def decoded(monkeypatch):
    """Return the calls of the kernel."""
    calls, decode = [], quantized_decoding.decode_quantized

    def decode_and_count(*arguments, **options):
        output = decode(*arguments, **options)
        calls.append(options)
        return output

    monkeypatch.setattr(quantized_decoding, "decode_quantized", decode_and_count)
    return calls


@pytest.mark.parametrize("bits", [(2, 3), (3, 4), (4, 5), (5, 8), (8, 2)])
@pytest.mark.parametrize("dims", [(64, 64), (96, 100), (256, 24)], ids=str)
def test_attention_equals_that_of_torch(decoded, bits, dims):
    assert_equal_to_torch(*entries_of([[150, 0, 1], [3, 70, 64]], dims, bits, torch.float32), groups=2)
    assert len(decoded) == 1


@pytest.mark.parametrize(
    ("dtype", "lengths", "groups", "softcap", "has_sinks"),
    [
        (torch.float32, [[40]], 1, 1.5, False),
        (torch.float32, [[0, 300]], 20, None, True),
        (torch.bfloat16, [[129, 5]], 4, 30.0, True),
        (torch.float16, [[12], [77]], 3, None, False),
    ],
)
def test_dtypes_softcap_and_sinks(decoded, dtype, lengths, groups, softcap, has_sinks):
    sinks = 5 * torch.randn(groups * len(lengths[0]), generator=torch.Generator().manual_seed(2)) if has_sinks else None
    for dims, bits in (((128, 128), (4, 4)), ((80, 72), (8, 3))):
        assert_equal_to_torch(*entries_of(lengths, dims, bits, dtype), groups, softcap, sinks)
    assert len(decoded) == 2


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lengths", [[[150, 0, 1], [3, 70, 64]], [[0]]], ids=str)
def test_bias_is_added_to_the_logits(decoded, dtype, softcap, lengths):
    assert_equal_to_torch(*entries_of(lengths, (64, 48), (4, 4), dtype, biased=True), groups=2, softcap=softcap)
    assert len(decoded) == 1


@pytest.mark.parametrize("size", [8, 16, 64])
def test_groups_of_other_sizes(decoded, monkeypatch, size):
    monkeypatch.setattr("suffice.kv.storage.vector_format.GROUP_SIZE", size)
    quantized, exact = entries_of([[30, 9]], (64, 192), (4, 3), torch.float32)
    assert quantized.value_format.group_size == size
    assert_equal_to_torch(quantized, exact, groups=2)
    assert len(decoded) == 1


def test_entries_in_any_layout(decoded):
    quantized, exact = entries_of([[30, 9], [2, 40]], (64, 64), (4, 4), torch.float32)
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (exact.keys, exact.values))
    assert_equal_to_torch(quantized, ExactEntries(keys, values, exact.positions), groups=2)
    assert len(decoded) == 1


def test_rows_without_readable_entries_get_zeros():
    quantized, exact = entries_of([[0], [7]], (64, 64), (4, 4), torch.float32)
    exact.positions[0] = -1
    output = TRITON_BACKEND.quantized_attention(torch.randn(2, 2, 1, 64), quantized, exact, None, 0.1)
    assert output[0].eq(0).all()
    assert output[1].ne(0).all()


def test_attention_is_computed_by_torch_if_the_kernels_do_not_fit_the_device(decoded, monkeypatch):
    def fail(*arguments, **options):
        raise KernelFallbackError

    monkeypatch.setattr("suffice.kv.kernels.quantized_decoding.launch", fail)
    assert_equal_to_torch(*entries_of([[30, 2]], (64, 64), (4, 4), torch.float32), groups=2)
    assert decoded == []


def test_several_new_tokens_are_computed_by_torch(decoded):
    quantized, exact = entries_of([[30, 2]], (64, 64), (4, 4), torch.float32)
    query = torch.randn(1, 4, 2, 64)
    output = TRITON_BACKEND.quantized_attention(query, quantized, exact, None, 0.1)
    assert torch.equal(output, attend_quantized(query, quantized, exact, None, 0.1))
    assert decoded == []
