"""Specifications of studies: grids are complete, and mistakes are named before any work."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suffice.study import Spec
from suffice.study.run_key import canonical_json, run_key
from suffice.study.run_kind import RunKind, find_run_kind
from tests.study.tiny import READ_INPUT, SQUARE

KNOWN = {"square": SQUARE, "read_input": READ_INPUT}


def read(tmp_path, text):
    path = tmp_path / "grün und blau.yaml"
    path.write_text(text, encoding="utf-8")
    return Spec.read(path)


def test_a_grid_has_every_combination_but_the_excluded_ones(tmp_path):
    spec = read(
        tmp_path,
        "kind: square\nsettings: {sleep: 0}\ngrid:\n  x: [1, 2]\n  rate: [1e-3, 0.1]\n"
        "exclude:\n  - {x: 1, rate: 0.1}\nseeds: [3, 5]\n",
    )
    assert spec.name == "grün und blau"
    plan = spec.plan(SQUARE)
    assert [(run.settings["x"], run.settings["rate"], run.seed) for run in plan] == [
        (x, rate, seed) for seed in (3, 5) for x, rate in ((1, 1e-3), (2, 1e-3), (2, 0.1))
    ]
    assert all(run.settings["fail"] == "" for run in plan)  # defaults are filled in
    assert Spec.from_dict(spec.to_dict()) == spec


def plan(tmp_path, text):
    spec = read(tmp_path, text)
    return spec.plan(find_run_kind(spec.kind, KNOWN))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kind: square\ngird: {x: [1]}",
            "keys of a study must be among name, kind, settings, grid, exclude, seeds,",
        ),
        ("kind: square\ngird: {x: [1]}", "got 'gird'. Did you mean 'grid'?"),
        ("kind: square\ngrid: {slep: [1]}", "settings of square must be among x, sleep, fail, log, rate, got 'slep'"),
        ("kind: square\ngrid: {slep: [1]}", "got 'slep'. Did you mean 'sleep'?"),
        ("kind: sqare\ngrid: {x: [1]}", "got 'sqare'. Did you mean 'square'?"),
        ("kind: sqare\ngrid: {x: [1]}", "kind must be one of square, read_input, or module:NAME of a RunKind, got"),
        ("grid: {x: [1]}", "kind must be the name of a kind of run, got None"),
        ("kind: square\ngrid: {x: []}", "grid['x'] must be a list of at least one value, got []"),
        ("kind: square\ngrid: {x: 3}", "grid['x'] must be a list of at least one value, got 3"),
        ("kind: square\ngrid: {x: [1, 1]}", "grid['x'] must be a list of distinct values, got [1, 1]"),
        ("kind: square\ngrid: {x: [a]}", "x must be an integer, got 'a'"),
        ("kind: square\nsettings: {rate: fast}", "rate must be a number, got 'fast'"),
        ("kind: square\nsettings: {x: 1}\ngrid: {x: [1, 2]}", "settings must be set once each, got 'x' twice"),
        ("kind: square\nseeds: 0", "seeds must be a positive number of seeds or distinct seeds from 0, got 0"),
        (
            "kind: square\nseeds: [1, 1]",
            "positive number of seeds or distinct seeds from 0, got [1, 1]",
        ),
        ("kind: square\nseeds: many", "seeds must be a positive number of seeds or a list of seeds, got 'many'"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{x: 1}]", "exclude must leave at least one run of the grid"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{x: 2}]", "x in exclude must be one of [1], got 2"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{y: 2}]", "settings in exclude must be among x, got 'y'"),
        ("kind: square\nseeds: 2000000", "grid must have at most 1000000 runs, got 2000000"),
        ("name: a/b\nkind: square", "name must consist of letters, digits, dots, dashes and spaces, got 'a/b'"),
        ("- kind: square", "study must be a mapping with names as keys, got [{"),
        ("kind: [square", "must be a readable YAML file, got an error: while parsing"),
        ("kind: square\nkind: square", "key 'kind' is repeated"),
        ("kind: os:path", "or module:NAME of a RunKind, got 'os:path'"),
        ("kind: nowhere:K", "module:name must be an importable object, got 'nowhere:K'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(tmp_path, text)


def test_a_users_own_kind_is_found_by_module_and_name():
    assert find_run_kind("tests.study.tiny:SQUARE", {}) is SQUARE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_keys_depend_on_everything_but_the_order_of_settings(settings):
    reversed_settings = dict(reversed(list(settings.items())))
    assert run_key("square", "1", settings, 0) == run_key("square", "1", reversed_settings, 0)
    assert run_key("square", "1", settings, 0) != run_key("square", "1", settings, 1)
    assert run_key("square", "1", settings, 0) != run_key("square", "2", settings, 0)


def test_settings_may_be_numbers_of_numpy():
    kind = RunKind("own", "module:run", {"epochs": 3, "rate": 0.1, "sizes": [1], "free": None})
    given = {"epochs": np.int64(5), "rate": np.float64(0.5), "sizes": (np.int32(2), "x"), "free": np.int8(7)}
    found = kind.complete(given)
    assert json.loads(json.dumps(found)) == {"epochs": 5, "rate": 0.5, "sizes": [2, "x"], "free": 7}
    with pytest.raises(ValueError, match=r"epochs must be an integer, got 5\.0"):
        kind.complete({"epochs": np.float32(5)})


def test_settings_that_json_cannot_represent_are_refused():
    for value in (math.nan, object()):
        with pytest.raises(ValueError, match="settings must be values that JSON can represent, got"):
            canonical_json({"x": value})
