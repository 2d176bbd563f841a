import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from suffice.information import capacity, leverage_scores, select_by_leverage, select_greedy, select_top
from tests.information.oracle import (
    best_capacity,
    dense_capacity,
    dense_greedy,
    dense_leverage,
    dense_noise,
    draw_set,
    numbers,
    ridges,
    seeds,
    sizes,
)

Select = Callable[..., Tensor]


def by_leverage_in_rounds(vectors: Tensor, weights: Tensor | None, budget: int, **options: object) -> Tensor:
    return select_by_leverage(vectors, weights, budget, rounds=3, **options)  # pyright: ignore


selectors = pytest.mark.parametrize("select", [select_by_leverage, by_leverage_in_rounds, select_greedy])


def draw_candidates(data: st.DataObject, n: int) -> tuple[Tensor, Tensor, int]:
    """Return masks of valid and of protected items, and a budget between their numbers."""
    valid = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    protected = [data.draw(st.booleans()) and v for v in valid]
    budget = data.draw(st.integers(max(1, sum(protected)), sum(valid)))
    return torch.tensor(valid), torch.tensor(protected), budget


# select_top


@given(data=st.data(), n=sizes, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_top_agrees_with_a_stable_sort(data: st.DataObject, n: int, dtype: torch.dtype):
    values = data.draw(st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 1.0, math.inf]), min_size=n, max_size=n))
    valid, protected, budget = draw_candidates(data, n)
    ranked = sorted((i for i in range(n) if valid[i]), key=lambda i: (not protected[i], -values[i], i))
    kept = select_top(torch.tensor(values, dtype=dtype), budget, valid=valid, protected=protected)
    assert kept.dtype == torch.long
    assert kept.tolist() == sorted(ranked[:budget])


@given(seed=seeds, n=sizes, data=st.data())
def test_top_of_a_batch_equals_a_loop_over_its_elements(seed: int, n: int, data: st.DataObject):
    scores = draw_set(seed, 2, 3, n=n, d=1)[1]
    valid, protected, budget = draw_candidates(data, n)
    kept = select_top(scores, budget, valid=valid, protected=protected)
    assert kept.shape == (2, 3, budget)
    for i in range(2):
        for j in range(3):
            assert torch.equal(kept[i, j], select_top(scores[i, j], budget, valid=valid, protected=protected))


def test_top_with_different_masks_in_each_row():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    valid = torch.tensor([[False, True, True, True], [True, True, True, True]])
    protected = torch.tensor([[False, False, False, True], [False, False, False, False]])
    assert select_top(scores, 2, valid=valid, protected=protected).tolist() == [[1, 3], [0, 1]]


