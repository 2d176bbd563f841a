"""Means, intervals and paired differences, compared with SciPy and with direct computations."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from suffice.study import (
    Interval,
    PlannedRun,
    Store,
    bootstrap_interval,
    compare_groups,
    group_records,
    mean_bound,
    mean_interval,
    paired_difference,
    run_study,
    skewed_mean_bound,
    summarize,
)
from tests.study.tiny import SQUARE

VALUES = [1.0, 2.0, 4.0, 7.0]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 10, 11, 40, 41, 401, 2000])
def test_mean_intervals_and_bounds_equal_those_of_scipy(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    for confidence in (0.2, 0.8, 0.95, 0.99, 0.9998):
        low, high = stats.t.interval(confidence, count - 1, np.mean(values), stats.sem(values))
        found = mean_interval(values, confidence=confidence)
        assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-9)
        for upper, alternative in ((True, "less"), (False, "greater")):
            bounds = stats.ttest_1samp(values, 0, alternative=alternative).confidence_interval(confidence)
            expected = bounds.high if upper else bounds.low
            assert mean_bound(values, confidence=confidence, upper=upper) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [3, 5, 12, 40])
def test_skewed_bounds_solve_halls_equation(count):
    """Against the root of the equation, in which the transformed t statistic equals Student's quantile."""
    values = np.random.default_rng(count).lognormal(0, 1, count)
    for confidence in (0.8, 0.95, 0.9875):
        skewness = stats.skew(values, bias=False)
        quantile = stats.t.ppf(confidence, count - 1)

        def missing(bound, skewness=skewness, quantile=quantile):
            w = (values.mean() - bound) / values.std(ddof=1)
            transformed = w + skewness * w**2 / 3 + skewness**2 * w**3 / 27 + skewness / (6 * count)
            return np.sqrt(count) * transformed + quantile

        expected = optimize.brentq(missing, values.mean() - 9 * values.std(), values.mean() + 99 * values.std())
        expected = max(expected, mean_bound(values, confidence=confidence))
        assert skewed_mean_bound(values, confidence=confidence) == pytest.approx(expected, rel=1e-8)
        lower = skewed_mean_bound(-values, confidence=confidence, upper=False)
        assert lower == pytest.approx(-expected, rel=1e-8)
        # Values that are skewed to the other side do not need a correction.
        for upper in (True, False):
            away = -values if upper else values
            student = mean_bound(away, confidence=confidence, upper=upper)
            assert skewed_mean_bound(away, confidence=confidence, upper=upper) == pytest.approx(student)


def test_skewed_bounds_hold_more_often_than_students():
    """Means of log-normal values, of which 95 % must be below the upper bound."""
    samples = np.random.default_rng(0).lognormal(0, 0.7, (2000, 20))
    mean = np.exp(0.7**2 / 2)
    skewed, student = (np.mean([bound(x) >= mean for x in samples]) for bound in (skewed_mean_bound, mean_bound))
    assert student < 0.9 < skewed - 0.01


def test_skewed_bounds_of_few_or_equal_values():
    assert skewed_mean_bound([1.0, 5.0]) == mean_bound([1.0, 5.0])
    assert skewed_mean_bound([2.0, 2.0, 2.0]) == 2.0
    assert skewed_mean_bound([1.0, 2.0, 3.0]) == pytest.approx(mean_bound([1.0, 2.0, 3.0]))
    assert math.isnan(skewed_mean_bound([2.0]))


def test_a_single_value_has_no_interval():
    found = mean_interval([2.0])
    assert str(found) == "2.000"
    assert not found.has_bounds
    assert math.isnan(mean_bound([2.0]))


def test_bootstrap_intervals_leave_out_nan_and_equal_those_of_scipy():
    found = bootstrap_interval([*VALUES, math.nan], seed=3)
    expected = stats.bootstrap(
        (np.array(VALUES),), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert found == Interval(3.5, expected.low, expected.high)
    assert bootstrap_interval([2.0, 2.0]) == bootstrap_interval([2.0]) == Interval(2.0, 2.0, 2.0)
    assert str(bootstrap_interval([math.nan])) == "nan [nan, nan]"


def test_paired_differences_use_the_seeds_that_both_have():
    found = paired_difference({0: 3.0, 1: 5.0, 2: 9.0, 7: 100.0}, {2: 1.0, 1: 4.0, 0: 1.0, 8: -100.0})
    assert found.num_seeds == 3
    assert found.interval == mean_interval([2.0, 1.0, 8.0])
    t, _ = stats.ttest_rel([3.0, 5.0, 9.0], [1.0, 4.0, 1.0])
    margin = (found.interval.high - found.interval.low) / 2
    assert found.interval.mean / margin == pytest.approx(t / stats.t.ppf(0.975, 2))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("function", [mean_interval, mean_bound, skewed_mean_bound, bootstrap_interval])
def test_a_confidence_out_of_range_is_refused(function):
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match=f"confidence must be above 0 and below 1, got {confidence}"):
            function(VALUES, confidence=confidence)


@pytest.mark.parametrize("function", [mean_interval, mean_bound, skewed_mean_bound])
def test_no_values_are_refused(function):
    with pytest.raises(ValueError, match="values must hold at least one number"):
        function([])


@pytest.fixture
def groups(tmp_path):
    plan = [PlannedRun(SQUARE.complete({"x": x, "rate": r}), s) for s in range(4) for x in (1, 3) for r in (0.1, 0.2)]
    run_study(tmp_path, SQUARE, plan, name="squares")
    with Store(tmp_path, read_only=True) as store:
        return group_records(store.records("squares"))


def test_a_summary_has_a_row_for_each_group_and_metric(groups):
    rows = {(row["x"], row["rate"]): row for row in summarize(groups) if row["metric"] == "y"}
    values = [9.0, 10.0, 11.0, 12.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = rows[3, 0.2]
    assert (found["mean"], found["low"], found["high"], found["seeds"]) == pytest.approx((10.5, low, high, 4))


def test_groups_are_compared_with_those_of_equal_other_settings(groups):
    rows = [row for row in compare_groups(groups, "x") if row["metric"] == "y"]
    assert [(row["rate"], row["x"], row["baseline"], row["mean"], row["low"], row["seeds"]) for row in rows] == [
        (0.1, 3, 1, 8.0, 8.0, 4),
        (0.2, 3, 1, 8.0, 8.0, 4),
    ]
    first, second = groups[0], groups[2]
    assert (second.settings["x"], second.settings["rate"]) == (3, 0.1)
    assert second.difference(first, "y").interval.mean == 8.0
    assert second.difference(first, "z") is None


def test_a_comparison_that_is_impossible_is_refused(groups):
    for setting, baseline, message in (
        ("sleep", None, r"setting must be one that varies \(rate, x\), got 'sleep'"),
        ("x", 2, r"baseline must be one of \['1', '3'\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_groups(groups, setting, baseline)
