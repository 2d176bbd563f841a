"""Means, intervals and paired differences against SciPy."""

import numpy as np
import pytest
from scipy import stats

from suffice.study import Planned, Store, differences, group, over_seeds, run_study, summarise
from suffice.study.intervals import t_quantile
from tests.study.tiny import SQUARE


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 39, 40, 400, 1999])
def test_quantiles_of_t(freedom):
    for p in (0.5, 0.6, 0.9, 0.975, 0.995, 0.9999):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)


def test_out_of_range_is_refused():
    for arguments in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="probability, freedom are"):
            t_quantile(*arguments)


def test_means_and_paired_differences(tmp_path):
    plan = [Planned(SQUARE.complete({"x": x, "rate": r}), s) for s in range(4) for x in (1, 3) for r in (0.1, 0.2)]
    run_study(tmp_path, SQUARE, plan, name="squares")
    with Store(tmp_path, write=False) as store:
        groups = group(store.records("squares"))
    rows = {(row["x"], row["rate"]): row for row in summarise(groups) if row["metric"] == "y"}
    values = [9.0, 10.0, 11.0, 12.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = rows[3, 0.2]
    assert (found["mean"], found["low"], found["high"], found["seeds"]) == pytest.approx((10.5, low, high, 4))
    paired = [row for row in differences(groups, "x") if row["metric"] == "y"]
    assert [(row["rate"], row["of"], row["minus"], row["mean"], row["low"]) for row in paired] == [
        (0.1, 3, 1, 8.0, 8.0),
        (0.2, 3, 1, 8.0, 8.0),
    ]
    for setting, baseline, said in (("sleep", None, "one that varies"), ("x", 2, "baseline is 2; accepted: one of")):
        with pytest.raises(ValueError, match=said):
            differences(groups, setting, baseline)


def test_a_single_seed_has_no_interval():
    assert str(over_seeds([2.0])) == "2.000"