def test_top_with_full_budget_keeps_all_items():
    assert select_top(torch.zeros(2, 5), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_top_accepts_nan_scores_of_invalid_items_only():
    scores = torch.tensor([torch.nan, 1.0, 2.0])
    assert select_top(scores, 1, valid=torch.tensor([False, True, True])).tolist() == [2]
    with pytest.raises(ValueError, match=r"scores must be numbers, got 1 NaN"):
        select_top(scores, 1)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0], TypeError, r"scores must be a torch.Tensor, got list"),
        (torch.tensor([1, 2]), TypeError, r"scores .*, got torch.int64"),
        (torch.tensor(1.0), ValueError, r"scores must have shape \[..., n\] .*got \(\)"),
        (torch.ones(2, 0), ValueError, r"scores must have shape \[..., n\] .*got \(2, 0\)"),
    ],
)
def test_top_rejects_invalid_scores(scores: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        select_top(scores, 1)


# select_by_leverage


@given(seed=seeds, n=sizes, d=sizes, ridge=ridges, relative=st.booleans(), data=st.data())
def test_one_round_keeps_the_highest_leverage_scores(
    seed: int, n: int, d: int, ridge: float, relative: bool, data: st.DataObject
):
    vectors, weights = draw_set(seed, n=n, d=d)
    valid, protected, budget = draw_candidates(data, n)
    kept = select_by_leverage(
        vectors, weights, budget, valid=valid, protected=protected, ridge=ridge, relative=relative
    )
    u, w = numbers(vectors), numbers(weights) * valid.numpy()
    leverage = dense_leverage(u, w, dense_noise(u, w, ridge, relative))
    ranked = sorted(np.flatnonzero(valid.numpy()), key=lambda i: (not protected[i], -leverage[i]))
    assume(budget == len(ranked) or protected[ranked[budget]] or leverage_gap(leverage, ranked, budget) > 1e-9)
    assert kept.tolist() == sorted(ranked[:budget])


def leverage_gap(leverage: np.ndarray, ranked: list[int], budget: int) -> float:
    """Return the relative difference between the last kept and the first dropped item."""
    return leverage[ranked[budget - 1]] / leverage[ranked[budget]] - 1 if leverage[ranked[budget]] else math.inf


def test_one_round_equals_the_top_of_the_leverage_scores():
    vectors, weights = draw_set(1, 2, 3, n=50, d=4, dtype=torch.float32)
    scores = leverage_scores(vectors, weights)
    assert torch.equal(select_by_leverage(vectors, weights, 20), select_top(scores, 20))


@given(seed=seeds, n=st.integers(4, 9), d=sizes, rounds=st.integers(2, 5), data=st.data())
def test_rounds_recompute_leverage_for_the_remaining_items(seed: int, n: int, d: int, rounds: int, data: st.DataObject):
    vectors, weights = draw_set(seed, n=n, d=d)
    valid, protected, budget = draw_candidates(data, n)
    u, w = numbers(vectors), numbers(weights)
    left = np.flatnonzero(valid.numpy()).tolist()
    noise = dense_noise(u[left], w[left], 0.1, relative=True)
    total = len(left)
    for step in range(1, rounds + 1):
        leverage = dict(zip(left, dense_leverage(u[left], w[left], noise), strict=True))
        left.sort(key=lambda i: (not protected[i], -leverage[i], i))
        left = left[: round(total * (budget / total) ** (step / rounds))]
    kept = select_by_leverage(vectors, weights, budget, rounds=rounds, valid=valid, protected=protected)
    assert kept.tolist() == sorted(left)


@given(seed=seeds, d=st.integers(2, 5), copies=st.integers(2, 4))
def test_several_rounds_keep_one_of_equal_items(seed: int, d: int, copies: int):
    # All copies of orthogonal directions have the same leverage. One round keeps the first items, which include copies.
    rotation = torch.linalg.qr(draw_set(seed, n=d, d=d)[0]).Q
    vectors = torch.cat([rotation.repeat_interleave(copies, dim=0), rotation[:1] * 0.1])
    # Earlier copies are slightly longer, so that rounding does not decide between them.
    vectors[: copies * d] *= torch.linspace(1.001, 1, copies * d, dtype=torch.float64)[:, None]
    one = capacity(vectors, subset=select_by_leverage(vectors, None, d))
    many = capacity(vectors, subset=select_by_leverage(vectors, None, d, rounds=copies * d))
    assert many > one + 0.1
    assert float(many) == pytest.approx(float(capacity(vectors, subset=torch.arange(d) * copies)), rel=1e-3)


# select_greedy


@given(seed=seeds, n=sizes, d=sizes, ridge=ridges, relative=st.booleans(), data=st.data())
def test_greedy_selects_the_highest_gain_at_each_step(
    seed: int, n: int, d: int, ridge: float, relative: bool, data: st.DataObject
):
    vectors, weights = draw_set(seed, n=n, d=d)
    valid, protected, budget = draw_candidates(data, n)
    options = {"ridge": ridge, "relative": relative}
    kept = select_greedy(vectors, weights, budget, valid=valid, protected=protected, **options)
    there = np.flatnonzero(valid.numpy())
    u, w = numbers(vectors)[there], numbers(weights)[there]
    start = np.flatnonzero(protected.numpy()[there]).tolist()
    noise = dense_noise(u, w, ridge, relative)
    expected = there[dense_greedy(u, w, noise, budget, start)].tolist()
    # Gains that differ by less than the rounding error may be selected in either order, with the same capacity.
    reached = dense_capacity(numbers(vectors), numbers(weights), noise, kept.tolist())
    assert reached == pytest.approx(dense_capacity(numbers(vectors), numbers(weights), noise, expected), abs=1e-9)
    assert set(np.flatnonzero(protected.numpy())) <= set(kept.tolist())
    assert valid[kept].all()


@given(seed=seeds, n=st.integers(2, 8), d=st.integers(1, 4), data=st.data())
def test_greedy_capacity_is_near_the_best_of_all_subsets(seed: int, n: int, d: int, data: st.DataObject):
    vectors, weights = draw_set(seed, n=n, d=d)
    budget = data.draw(st.integers(1, n))
    u, w = numbers(vectors), numbers(weights)
    noise = dense_noise(u, w, 0.1, relative=True)
    best = best_capacity(u, w, noise, budget)
    greedy = dense_capacity(u, w, noise, select_greedy(vectors, weights, budget).tolist())
    assert (1 - 1 / math.e) * best <= greedy <= best + 1e-9
    assert dense_capacity(u, w, noise, select_by_leverage(vectors, weights, budget).tolist()) <= best + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_is_exact_after_many_updates(dtype: torch.dtype):
    vectors, weights = draw_set(7, n=120, d=6, dtype=dtype)
    kept = select_greedy(vectors, weights, 80, ridge=1e-6).tolist()
    noise = dense_noise(numbers(vectors), numbers(weights), 1e-6, relative=True)
    assert kept == dense_greedy(numbers(vectors), numbers(weights), noise, 80, [])


@pytest.mark.parametrize("ridge", [1e-12, 1e-20, 1e-30])
def test_greedy_with_noise_below_the_rounding_error(ridge: float):
    vectors, weights = draw_set(7, 2, n=30, d=6)
    kept = select_greedy(vectors, weights, 20, ridge=ridge)
    assert (kept.diff() > 0).all()
    for row in range(2):
        u, w = numbers(vectors[row]), numbers(weights[row])
        noise = dense_noise(u, w, ridge, relative=True)
        reached = dense_capacity(u, w, noise, kept[row].tolist())
        assert reached >= dense_capacity(u, w, noise, dense_greedy(u, w, noise, 20, [])) * (1 - 1e-3)


def test_greedy_rejects_noise_that_overflows_float64():
    with pytest.raises(ValueError, match=r"ridge must leave .* range of torch.float64, got 1e-200"):
        select_greedy(torch.full((3, 2), 1e150, dtype=torch.float64), None, 1, ridge=1e-200, relative=False)


def test_greedy_does_not_select_a_copy_of_a_protected_item():
    vectors = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    protected = torch.tensor([True, False, False])
    assert select_greedy(vectors, None, 2, protected=protected).tolist() == [0, 2]


def test_greedy_starts_from_the_protected_items_of_each_row():
    vectors, weights = draw_set(5, 2, n=8, d=3)
    protected = torch.zeros(2, 8, dtype=torch.bool)
    protected[0, :4] = True
    kept = select_greedy(vectors, weights, 4, protected=protected)
    assert kept[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(kept[1], select_greedy(vectors[1], weights[1], 4))


# Selections that use vectors


@selectors
@given(seed=seeds, n=sizes, d=sizes, data=st.data())
def test_batch_equals_a_loop_over_its_elements(select: Select, seed: int, n: int, d: int, data: st.DataObject):
    vectors, weights = draw_set(seed, 2, 2, n=n, d=d)
    chosen = [[draw_candidates(data, n) for _ in range(2)] for _ in range(2)]
    valid = torch.stack([torch.stack([v for v, _, _ in row]) for row in chosen])
    budget = data.draw(st.integers(1, int(valid.sum(-1).min())))
    protected = torch.stack([torch.stack([p for _, p, _ in row]) for row in chosen])
    protected &= protected.cumsum(-1) <= budget
    together = select(vectors, weights, budget, valid=valid, protected=protected)
    assert together.shape == (2, 2, budget)
    for i in range(2):
        for j in range(2):
            alone = select(vectors[i, j], weights[i, j], budget, valid=valid[i, j], protected=protected[i, j])
            assert together[i, j].tolist() == alone.tolist()


@selectors
@given(seed=seeds, n=sizes, d=sizes, padding=sizes, junk=st.sampled_from([0.0, 1e300, torch.nan]), data=st.data())
def test_padding_shifts_the_indices_only(
    select: Select, seed: int, n: int, d: int, padding: int, junk: float, data: st.DataObject
):
    vectors, weights = draw_set(seed, n=n, d=d)
    budget = data.draw(st.integers(1, n))
    padded = torch.cat([torch.full((padding, d), junk, dtype=torch.float64), vectors])
    padded_weights = torch.cat([torch.full((padding,), junk, dtype=torch.float64), weights])
    kept = select(padded, padded_weights, budget, valid=torch.arange(padding + n) >= padding)
    assert (kept - padding).tolist() == select(vectors, weights, budget).tolist()


@selectors
@given(seed=seeds, n=sizes, d=sizes, data=st.data())
def test_selection_is_invariant_to_scale_and_rotation(select: Select, seed: int, n: int, d: int, data: st.DataObject):
    vectors, weights = draw_set(seed, n=n, d=d)
    budget = data.draw(st.integers(1, n))
    rotation = torch.linalg.qr(draw_set(seed + 1, n=d, d=d)[0]).Q
    before = capacity(vectors, weights, subset=select(vectors, weights, budget))
    after = capacity(vectors, weights, subset=select(1e40 * vectors @ rotation, 1e-40 * weights, budget))
    torch.testing.assert_close(after, before)


@selectors
def test_full_budget_keeps_all_items(select: Select):
    vectors, weights = draw_set(2, 3, n=6, d=4, dtype=torch.float32)
    assert select(vectors, weights, 6).tolist() == [list(range(6))] * 3


@selectors
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_selected_capacity_exceeds_a_random_selection(select: Select, dtype: torch.dtype):
    vectors, weights = draw_set(2, 3, n=100, d=8, dtype=dtype)
    kept = select(vectors, weights, 10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.stack([torch.randperm(100, generator=generator)[:10] for _ in range(3)])
        assert (capacity(vectors, weights, subset=kept) > capacity(vectors, weights, subset=other)).all()


@selectors
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    "vectors",
    [
        torch.zeros(2, 10, 3),
        torch.ones(2, 10, 3),
        torch.ones(2, 10, 3) * torch.logspace(-30, 0, 10)[:, None],
        torch.eye(10)[:, :3].expand(2, 10, 3) * 1e15,
    ],
    ids=["zeros", "equal", "30 orders", "strong"],
)
def test_extreme_inputs_give_distinct_items(select: Select, relative: bool, vectors: Tensor):
    protected = torch.tensor([[False] * 10, [False] * 9 + [True]])
    kept = select(vectors, None, 4, protected=protected, relative=relative)
    assert (kept.diff() > 0).all()
    assert kept[1, -1] == 9
    if not vectors.any():
        assert kept[0].tolist() == [0, 1, 2, 3]


@selectors
def test_overflow_with_absolute_noise_is_an_error(select: Select):
    with pytest.raises(ValueError, match="vectors and weights must have a Gram matrix within the range"):
        select(torch.full((3, 2), 1e200, dtype=torch.float64), None, 1, relative=False)


@selectors
def test_selection_works_on_tensors_that_require_a_gradient(select: Select):
    vectors, weights = draw_set(1, n=6, d=2)
    expected = select(vectors, weights, 3)
    assert torch.equal(select(vectors.requires_grad_(), weights.requires_grad_(), 3), expected)


@selectors
@pytest.mark.parametrize(
    ("vectors", "weights", "options", "error", "message"),
    [
        ([[1.0]], None, {}, TypeError, r"vectors must be a torch.Tensor, got list"),
        (torch.ones(3, 2).long(), None, {}, TypeError, r"vectors .*, got torch.int64"),
        (torch.ones(3), None, {}, ValueError, r"vectors must have shape \[..., n, d\]"),
        (torch.ones(0, 2), None, {}, ValueError, r"every size at least 1, got \(0, 2\)"),
        (torch.ones(3, 2), torch.ones(2), {}, ValueError, r"weights must have shape \(3,\), got \(2,\)"),
        (torch.ones(3, 2), -torch.ones(3), {}, ValueError, r"weights must be at least 0, got -1.0"),
        (torch.full((3, 2), torch.nan), None, {}, ValueError, r"vectors must be finite, got 6 NaN"),
        (torch.ones(3, 2), torch.full((3,), torch.inf), {}, ValueError, r"weights must be finite, got 3 NaN"),
        (torch.ones(3, 2), None, {"ridge": 0.0}, ValueError, r"ridge must be finite and above 0, got 0.0"),
    ],
)
def test_invalid_arguments_are_rejected(select: Select, vectors, weights, options, error, message):
    with pytest.raises(error, match=message):
        select(vectors, weights, 1, **options)


def top_of_ones(vectors: Tensor, weights: None, budget: int, **options: object) -> Tensor:
    return select_top(vectors[..., 0], budget, **options)  # pyright: ignore


@pytest.mark.parametrize("select", [top_of_ones, select_by_leverage, by_leverage_in_rounds, select_greedy])
@pytest.mark.parametrize(
    ("budget", "options", "error", "message"),
    [
        (0, {}, ValueError, r"budget must be from 1 to 3, got 0"),
        (-1, {}, ValueError, r"budget must be from 1 to 3, got -1"),
        (4, {}, ValueError, r"budget must be from 1 to 3, got 4"),
        (2.0, {}, TypeError, r"budget must be an int, from 1 to .*, got 2.0"),
        (True, {}, TypeError, r"budget must be an int, from 1 to .*, got True"),
        (2, {"valid": [[0, 0, 1], [1, 1, 1]]}, ValueError, r"at most the number of valid items, 1, got 2"),
        (1, {"protected": [[0, 0, 1], [0, 1, 1]]}, ValueError, r"at least the number of protected items, 2, got 1"),
        (
            1,
            {"valid": [[0, 1, 1], [0, 1, 1]], "protected": [[1, 0, 0], [0, 0, 1]]},
            ValueError,
            r"protected must mark valid items only, got 1 that are not valid",
        ),
        (1, {"valid": [[1, 1]]}, ValueError, r"valid must have shape \(2, 3\), got \(1, 2\)"),
        (1, {"protected": [[1, 1]]}, ValueError, r"protected must have shape \(2, 3\), got \(1, 2\)"),
    ],
)
def test_invalid_budgets_and_masks_are_rejected(select: Select, budget, options, error, message):
    masks = {name: torch.tensor(rows).bool() for name, rows in options.items()}
    with pytest.raises(error, match=message):
        select(torch.ones(2, 3, 2), None, budget, **masks)


@pytest.mark.parametrize("name", ["valid", "protected"])
def test_masks_must_be_boolean_tensors(name: str):
    with pytest.raises(TypeError, match=rf"{name} must have dtype torch.bool, got torch.int64"):
        select_top(torch.ones(3), 1, **{name: torch.ones(3).long()})
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got list"):
        select_top(torch.ones(3), 1, **{name: [True, True, True]})


@pytest.mark.parametrize(
    ("rounds", "error", "message"),
    [
        (0, ValueError, r"rounds must be at least 1, got 0"),
        (1.5, TypeError, r"rounds must be an int, at least 1, got 1.5"),
    ],
)
def test_invalid_rounds_are_rejected(rounds: int, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        select_by_leverage(torch.ones(3, 2), None, 1, rounds=rounds)
