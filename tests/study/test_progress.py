"""How runs are named while a study runs."""

from __future__ import annotations

from suffice.study.progress import duration, labels
from suffice.study.spec import Planned


def test_a_run_is_named_by_what_differs_and_a_setting_of_many_parts_by_its_name():
    plan = [
        Planned({"arm": arm, "epochs": 3}, seed)
        for arm in ("fixed", {"name": "own", "norm": "none"})
        for seed in (0, 1)
    ]
    label = labels(plan)
    assert label(plan[0].settings, 0) == "arm fixed, seed 0"
    assert label(plan[3].settings, 1) == "arm own, seed 1"
    assert label({"arm": {"norm": "x" * 60}, "epochs": 3}, 0).endswith("…, seed 0")


def test_seconds_as_a_person_says_them():
    assert [duration(part) for part in (45, 720, 12_000)] == ["45 s", "12 min", "3 h 20 min"]
