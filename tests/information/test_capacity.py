import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suffice.information import (
    NotPositiveDefiniteError,
    capacity,
    deletion_cost,
    effective_dimension,
    factorize,
    gram_matrix,
    leverage_scores,
    noise_variance,
)
from tests.information.oracle import (
    dense_capacity,
    dense_leverage,
    dense_noise,
    draw_set,
    numbers,
    ridges,
    seeds,
    sizes,
)

HALVES = [torch.bfloat16, torch.float16]


def everything(vectors: Tensor, weights: Tensor | None = None, **options: object) -> dict[str, Tensor]:
    """Return all results of the module for one input."""
    factor = factorize(vectors, weights, **options)  # pyright: ignore
    scores = leverage_scores(vectors, weights, **options)  # pyright: ignore
    return {
        "capacity": capacity(vectors, weights, **options),  # pyright: ignore
        "leverage": scores,
        "cost": deletion_cost(scores),
        "dimension": effective_dimension(vectors, weights, **options),  # pyright: ignore
        "factor.capacity": factor.capacity,
        "factor.dimension": factor.effective_dimension,
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-9):
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# Agreement with the dense formulas


@given(seed=seeds, n=sizes, d=sizes, ridge=ridges, relative=st.booleans())
def test_results_agree_with_the_dense_formulas(seed: int, n: int, d: int, ridge: float, relative: bool):
    vectors, weights = draw_set(seed, n=n, d=d)
    u, w = numbers(vectors), numbers(weights)
    noise = dense_noise(u, w, ridge, relative)
    options = {"ridge": ridge, "relative": relative}
    results = everything(vectors, weights, **options)
    leverage = dense_leverage(u, w, noise)

    assert float(noise_variance(gram_matrix(vectors, weights), **options)) == pytest.approx(noise)
    assert float(results["capacity"]) == pytest.approx(dense_capacity(u, w, noise), abs=1e-9)
    np.testing.assert_allclose(numbers(results["leverage"]), leverage, rtol=1e-8)
    assert float(results["dimension"]) == pytest.approx(leverage.sum(), abs=1e-9)
    assert results["factor.capacity"] == results["capacity"]
    assert results["factor.dimension"] == results["dimension"]
    np.testing.assert_allclose(
        numbers(factorize(vectors, weights, **options).leverage(vectors, weights)), leverage, rtol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("relative", [True, False])
def test_lower_precision_agrees_with_float64(dtype: torch.dtype, relative: bool):
    vectors, weights = draw_set(11, 2, 3, n=400, d=16, dtype=dtype)
    low = everything(vectors, weights, relative=relative)
    high = everything(vectors.double(), weights.double(), relative=relative)
    assert {value.dtype for value in low.values()} == {torch.float32}
    assert {value.dtype for value in high.values()} == {torch.float64}
    assert_same({name: value.double() for name, value in low.items()}, high, rtol=2e-5, atol=2e-6)


def test_results_are_float64_if_only_the_weights_are_float64():
    vectors, weights = draw_set(11, n=9, d=4, dtype=torch.float32)
    assert {value.dtype for value in everything(vectors, weights.double()).values()} == {torch.float64}


@given(seed=seeds, n=sizes, d=sizes, extra=sizes, relative=st.booleans())
def test_factor_computes_leverage_of_items_outside_the_set(seed: int, n: int, d: int, extra: int, relative: bool):
    vectors, weights = draw_set(seed, n=n, d=d)
    others, their_weights = draw_set(seed + 1, n=extra, d=d)
    factor = factorize(vectors * 100, weights * 7, relative=relative)
    u, w = numbers(vectors * 100), numbers(weights * 7)
    inverse = np.linalg.inv(dense_noise(u, w, 0.1, relative) * np.eye(d) + np.einsum("n,ni,nj->ij", w, u, u))
    expected = np.einsum("n,ni,ij,nj->n", numbers(their_weights), numbers(others), inverse, numbers(others))
    np.testing.assert_allclose(numbers(factor.leverage(others, their_weights)), expected, rtol=1e-7)
    unweighted = np.einsum("ni,ij,nj->n", numbers(others), inverse, numbers(others))
    np.testing.assert_allclose(numbers(factor.leverage(others)), unweighted, rtol=1e-7)


def test_leverage_of_more_items_than_one_chunk():
    vectors, weights = draw_set(5, 2, n=2500, d=4)
    expected = factorize(vectors, weights)
    inverse = torch.linalg.inv(
        gram_matrix(vectors, weights)
        + torch.diag_embed(noise_variance(gram_matrix(vectors, weights)).unsqueeze(-1).expand(2, 4))
    )
    direct = weights * torch.einsum("bni,bij,bnj->bn", vectors, inverse, vectors)
    torch.testing.assert_close(expected.leverage(vectors, weights), direct, rtol=1e-9, atol=0)


# Identities


@given(seed=seeds, n=sizes, d=sizes, ridge=ridges, relative=st.booleans())
def test_deletion_cost_is_the_capacity_lost_by_deleting_an_item(
    seed: int, n: int, d: int, ridge: float, relative: bool
):
    vectors, weights = draw_set(seed, n=n, d=d)
    options = {"ridge": ridge, "relative": relative}
    cost = deletion_cost(leverage_scores(vectors, weights, **options))
    for i in range(n):
        without = capacity(vectors, weights, subset=torch.arange(n) != i, **options)
        lost = capacity(vectors, weights, **options) - without
        torch.testing.assert_close(lost, cost[i], rtol=1e-7, atol=1e-9)


@given(seed=seeds, n=sizes, d=sizes, ridge=ridges)
def test_leverages_sum_to_the_effective_dimension(seed: int, n: int, d: int, ridge: float):
    vectors, weights = draw_set(seed, 3, n=n, d=d)
    scores = leverage_scores(vectors, weights, ridge=ridge)
    dimension = effective_dimension(vectors, weights, ridge=ridge)
    torch.testing.assert_close(scores.sum(-1), dimension, rtol=1e-9, atol=1e-9)
    assert (scores >= 0).all()
    assert (scores < 1).all()
    assert (dimension <= min(n, d)).all()


@given(seed=seeds, n=st.integers(2, 9), d=sizes)
def test_capacity_is_monotone_and_submodular(seed: int, n: int, d: int):
    vectors, weights = draw_set(seed, n=n, d=d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    values = torch.stack([capacity(vectors, weights, subset=order[:k]) for k in range(n + 1)])
    assert float(values[0]) == pytest.approx(0, abs=1e-12)
    assert (values >= 0).all()
    assert (values.diff() >= -1e-12).all()
    last = order[-1:]
    gains = [
        capacity(vectors, weights, subset=torch.cat([order[:k], last])) - values[k] for k in range(n)
    ]  # gains of one item when it is added to larger and larger sets
    assert (torch.stack(gains).diff() <= 1e-12).all()


# Invariances


@given(seed=seeds, n=sizes, d=sizes, relative=st.booleans())
def test_results_do_not_depend_on_the_order_of_items(seed: int, n: int, d: int, relative: bool):
    vectors, weights = draw_set(seed, n=n, d=d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    before = everything(vectors, weights, relative=relative)
    after = everything(vectors[order], weights[order], relative=relative)
    before["leverage"], before["cost"] = before["leverage"][order], before["cost"][order]
    assert_same(after, before)


@given(seed=seeds, n=sizes, d=sizes, relative=st.booleans())
def test_results_are_invariant_to_rotation(seed: int, n: int, d: int, relative: bool):
    vectors, weights = draw_set(seed, n=n, d=d)
    rotation = torch.linalg.qr(draw_set(seed, n=d, d=d)[0]).Q
    assert_same(
        everything(vectors @ rotation, weights, relative=relative), everything(vectors, weights, relative=relative)
    )


@given(
    seed=seeds,
    n=sizes,
    d=sizes,
    vector_scale=st.sampled_from([1e-140, 1e-20, 3.0, 1e30, 1e300]),
    weight_scale=st.sampled_from([1e-300, 1e-30, 5.0, 1e30, 1e300]),
)
def test_results_are_invariant_to_scale_if_relative(
    seed: int, n: int, d: int, vector_scale: float, weight_scale: float
):
    vectors, weights = draw_set(seed, n=n, d=d)
    scaled = vectors * vector_scale, weights * weight_scale
    assert_same(everything(*scaled), everything(vectors, weights))
    torch.testing.assert_close(
        factorize(*scaled).leverage(*scaled), leverage_scores(vectors, weights), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("vector_scale", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("weight_scale", [1e-30, 1e3, 1e30])
def test_results_are_invariant_to_scale_in_float32(vector_scale: float, weight_scale: float):
    vectors, weights = draw_set(4, n=50, d=8, dtype=torch.float32)
    scaled = vectors * vector_scale, weights * weight_scale
    assert_same(everything(*scaled), everything(vectors, weights), rtol=1e-4, atol=1e-5)


def test_capacity_depends_on_scale_if_absolute():
    vectors, weights = draw_set(4, n=50, d=8)
    one = capacity(vectors, weights, ridge=1.0, relative=False)
    assert capacity(10 * vectors, weights, ridge=1.0, relative=False) > one + 1


@given(seed=seeds, n=sizes, d=sizes, relative=st.booleans(), padded=st.booleans())
def test_batch_equals_a_loop_over_its_elements(seed: int, n: int, d: int, relative: bool, padded: bool):
    vectors, weights = draw_set(seed, 2, 3, n=n, d=d)
    # With absolute noise, a factor of 1e25 would leave no digits to compare.
    vectors[0, 1] *= 1e25 if relative else 3
    weights[1, 2] = 0
    valid = (
        torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)) < 0.7
        if padded
        else torch.ones(2, 3, n, dtype=torch.bool)
    )
    together = everything(vectors, weights, valid=valid, relative=relative)
    for i in range(2):
        for j in range(3):
            alone = everything(vectors[i, j], weights[i, j], valid=valid[i, j], relative=relative)
            assert_same({name: value[i, j] for name, value in together.items()}, alone)


@given(seed=seeds, n=sizes, d=sizes, padding=sizes, junk=st.sampled_from([0.0, 1.0, 1e300, torch.nan, torch.inf]))
def test_invalid_items_are_ignored(seed: int, n: int, d: int, padding: int, junk: float):
    vectors, weights = draw_set(seed, n=n, d=d)
    padded = torch.cat([torch.full((padding, d), junk, dtype=torch.float64), vectors])
    padded_weights = torch.cat([torch.full((padding,), junk, dtype=torch.float64), weights])
    valid = torch.arange(padding + n) >= padding
    results = everything(padded, padded_weights, valid=valid)
    assert not results["leverage"][:padding].any()
    results["leverage"], results["cost"] = results["leverage"][padding:], results["cost"][padding:]
    assert_same(results, everything(vectors, weights))
    unweighted = leverage_scores(padded, valid=valid)
    torch.testing.assert_close(unweighted[padding:], leverage_scores(vectors), rtol=1e-9, atol=1e-9)


def test_autocast_does_not_change_the_results():
    vectors, weights = draw_set(9, n=300, d=8, dtype=torch.float32)
    factor = factorize(vectors, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(vectors, weights)
        again = factor.leverage(vectors, weights)
    assert_same(inside, everything(vectors, weights), rtol=0, atol=0)
    assert torch.equal(again, factor.leverage(vectors, weights))


def test_gradients_of_capacity_and_leverage():
    vectors, weights = draw_set(3, 2, n=5, d=3)
    torch.autograd.gradcheck(
        lambda u, w: (capacity(u, w), leverage_scores(u, w)), (vectors.requires_grad_(), weights.requires_grad_())
    )


# Subsets


@given(seed=seeds, n=sizes, d=sizes, data=st.data())
def test_capacity_of_a_subset_uses_the_noise_of_the_full_set(seed: int, n: int, d: int, data: st.DataObject):
    vectors, weights = draw_set(seed, n=n, d=d)
    chosen = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    u, w = numbers(vectors), numbers(weights)
    expected = dense_capacity(u, w, dense_noise(u, w, 0.1, relative=True), chosen)
    index = torch.tensor(chosen, dtype=torch.long)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[index] = True
    assert float(capacity(vectors, weights, subset=index)) == pytest.approx(expected, abs=1e-9)
    assert float(capacity(vectors, weights, subset=mask)) == pytest.approx(expected, abs=1e-9)


def test_full_subset_gives_the_full_capacity_and_ignores_invalid_items():
    vectors, weights = draw_set(6, 2, n=6, d=3)
    valid = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    whole = capacity(vectors, weights, valid=valid)
    assert torch.equal(capacity(vectors, weights, valid=valid, subset=torch.arange(6)), whole)
    assert torch.equal(capacity(vectors, weights, valid=valid, subset=valid), whole)
    assert torch.equal(capacity(vectors, weights, valid=valid, subset=valid.expand(2, 6)), whole)
    different = torch.tensor([[0, 1], [3, 4]])
    per_row = capacity(vectors, weights, valid=valid, subset=different)
    for row in range(2):
        alone = capacity(vectors[row], weights[row], valid=valid, subset=different[row])
        torch.testing.assert_close(per_row[row], alone)


@pytest.mark.parametrize(
    ("subset", "error", "message"),
    [
        ([0, 1], TypeError, r"subset must be a torch.Tensor, got list"),
        (torch.tensor([0.0]), TypeError, r"subset must have dtype .*, got torch.float32"),
        (torch.tensor([0], dtype=torch.int32), TypeError, r"subset must have dtype .*, got torch.int32"),
        (torch.tensor([0, 4]), ValueError, r"subset must contain indices from 0 to 3, got 0 to 4"),
        (torch.tensor([-1, 2]), ValueError, r"subset must contain indices from 0 to 3, got -1 to 2"),
        (torch.tensor([1, 2, 1]), ValueError, "each index at most once, got 1 repeated"),
        (torch.tensor(1), ValueError, r"subset must have shape \(0,\), got \(\)"),
        (torch.zeros(2, 1, dtype=torch.long), ValueError, r"subset must have shape \(1,\), got \(2, 1\)"),
        (torch.zeros(3, dtype=torch.bool), ValueError, r"subset must have shape \(4,\), got \(3,\)"),
    ],
)
def test_capacity_rejects_invalid_subsets(subset: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        capacity(torch.ones(4, 2), subset=subset)


# Extreme inputs


def extreme_inputs() -> dict[str, tuple[Tensor, Tensor | None]]:
    vectors, weights = draw_set(8, 2, n=40, d=6, dtype=torch.float32)
    spread = torch.logspace(-30, 0, 40).expand(2, 40)
    one = torch.zeros(2, 40)
    one[:, 7] = 1
    return {
        "duplicates": (vectors[:, :1].expand(2, 40, 6), weights),
        "zero vectors": (torch.zeros(2, 40, 6), weights),
        "zero weights": (vectors, torch.zeros(2, 40)),
        "one zero element of the batch": (vectors * torch.tensor([0.0, 1.0])[:, None, None], weights),
        "rank one": (vectors[..., :1] * torch.ones(6), weights),
        "n < d": (vectors[:, :3], weights[:, :3]),
        "one item": (vectors[:, :1], weights[:, :1]),
        "one dimension": (vectors[..., :1], weights),
        "weights over 30 orders": (vectors, spread),
        "weights over 30 orders, the largest on zero": (vectors * (torch.arange(40) < 20)[:, None], spread),
        "all weight on one": (vectors, one),
        "huge weights": (vectors, spread * 1e38),
        "subnormal weights": (vectors, spread * 1e-12),
        "huge vectors": (vectors * 1e30, None),
        "largest float": (torch.full((2, 40, 6), torch.finfo(torch.float32).max), None),
        "smallest float": (torch.full((2, 40, 6), 1e-45), None),
        "vectors over 60 orders": (vectors * torch.logspace(-30, 30, 40)[:, None], weights),
    }


@pytest.mark.parametrize("name", extreme_inputs())
@pytest.mark.parametrize("ridge", [1e-30, 1e-6, 0.1, 1e6])
@pytest.mark.parametrize("relative", [True, False])
def test_extreme_inputs_give_finite_results_or_an_error(name: str, ridge: float, relative: bool):
    vectors, weights = extreme_inputs()[name]
    try:
        results = everything(vectors, weights, ridge=ridge, relative=relative)
    except NotPositiveDefiniteError:
        assert ridge < 1e-6, "only a ridge below the precision of float32 may fail"
        return
    except ValueError:
        assert not relative, "only fixed noise may overflow"
        with pytest.raises(ValueError, match=r"within the range of torch.float32"):
            gram_matrix(vectors, weights)
        return
    for key, value in results.items():
        assert value.isfinite().all(), key
        assert (value >= 0).all(), key
    assert (results["leverage"] < 1).all()
    assert (results["dimension"] <= vectors.shape[-1]).all()


@pytest.mark.parametrize("name", extreme_inputs())
def test_extreme_inputs_agree_with_float64(name: str):
    vectors, weights = extreme_inputs()[name]
    high = everything(vectors.double(), None if weights is None else weights.double())
    low = {key: value.double() for key, value in everything(vectors, weights).items()}
    assert_same(low, high, rtol=1e-4, atol=1e-5)


def test_small_weights_have_full_relative_precision():
    vectors, _ = draw_set(8, n=40, d=6, dtype=torch.float32)
    weights = torch.logspace(-30, 0, 40)
    low = leverage_scores(vectors, weights).double()
    torch.testing.assert_close(low, leverage_scores(vectors.double(), weights.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_inputs_as_large_as_their_dtype_allows(dtype: torch.dtype):
    vectors, _ = draw_set(8, n=40, d=6, dtype=dtype)
    vectors = vectors / vectors.abs().max() * torch.finfo(dtype).max
    assert vectors.isfinite().all()
    low = {key: value.double() for key, value in everything(vectors).items()}
    assert_same(low, everything(vectors.double()), rtol=1e-4, atol=1e-5)


def test_largest_floats_with_subnormal_numbers_flushed_to_zero():
    vectors = torch.full((4, 2), torch.finfo(torch.float32).max)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        flushed = leverage_scores(vectors)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(flushed, leverage_scores(torch.ones(4, 2)))


def test_capacity_is_not_negative_after_rounding():
    vectors, weights = draw_set(1, 5000, n=3, d=7)
    assert (capacity(vectors, weights, subset=torch.zeros(5000, 0, dtype=torch.long)) >= 0).all()


def test_zero_vectors_and_empty_sets_carry_no_information():
    results = everything(torch.zeros(3, 4, 2))
    assert not any(value.any() for value in results.values())
    nobody = everything(torch.ones(3, 4, 2), valid=torch.zeros(3, 4, dtype=torch.bool))
    assert not any(value.any() for value in nobody.values())


# Noise


def test_noise_variance_relative_and_absolute():
    batch = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.zeros(3, 3)])
    torch.testing.assert_close(noise_variance(batch, 0.5), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(noise_variance(batch, 2), torch.tensor([4.0, 1.0]))
    assert noise_variance(batch, 0.3, relative=False).tolist() == pytest.approx([0.3, 0.3])
    assert noise_variance(batch.half()).dtype == torch.float32
    assert noise_variance(batch.double()).dtype == torch.float64
    assert noise_variance(batch * 1e-42).min() > 0


@pytest.mark.parametrize(
    ("matrix", "ridge", "error", "message"),
    [
        (torch.ones(2, 3), 0.1, ValueError, r"gram must have shape \[..., d, d\]"),
        (torch.full((2, 2), torch.nan), 0.1, ValueError, "gram must have a finite trace"),
        (torch.full((2, 2), torch.inf), 0.1, ValueError, "gram must have a finite trace"),
        (torch.eye(2), 1e300, ValueError, r"ridge must give a .* within the range of torch.float32, got 1e\+300"),
    ],
)
def test_noise_variance_rejects_invalid_arguments(matrix: Tensor, ridge: float, error: type[Exception], message: str):
    for relative in (True, False):
        with pytest.raises(error, match=message):
            noise_variance(matrix, ridge, relative)


@pytest.mark.parametrize(
    ("ridge", "error", "message"),
    [
        (0.0, ValueError, r"ridge must be finite and above 0, got 0.0"),
        (-1, ValueError, r"ridge must be finite and above 0, got -1"),
        (math.nan, ValueError, r"ridge must be finite and above 0, got nan"),
        (math.inf, ValueError, r"ridge must be finite and above 0, got inf"),
        ("0.1", TypeError, r"ridge must be a number, got str"),
        (True, TypeError, r"ridge must be a number, got bool"),
    ],
)
def test_all_functions_check_the_ridge(ridge: float, error: type[Exception], message: str):
    vectors = torch.ones(3, 2)
    for call in (factorize, capacity, leverage_scores, effective_dimension):
        with pytest.raises(error, match=message):
            call(vectors, ridge=ridge)
    with pytest.raises(error, match=message):
        noise_variance(torch.eye(2), ridge)


def test_ridge_may_be_a_number_of_numpy():
    vectors = torch.eye(3, 2)
    for ridge in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(capacity(vectors, ridge=ridge), capacity(vectors, ridge=0.5))
    assert torch.equal(capacity(vectors, ridge=np.int64(1)), capacity(vectors, ridge=1.0))


# Errors


@pytest.mark.parametrize("call", [factorize, capacity, leverage_scores, effective_dimension])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        (None, {}, TypeError, r"vectors must be a torch.Tensor, got NoneType"),
        (torch.ones(3, 2, dtype=torch.int32), {}, TypeError, r"vectors .*, got torch.int32"),
        (torch.ones(2), {}, ValueError, r"vectors must have shape \[..., n, d\]"),
        (torch.ones(2, 0, 3), {}, ValueError, r"every size at least 1, got \(2, 0, 3\)"),
        (torch.ones(3, 2), {"weights": torch.ones(4)}, ValueError, r"weights must have shape \(3,\), got \(4,\)"),
        (torch.ones(3, 2), {"weights": torch.ones(3).int()}, TypeError, r"weights .*, got torch.int32"),
        (torch.ones(3, 2), {"weights": torch.tensor([0, -1e-9, 1])}, ValueError, "weights must be at least 0"),
        (torch.ones(3, 2), {"weights": torch.tensor([0, torch.nan, 1])}, ValueError, "weights must be finite"),
        (torch.ones(3, 2), {"weights": torch.tensor([0, torch.inf, 1])}, ValueError, "weights must be finite"),
        (torch.ones(3, 2), {"valid": torch.ones(3)}, TypeError, r"valid must have dtype torch.bool"),
        (torch.ones(3, 2), {"valid": [True] * 3}, TypeError, r"valid must be a torch.Tensor, got list"),
        (torch.ones(3, 2), {"valid": torch.ones(2, 3).bool()}, ValueError, r"valid must have shape \(3,\)"),
    ],
)
def test_invalid_arguments_are_rejected(call, relative, vectors, options, error, message):
    with pytest.raises(error, match=message):
        call(vectors, relative=relative, **options)


@pytest.mark.parametrize("call", [factorize, capacity, leverage_scores, effective_dimension])
@given(
    place=st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 2)),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    weight=st.sampled_from([0.0, 1.0]),
    relative=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
)
def test_one_entry_that_is_not_finite_is_rejected_at_any_index(call, place, value, weight, relative, dtype):
    vectors, weights = draw_set(1, 2, n=5, d=3, dtype=dtype)
    vectors[place] = value
    weights[place[:2]] = weight
    with pytest.raises(ValueError, match=r"vectors must be finite, got 1 NaN or infinite entries"):
        call(vectors, weights, relative=relative)


def test_overflow_with_absolute_noise_is_an_error():
    with pytest.raises(ValueError, match=r"range of torch.float32, got vectors up to 1e\+30"):
        capacity(torch.full((3, 2), 1e30), relative=False)


@pytest.mark.parametrize(
    ("vectors", "weights", "error", "message"),
    [
        (torch.ones(3, 3), None, ValueError, r"vectors must have shape \(2, 3, 2\), got \(3, 3\)"),
        (torch.ones(3, 2), None, ValueError, r"vectors must have shape \(2, 3, 2\), got \(3, 2\)"),
        (torch.ones(2, 3, 2).long(), None, TypeError, r"vectors .*, got torch.int64"),
        (torch.ones(2, 3, 2), torch.ones(2), ValueError, r"weights must have shape \(2, 3\), got \(2,\)"),
        (torch.full((2, 3, 2), torch.nan), None, ValueError, "vectors and weights must be finite"),
        (torch.ones(2, 3, 2), -torch.ones(2, 3), ValueError, "weights at least 0, and both in the range"),
        (torch.full((2, 3, 2), 1e30), None, ValueError, "NaN or infinite in torch.float32"),
    ],
)
def test_factor_rejects_invalid_items(vectors: Tensor, weights: Tensor | None, error: type[Exception], message: str):
    factor = factorize(torch.ones(2, 3, 2))
    with pytest.raises(error, match=message):
        factor.leverage(vectors, weights)


def test_factor_is_frozen():
    with pytest.raises(AttributeError):
        factorize(torch.ones(3, 2)).noise = torch.ones(())  # pyright: ignore


# Deletion cost


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_deletion_cost_is_exact_and_finite(dtype: torch.dtype):
    scores = torch.tensor([0.0, 1e-30, 0.25, 0.5, 1.0, 1.0000001], dtype=torch.float64).to(dtype)
    cost = deletion_cost(scores)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [-0.5 * math.log1p(-s) for s in scores[:4].tolist()]
    assert cost[:4].tolist() == pytest.approx(expected, rel=1e-6)
    most = -0.5 * math.log(torch.finfo(cost.dtype).eps)
    assert cost[4:].tolist() == pytest.approx([most, most])


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (0.5, TypeError, r"leverage must be a torch.Tensor, got float"),
        (torch.tensor([1]), TypeError, r"leverage .*, got torch.int64"),
        (torch.tensor([0.5, -0.1]), ValueError, r"leverage must be at least 0, got NaN or -0.1"),
        (torch.tensor([0.5, torch.nan]), ValueError, r"leverage must be at least 0, got NaN"),
    ],
)
def test_deletion_cost_rejects_invalid_leverage(scores: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        deletion_cost(scores)


@pytest.mark.parametrize(
    ("ridge", "relative"), [(9e-5, True), (1e-6, True), (1e-8, True), (1e-4, False), (1e-6, False)]
)
@pytest.mark.parametrize(("count", "size", "rank"), [(200, 64, 4), (2000, 128, 1), (10, 128, 10)])
def test_float32_is_precise_for_small_ridges_and_sets_of_low_rank(count, size, rank, ridge, relative):
    """Rounding errors of a Gram matrix in float32 would count as signal in the directions without signal."""
    generator = torch.Generator().manual_seed(count)
    vectors = torch.randn(count, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    weights = torch.rand(count, generator=generator)
    options = {"ridge": ridge, "relative": relative}
    exact = vectors.double(), weights.double()
    got, expected = (capacity(*inputs, **options) for inputs in ((vectors, weights), exact))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    got, expected = (effective_dimension(*inputs, **options) for inputs in ((vectors, weights), exact))
    assert float(got) <= rank + 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    got, expected = (leverage_scores(*inputs, **options) for inputs in ((vectors, weights), exact))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)
