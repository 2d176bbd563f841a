"""Nested settings have dotted names in grids, errors, tables and exports, and are nested when a run receives them."""

import csv
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from suffice.cli import app
from suffice.study import RunKind, Spec, Store, compare_groups, group_records, run_study, summarize
from suffice.study.export import export_records
from suffice.study.nested_settings import flatten, nest
from suffice.study.report_page import study_report
from suffice.study.spec import parse_assignment
from tests.study.tiny import TRAIN

names = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_flat_settings_nest_to_the_same_settings(tree):
    flat = flatten(tree, defaults=tree)
    assert nest(flat) == tree
    assert not any(isinstance(value, dict) for value in flat.values())
    for name, value in flat.items():
        found = tree
        for part in name.split("."):
            found = found[part]
        assert found == value


@given(trees)
def test_nesting_does_not_change_its_arguments(tree):
    before = json.dumps(tree)
    nest(tree, {"new.name": 1})
    assert json.dumps(tree) == before


def test_defaults_fill_in_every_level():
    full = TRAIN.complete({"train": {"rate": 1}, "model.norms.decoder": "none"})
    assert full == {
        "arm": None,
        "options": {},
        "model": {"hidden": 8, "norms": {"encoder": "batch", "decoder": "none"}},
        "train": {"epochs": 2, "rate": 1.0},
        "digest": "d41d8",
    }


def test_mappings_that_are_values_are_not_flattened():
    arm = {"name": "own", "norms": {"decoder": "none"}}
    full = TRAIN.complete({"arm": arm})
    assert full["arm"] == arm
    flat = TRAIN.flatten(full)
    assert flat["arm"] == arm
    assert flat["model.norms.decoder"] == "batch"
    assert nest(flat) == full


def test_a_group_without_defaults_accepts_any_names():
    full = TRAIN.complete({"options": {"any": 1}, "options.deep.er": [2]})
    assert full["options"] == {"any": 1, "deep": {"er": [2]}}
    flat = TRAIN.flatten(full)
    assert (flat["options.any"], flat["options.deep.er"]) == (1, [2])
    assert nest(flat) == full
    without = TRAIN.complete({})
    assert TRAIN.flatten(without)["options"] == {}
    assert nest(TRAIN.flatten(without)) == without


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"epohcs": 3}}, "got 'train.epohcs'. Did you mean 'train.epochs'?"),
        ({"train.epohcs": 3}, "got 'train.epohcs'. Did you mean 'train.epochs'?"),
        ({"epochs": 3}, "got 'epochs'. Did you mean 'train.epochs'?"),
        ({"trian": {"epochs": 3}}, "got 'trian.epochs'. Did you mean 'train.epochs'?"),
        ({"model": {"norms": {"decodr": "none"}}}, "got 'model.norms.decodr'. Did you mean 'model.norms.decoder'?"),
        ({"train": 3}, "train must be a mapping of settings, got 3"),
        ({"options": 3}, "options must be a mapping of settings, got 3"),
        ({"train.epochs": 1.5}, "train.epochs must be an integer, got 1.5"),
        ({"model.norms": {"decoder": 3}}, "model.norms.decoder must be text, got 3"),
        ({"train.epochs": 1, "train": {"epochs": 1}}, "settings must be set once each, got 'train.epochs' twice"),
        ({"train": 3, "train.epochs": 1}, "settings must be set once each, got 'train.epochs' twice"),
        ({"train.epochs": 0}, "train.epochs must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused_with_their_dotted_name(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TRAIN.complete(settings)


def test_names_of_settings_with_dots_are_refused():
    for settings in ({"a.b": 1}, {"a": {"b.c": 1}}):
        with pytest.raises(ValueError, match=r"settings must be named without dots, got '.\.."):
            RunKind("dots", "tests.study.tiny:train", settings)


def test_a_grid_addresses_nested_settings_by_dotted_name():
    spec = Spec(
        "nested",
        "train",
        settings={"train": {"rate": 0.5}},
        grid={"train.epochs": [1, 2], "model.norms.decoder": ["batch", "none"]},
        exclude=[{"train.epochs": 1, "model.norms.decoder": "none"}],
    )
    planned = [run.settings for run in spec.plan(TRAIN)]
    assert [(one["train"], one["model"]["norms"]["decoder"]) for one in planned] == [
        ({"epochs": 1, "rate": 0.5}, "batch"),
        ({"epochs": 2, "rate": 0.5}, "batch"),
        ({"epochs": 2, "rate": 0.5}, "none"),
    ]
    assert Spec.from_dict(spec.to_dict()) == spec


def test_settings_that_are_in_the_grid_too_are_refused():
    for settings in ({"train": {"epochs": 1}}, {"train.epochs": 1}):
        with pytest.raises(ValueError, match=r"settings must be set once each, got 'train\.epochs' twice"):
            Spec("nested", "train", settings=settings, grid={"train.epochs": [1, 2]})
    with pytest.raises(ValueError, match=r"got 'train\.epochs' twice"):
        Spec("nested", "train", grid={"train": [{"epochs": 1}], "train.epochs": [1, 2]})


def test_shared_settings_can_be_replaced():
    spec = Spec("nested", "train", settings={"train": {"epochs": 9, "rate": 0.5}, "model.hidden": 4})
    changed = spec.with_settings({"train.epochs": 3, "model.hidden": 2, "arm": "fixed"})
    assert changed.settings == {"train": {"epochs": 3, "rate": 0.5}, "model": {"hidden": 2}, "arm": "fixed"}
    assert spec.settings["train"]["epochs"] == 9
    with pytest.raises(ValueError, match=r"got 'train\.rate' twice"):
        Spec("nested", "train", grid={"train.rate": [0.1, 0.2]}).with_settings({"train.rate": 0.3})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("train.epochs=3", ("train.epochs", 3)), ("arm=a=b", ("arm", "a=b")), ("x=[1, two]", ("x", [1, "two"]))],
)
def test_assignments_are_read_as_yaml(text, parsed):
    assert parse_assignment(text) == parsed


