"""The tables and the figure of benchmarks/equal_bytes.py, from made-up results."""

import json

import pytest

from suffice.study.results import Group
from tests.benchmark_program import import_programs


@pytest.fixture(scope="module")
def equal_bytes():
    with import_programs("equal_bytes") as (module,):
        yield module


def make_groups(equal_bytes, name, kl_of, seeds):
    """Return values of some samples; `kl_of` returns the KL of a method, mode, limit and seed."""
    return [
        Group(
            {"mode": mode, "method": method.name, "limit": limit},
            {
                "kl": {seed: kl_of(method, mode, limit, seed) for seed in seeds},
                "top1": dict.fromkeys(seeds, 0.5),
                "bytes": dict.fromkeys(seeds, limit),
            },
        )
        for method in equal_bytes.GROUPS[name].methods
        for mode in equal_bytes.MODES
        for limit in equal_bytes.LIMITS
    ]


def make_results(equal_bytes, name, kl_of, seeds=range(3)):
    """Return results of some samples."""
    return equal_bytes.Results(make_groups(equal_bytes, name, kl_of, seeds), equal_bytes.GROUPS[name])


def kl_by_policy(method, mode, limit, seed):
    """SnapKV is closer than all others on text, and farther on questions; all others are equal up to noise."""
    noise = 0.01 * ((len(method.name) + seed) % 3 - 1)
    if method.policy == "snapkv" and method.is_quantized:
        return (0.1 if mode == "text" else 9) + 0.001 * seed
    return 1 + noise


def test_marks_cells_that_differ_significantly_from_the_first_method(equal_bytes):
    results = make_results(equal_bytes, "one-pass", kl_by_policy)
    assert results.sign("text", 0.1, "snapkv, quantized") == "−"
    assert results.sign("aware", 0.1, "snapkv, quantized") == "+"
    assert results.sign("text", 0.1, "capkv, quantized") == ""
    assert results.sign("text", 0.1, results.methods[0]) == ""
    assert results.losses() == [
        f"* snapkv, quantized: text at {limit}, 0.101 in place of 1" for limit in ("1/4", "1/8", "1/10", "1/20", "1/40")
    ]


def test_mean_ranks_are_over_all_cells(equal_bytes):
    results = make_results(equal_bytes, "one-pass", kl_by_policy)
    ranks = results.ranks()
    count = len(results.methods)
    assert sum(ranks.values()) == pytest.approx(count * (count + 1) / 2)
    assert ranks["snapkv, quantized"] == pytest.approx((1 + 2 * count) / 3)  # first on text, last on both questions


def test_tables_have_a_row_for_each_method_and_a_column_for_each_cell(equal_bytes):
    results = make_results(equal_bytes, "replay", kl_by_policy)
    for table in (results.kl_table(), results.top1_table()):
        assert len(table) == 2 + len(results.methods)
        assert {line.count("|") for line in table} == {len(results.cells) + 3}
    assert "50%" in results.top1_table()[2]


def test_samples_of_several_runs_are_joined(equal_bytes, tmp_path, monkeypatch):
    """The values in the JSON file, joined with those of other seeds, give what all seeds at once give."""

    def kl(method, mode, limit, seed):
        return limit * (1 + 0.1 * len(method.name) + (seed * 7 % 5) / 10)

    name = "replay"
    everything = make_results(equal_bytes, name, kl, seeds=(0, 1, 2, 10, 11))
    first = make_results(equal_bytes, name, kl, seeds=(10, 11))
    monkeypatch.setattr(equal_bytes, "PAGE", tmp_path / "page.md")
    content = {"seeds": first.seeds, "tokens": 900, "rows": [{"model": "m", **row} for row in first.rows()]}
    equal_bytes.json_path(name).write_text(json.dumps(content))
    stored = equal_bytes.stored_groups(name, "m", 900)
    assert not equal_bytes.stored_groups(name, "other", 900)
    measured = make_groups(equal_bytes, name, kl, range(3))
    # A measurement also has the values of the full cache, which the JSON file does not.
    measured += [
        Group({"mode": "text", "method": "full", "limit": 1.0}, {key: {0: 0.0} for key in equal_bytes.METRICS})
    ]
    joined = equal_bytes.Results([*stored, *measured], equal_bytes.GROUPS[name])
    assert joined.seeds == everything.seeds == (0, 1, 2, 10, 11)
    assert equal_bytes.ranges(joined.seeds) == "0 to 2, 10 to 11"
    assert list(joined.rows()) == list(everything.rows())
    with pytest.raises(SystemExit, match="4096 tokens"):
        equal_bytes.stored_groups(name, "m", 4096)


def test_draws_the_figure_from_the_numbers_of_both_groups(equal_bytes, tmp_path):
    contents = [
        {
            "group": name,
            "rows": [
                {"model": model, **row}
                for model in ("first", "second")
                for row in make_results(equal_bytes, name, kl_by_policy).rows()
            ],
        }
        for name in equal_bytes.GROUPS
    ]
    equal_bytes.draw([json.loads(json.dumps(content)) for content in contents], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_our_policy_comes_first_with_all_that_it_offers(equal_bytes):
    names = [method.name for method in equal_bytes.GROUPS["one-pass"].methods]
    assert names[0] == "capkv-salience, quantized, repair"
    assert len(set(names)) == len(names)
