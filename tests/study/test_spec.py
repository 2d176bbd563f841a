"""A grid says what is wrong with it before any work."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suffice.study import Spec
from suffice.study.keys import canonical, run_key
from suffice.study.kinds import find_kind
from tests.study.tiny import READING, SQUARE

KNOWN = {"square": SQUARE, "reading": READING}


def read(tmp_path, text):
    path = tmp_path / "grün und blau.yaml"
    path.write_text(text, encoding="utf-8")
    return Spec.read(path)


def test_a_grid_is_every_combination_less_the_excluded(tmp_path):
    spec = read(
        tmp_path,
        "kind: square\nsettings: {sleep: 0}\ngrid:\n  x: [1, 2]\n  rate: [1e-3, 0.1]\n"
        "exclude:\n  - {x: 1, rate: 0.1}\nseeds: [3, 5]\n",
    )
    assert spec.name == "grün und blau"
    plan = spec.plan(SQUARE)
    assert [(p.settings["x"], p.settings["rate"], p.seed) for p in plan] == [
        (x, rate, seed) for seed in (3, 5) for x, rate in ((1, 1e-3), (2, 1e-3), (2, 0.1))
    ]
    assert all(p.settings["fail"] == "" for p in plan)  # defaults are part of a run
    assert Spec.from_dict(spec.to_dict()) == spec


def planned(tmp_path, text):
    spec = read(tmp_path, text)
    return spec.plan(find_kind(spec.kind, KNOWN))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: square\ngird: {x: [1]}", "studies hold 'gird' (did you mean 'grid'?)"),
        ("kind: square\ngrid: {slep: [1]}", "settings of square hold 'slep' (did you mean 'sleep'?)"),
        ("kind: sqare\ngrid: {x: [1]}", "kind is 'sqare' (did you mean 'square'?)"),
        ("grid: {x: [1]}", "kind is None; accepted: the name of a kind"),
        ("kind: square\ngrid: {x: []}", "grid['x'] is []; accepted: a list of at least one value"),
        ("kind: square\ngrid: {x: 3}", "grid['x'] is 3; accepted: a list"),
        ("kind: square\ngrid: {x: [1, 1]}", "accepted: each value once"),
        ("kind: square\ngrid: {x: [a]}", "x is 'a'; accepted: a whole number"),
        ("kind: square\nsettings: {rate: fast}", "rate is 'fast'; accepted: a number"),
        ("kind: square\nsettings: {x: 1}\ngrid: {x: [1, 2]}", "'x' is in settings and in grid"),
        ("kind: square\nseeds: 0", "seeds is 0; accepted"),
        ("kind: square\nseeds: [1, 1]", "seeds is [1, 1]; accepted"),
        ("kind: square\nseeds: many", "seeds is 'many'; accepted"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{x: 1}]", "exclude leaves none of the grid's runs"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{x: 2}]", "exclude has x=2; accepted: one of [1]"),
        ("kind: square\ngrid: {x: [1]}\nexclude: [{y: 2}]", "exclude hold 'y'"),
        ("kind: square\nseeds: 2000000", "grid has 2000000 runs; accepted: at most"),
        ("name: a/b\nkind: square", "name is 'a/b'; accepted"),
        ("- kind: square", "accepted: a mapping by names"),
        ("kind: [square", "can't be read as a study"),
        ("kind: square\nkind: square", "'kind' is there twice"),
        ("kind: os:path", "kind is 'os:path', which is no Kind"),
        ("kind: nowhere:K", "entry is 'nowhere:K'; accepted: module:name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(tmp_path, text)


def test_a_kind_of_ones_own_is_found_by_module_and_name():
    assert find_kind("tests.study.tiny:SQUARE", {}) is SQUARE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_a_key_does_not_depend_on_the_order_of_settings(settings):
    other = dict(reversed(list(settings.items())))
    assert run_key("square", "1", settings, 0) == run_key("square", "1", other, 0)
    assert run_key("square", "1", settings, 0) != run_key("square", "1", settings, 1)
    assert run_key("square", "1", settings, 0) != run_key("square", "2", settings, 0)


def test_settings_that_json_does_not_hold_are_refused():
    for value in (math.nan, object()):
        with pytest.raises(ValueError, match="accepted: what JSON holds"):
            canonical({"x": value})
