import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suffice.information import NotPositiveDefiniteError, gram_matrix, psd_cholesky, working_dtype
from tests.information.oracle import dense_gram, draw_set, numbers, seeds, sizes


@pytest.mark.parametrize(
    ("input_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_working_dtype(input_dtype: torch.dtype, expected: torch.dtype):
    assert working_dtype(input_dtype) == expected
    vectors, weights = draw_set(0, n=5, d=3, dtype=input_dtype)
    assert gram_matrix(vectors, weights).dtype == expected
    assert psd_cholesky(torch.eye(3, dtype=input_dtype)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_working_dtype_rejects_types_that_are_not_real_floating_point(dtype: torch.dtype):
    with pytest.raises(TypeError, match=f"floating point type, got {dtype}"):
        working_dtype(dtype)


@given(seed=seeds, n=sizes, d=sizes)
def test_gram_is_the_sum_of_outer_products(seed: int, n: int, d: int):
    vectors, weights = draw_set(seed, 2, 3, n=n, d=d)
    result = gram_matrix(vectors, weights)
    assert torch.equal(result, result.mT)
    for i in range(2):
        for j in range(3):
            expected = torch.from_numpy(dense_gram(numbers(vectors[i, j]), numbers(weights[i, j])))
            torch.testing.assert_close(result[i, j], expected)
    torch.testing.assert_close(gram_matrix(vectors), gram_matrix(vectors, torch.ones_like(weights)), rtol=0, atol=0)


def test_gram_broadcasts_weights_over_leading_dimensions():
    vectors, weights = draw_set(1, 2, 3, n=4, d=2)
    shared = weights[:, :1]
    assert torch.equal(gram_matrix(vectors, shared), gram_matrix(vectors, shared.expand(2, 3, 4)))
    assert torch.equal(gram_matrix(vectors, shared[0, 0]), gram_matrix(vectors, shared[0, 0].expand(2, 3, 4)))


def test_gram_is_float64_if_only_the_weights_are_float64():
    vectors, weights = draw_set(1, n=4, d=2)
    assert gram_matrix(vectors.float(), weights).dtype == torch.float64


def test_gram_has_full_precision_under_autocast():
    vectors, weights = draw_set(2, n=300, d=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_matrix(vectors, weights)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gram_matrix(vectors, weights))


def test_gram_of_half_precision_vectors_accumulates_in_float32():
    # The sum of 4096 ones is 4096. In bfloat16 it would not exceed 256.
    assert gram_matrix(torch.ones(4096, 1, dtype=torch.bfloat16)).item() == 4096


@pytest.mark.parametrize(
    ("vectors", "weights", "error", "message"),
    [
        ([[1.0]], None, TypeError, r"vectors must be a torch.Tensor, got list"),
        (torch.ones(3, 2, dtype=torch.long), None, TypeError, r"vectors .* floating point dtype, got torch.int64"),
        (torch.ones(3), None, ValueError, r"vectors must have shape \[..., n, d\].*got \(3,\)"),
        (torch.ones(0, 2), None, ValueError, r"every size at least 1, got \(0, 2\)"),
        (torch.ones(3, 0), None, ValueError, r"every size at least 1, got \(3, 0\)"),
        (torch.ones(3, 2), [1.0], TypeError, r"weights must be a torch.Tensor, got list"),
        (torch.ones(3, 2), torch.ones(3, dtype=torch.bool), TypeError, r"weights .*, got torch.bool"),
        (torch.ones(3, 2), torch.ones(2), ValueError, r"weights must have shape \(3,\), got \(2,\)"),
        (torch.ones(3, 2), torch.ones(1), ValueError, r"weights must have shape \(3,\), got \(1,\)"),
        (torch.ones(3, 2), torch.tensor(1.0), ValueError, r"weights must have shape \(3,\), got \(\)"),
        (torch.ones(3, 2), torch.ones(1, 3), ValueError, r"weights must have shape \(3,\), got \(1, 3\)"),
        (torch.ones(3, 2), torch.ones(3, device="meta"), ValueError, r"weights must be on cpu .*, got meta"),
        (torch.ones(3, 2), torch.tensor([1.0, -2.0, 0]), ValueError, r"weights must be at least 0, got -2.0"),
        (torch.zeros(3, 2), torch.tensor([1.0, -2.0, 0]), ValueError, r"weights must be at least 0, got -2.0"),
        (torch.ones(3, 2), torch.tensor([1.0, torch.nan, 0]), ValueError, r"weights must be finite, got 1 NaN"),
        (torch.ones(3, 2), torch.tensor([1.0, torch.inf, 0]), ValueError, r"weights must be finite, got 1 NaN"),
        (torch.tensor([[1.0, torch.nan]]), torch.zeros(1), ValueError, r"vectors must be finite, got 1 NaN"),
        (torch.tensor([[torch.inf, -torch.inf]]), None, ValueError, r"vectors must be finite, got 2 NaN"),
        (torch.full((2, 2), 1e30), None, ValueError, r"Gram matrix within the range of torch.float32"),
    ],
)
def test_gram_rejects_invalid_arguments(
    vectors: torch.Tensor, weights: torch.Tensor, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        gram_matrix(vectors, weights)


@given(seed=seeds, d=sizes)
def test_cholesky_factor_reproduces_the_matrix(seed: int, d: int):
    vectors, weights = draw_set(seed, 4, n=2 * d, d=d)
    matrix = gram_matrix(vectors, weights)
    factor = psd_cholesky(matrix)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.mT, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_jitter_is_added_only_to_matrices_that_need_it(dtype: torch.dtype, scale: float):
    regular = gram_matrix(*draw_set(3, n=20, d=6, dtype=dtype)) * scale
    singular = torch.ones(6, 6, dtype=dtype) * scale
    factor = psd_cholesky(torch.stack([regular, singular, regular]))
    assert torch.equal(factor[0], torch.linalg.cholesky(regular))
    assert torch.equal(factor[2], torch.linalg.cholesky(regular))
    # The jitter is at most a thousand times the rounding error of the factorization.
    allowed = 1e3 * 6 * torch.finfo(dtype).eps * scale
    assert (factor[1] @ factor[1].mT - singular).abs().max() <= 1.1 * allowed


def test_jitter_of_a_matrix_does_not_depend_on_the_other_matrices():
    singular = torch.ones(4, 4)
    worse = singular - 1e-4 * torch.eye(4)
    factor = psd_cholesky(torch.stack([singular, worse]))
    assert torch.equal(factor[0], psd_cholesky(singular))
    assert torch.equal(factor[1], psd_cholesky(worse))
    assert factor[1, -1, -1] > 3 * factor[0, -1, -1]  # the second matrix needs more jitter


def test_cholesky_of_a_single_matrix():
    factor = psd_cholesky(torch.ones(3, 3))
    torch.testing.assert_close(factor @ factor.mT, torch.ones(3, 3), rtol=0, atol=1e-4)


def test_cholesky_factorizes_once_if_all_matrices_succeed(monkeypatch: pytest.MonkeyPatch):
    calls: list[torch.Tensor] = []
    original = torch.linalg.cholesky_ex

    def counted(matrix: torch.Tensor):
        calls.append(matrix)
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    matrix = torch.eye(3).expand(5, 3, 3)
    psd_cholesky(matrix)
    assert len(calls) == 1
    assert calls[0] is matrix


@pytest.mark.parametrize(
    "matrix", [-torch.eye(3), torch.zeros(3, 3), torch.tensor([[1.0, 2.0], [2.0, 1.0]])], ids=["negative", "0", "mixed"]
)
def test_cholesky_error_counts_the_indefinite_matrices(matrix: torch.Tensor):
    batch = torch.stack([torch.eye(len(matrix)), matrix, matrix])
    with pytest.raises(NotPositiveDefiniteError, match="got 2 of 3 matrices"):
        psd_cholesky(batch)
    assert issubclass(NotPositiveDefiniteError, ValueError)


@given(row=st.integers(0, 2), column=st.integers(0, 2), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_cholesky_rejects_matrices_that_are_not_finite(row: int, column: int, value: float):
    batch = torch.eye(3).repeat(4, 1, 1)
    batch[2, row, column] = batch[2, column, row] = value
    with pytest.raises(NotPositiveDefiniteError, match="got NaN or Inf in 1 of 4 matrices"):
        psd_cholesky(batch)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (1.0, TypeError, r"matrix must be a torch.Tensor, got float"),
        (torch.eye(2, dtype=torch.long), TypeError, r"matrix .* floating point dtype, got torch.int64"),
        (torch.ones(2, 3), ValueError, r"matrix must have shape \[..., d, d\] .*got \(2, 3\)"),
        (torch.ones(3), ValueError, r"matrix must have shape \[..., d, d\] .*got \(3,\)"),
        (torch.ones(0, 0), ValueError, r"matrix must have shape \[..., d, d\] .*got \(0, 0\)"),
    ],
)
def test_cholesky_rejects_invalid_arguments(matrix: torch.Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        psd_cholesky(matrix)
