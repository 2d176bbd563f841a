"""Quantization of vectors by a kernel, run by Triton's interpreter; the oracle is plain torch."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.gpu import KernelFallbackError
from suffice.kv.backend.triton_backend import TRITON_BACKEND
from suffice.kv.storage.bit_packing import SUPPORTED_BITS
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
