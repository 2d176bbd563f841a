"""How runs and durations are shown while a study runs."""

from __future__ import annotations

from suffice.study.progress import format_duration, make_run_labeler
from suffice.study.spec import PlannedRun


def test_a_run_is_named_by_the_settings_that_vary_and_a_mapping_by_its_name():
    plan = [
        PlannedRun({"arm": arm, "epochs": 3}, seed)
        for arm in ("fixed", {"name": "own", "norm": "none"})
        for seed in (0, 1)
    ]
    label = make_run_labeler([run.settings for run in plan])
    assert label(plan[0].settings, 0) == "arm fixed, seed 0"
    assert label(plan[3].settings, 1) == "arm own, seed 1"
    assert label({"arm": {"norm": "x" * 60}, "epochs": 3}, 0).endswith("…, seed 0")


def test_durations_have_a_readable_unit():
    assert [format_duration(seconds) for seconds in (45, 720, 12_000)] == ["45 s", "12 min", "3 h 20 min"]
