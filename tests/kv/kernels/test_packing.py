"""Quantization of vectors by a kernel, run by Triton's interpreter; the oracle is plain torch."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.gpu import KernelFallbackError
from suffice.kv.backend.triton_backend import TRITON_BACKEND
from suffice.kv.storage.error_feedback import ErrorFeedback
from suffice.kv.storage.quantization import SUPPORTED_BITS
from suffice.kv.storage.vector_format import VectorFormat

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_equal_to_torch(vectors, form):
    expected, errors = form.quantize(vectors)
    found, found_errors = TRITON_BACKEND.quantize(vectors, form)
    is_finite = errors.isfinite()
    assert torch.equal(found_errors.isfinite(), is_finite)
    assert torch.equal(found.codes[is_finite], expected.codes[is_finite])
    assert torch.equal(found.scales[is_finite], expected.scales[is_finite])
    torch.testing.assert_close(found_errors[is_finite], errors[is_finite], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [64, 100, 128, 192])
def test_integers_and_scales_equal_those_of_torch(bits, dim):
    generator = torch.Generator().manual_seed(dim)
    vectors = torch.randn(70, dim, generator=generator) ** 3 * 10.0 ** torch.linspace(-3, 3, 70)[:, None]
    vectors[3], vectors[4] = 0, 1e-30
    assert_equal_to_torch(vectors, VectorFormat(dim, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_16_bits(dtype):
    assert_equal_to_torch(
        torch.randn(20, 80, generator=torch.Generator().manual_seed(0)).to(dtype), VectorFormat(80, 3)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_numbers_without_a_scale_have_no_finite_error(bad):
    vectors = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    vectors[5, 3] = bad
    assert_equal_to_torch(vectors, VectorFormat(64, 4))
    assert not TRITON_BACKEND.quantize(vectors, VectorFormat(64, 4))[1][5].isfinite()


def test_no_vectors():
    vectors, errors = TRITON_BACKEND.quantize(torch.empty(0, 64), VectorFormat(64, 4))
    assert len(vectors) == len(errors) == 0


def test_vectors_are_quantized_by_torch_if_the_kernel_does_not_fit_the_device(monkeypatch):
    def fail(*arguments, **options):
        raise KernelFallbackError

    monkeypatch.setattr("suffice.kv.kernels.packing.launch", fail)
    assert_equal_to_torch(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), VectorFormat(64, 4))


def feedback_of(form, counts, seed=0):
    queries = torch.randn(len(counts), 300, form.dim, generator=torch.Generator().manual_seed(seed))
    queries = queries @ torch.randn(form.dim, form.dim, generator=torch.Generator().manual_seed(seed + 1))
    moments, scales = queries.mT @ queries / 300, torch.rand(len(counts), form.dim) + 0.5
    return ErrorFeedback.from_moments(moments, scales, form.rotation(moments), counts)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [64, 100, 192])
def test_rounding_with_feedback_equals_that_of_torch(bits, dim):
    form, counts = VectorFormat(dim, bits), [20, 0, 3, 17]
    vectors = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim))
    vectors[3] = 0
    feedback = feedback_of(form, counts)
    expected, errors = form.quantize(vectors, feedback)
    found, found_errors = TRITON_BACKEND.quantize(vectors, form, feedback)
    assert torch.equal(found.scales, expected.scales)
    # An integer that is halfway between two may be rounded either way, and changes those after it.
    is_equal = (found.codes == expected.codes).all(-1)
    assert int(is_equal.sum()) >= 36
    torch.testing.assert_close(found_errors[is_equal], errors[is_equal], rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found_errors.sum(), errors.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_rounding_with_feedback_reports_numbers_without_a_scale(bad):
    form = VectorFormat(64, 4)
    vectors = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    vectors[5, 3] = bad
    _, errors = TRITON_BACKEND.quantize(vectors, form, feedback_of(form, [9]))
    assert errors.isfinite().tolist() == [index != 5 for index in range(9)]


def test_vectors_are_rounded_by_torch_if_the_kernel_does_not_fit_the_device(monkeypatch):
    def fail(*arguments, **options):
        raise KernelFallbackError

    monkeypatch.setattr("suffice.kv.kernels.error_feedback.launch", fail)
    form, vectors = VectorFormat(64, 4), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    feedback = feedback_of(form, [4, 5])
    found, expected = TRITON_BACKEND.quantize(vectors, form, feedback), form.quantize(vectors, feedback)
    assert torch.equal(found[0].codes, expected[0].codes)