@pytest.mark.parametrize("text", ["train.epochs", "=3", "x=[1"])
def test_texts_that_are_no_assignments_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"assignment must be NAME=VALUE, got {text!r}")):
        parse_assignment(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    spec = Spec("nested", "train", grid={"model.norms.decoder": ["batch", "none"], "train.epochs": [1, 2, 4]}, seeds=2)
    assert run_study(folder, TRAIN, spec).done == 12
    assert run_study(folder, TRAIN, spec).new == 0
    return folder


@pytest.fixture
def records(folder):
    with Store(folder, read_only=True) as store:
        return list(store.records("nested"))


def test_runs_and_records_have_nested_settings(records):
    for record in records:
        assert record.settings == record.result["settings"] == nest(record.flat_settings)
        assert record.settings["train"]["epochs"] == record.flat_settings["train.epochs"]
        assert record.settings["digest"] == "d41d8"


def test_groups_have_dotted_names(records):
    groups = group_records(records)
    rows = summarize(groups)
    assert [(row["model.norms.decoder"], row["train.epochs"], row["mean"]) for row in rows] == [
        (norm, epochs, pytest.approx(8 / epochs + len(norm) + 0.5))
        for norm in ("batch", "none")
        for epochs in (1, 2, 4)
    ]
    differences = compare_groups(groups, "model.norms.decoder")
    assert [(row["train.epochs"], row["model.norms.decoder"], row["mean"]) for row in differences] == [
        (epochs, "none", -1.0) for epochs in (1, 2, 4)
    ]


def test_exports_have_dotted_columns_and_json_has_nested_settings(records, tmp_path):
    for suffix in ("csv", "jsonl", "json", "parquet"):
        export_records(tmp_path / f"rows.{suffix}", "nested", {}, records)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    whole = json.loads((tmp_path / "rows.json").read_text())["runs"]
    epochs = [run["settings"]["train"]["epochs"] for run in whole]
    assert epochs == [1, 2, 4] * 4
    assert [int(row["train.epochs"]) for row in table] == [row["train.epochs"] for row in lines] == epochs
    pandas = pytest.importorskip("pandas")
    assert list(pandas.read_parquet(tmp_path / "rows.parquet")["train.epochs"]) == epochs


def test_a_report_has_dotted_names(folder):
    html = study_report(folder).to_html()
    assert "<h2>By train.epochs</h2>" in html
    assert ">model.hidden<" in html
    assert "<h2>Differences from batch</h2>" in html


def test_commands_take_dotted_names(tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text("kind: tests.study.tiny:TRAIN\ngrid: {train.epochs: [1, 2]}\n", encoding="utf-8")

    def suffice(*arguments):
        result = CliRunner().invoke(app, ["study", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    suffice("run", path, "--workers", "0", "--quiet", "--set", "model.hidden=16", "--set", "train.rate=0.5")
    rows = json.loads(suffice("show", path, "--json"))["rows"]
    assert [(row["train.epochs"], row["mean"]) for row in rows] == [(1, 21.0), (2, 13.0)]
    rows = json.loads(suffice("show", path, "--where", "train.epochs=2", "--json"))["rows"]
    assert [row["mean"] for row in rows] == [13.0]
