"""Every family of models that transformers registers for generation: supported, or refused with the error written down.

`make test` runs the most used families, `make test-families` runs all. See `family_checks.py` for the checks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import transformers

from suffice.kv import CompressedCache
from tests.kv import support_page
from tests.kv.families import NOT_BUILDABLE, families, model_classes, tiny_config
from tests.kv.family_cases import MaskedOracle, get_case
from tests.kv.family_checks import (
    LENGTH,
    TOLERANCE,
    Answer,
    compare_with_oracle,
    kept_positions,
    run_checks,
    write_results,
)
from tests.kv.family_status import (
    ENCODER_DECODERS,
    FAST,
    KNOWN_FAILURES,
    KNOWN_FAILURES_OLDEST,
    NOT_RUNNABLE,
    REFUSALS,
    Refusal,
    difference_of,
    expected_support,
    reason_of,
    refusal_of,
)

RESULTS = os.environ.get("SUFFICE_SUPPORT")  # folder for the results, from which the support page is made
IS_NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in FAST else [pytest.mark.families]) for family in families()],
)
def test_family(family):
    results = run_checks(family)
    if RESULTS:
        write_results(Path(RESULTS), family, results)
    bad = {name: result["error"] for name, result in results.items() if result["status"] != "passed"}
    refusal = refusal_of(family)
    statuses = {result["status"] for result in results.values()}
    if not IS_NEWEST and statuses & {"stock", "not built"}:
        pytest.skip(f"transformers {transformers.__version__}: {results['full']['error']}")
    if not IS_NEWEST and results["construction"]["status"] == "refused":
        # Models of other versions may be of another kind: many hybrids had a cache of their own.
        refusal = Refusal("", "|".join(one.pattern for one in REFUSALS), ())
    if family in KNOWN_FAILURES or (family in KNOWN_FAILURES_OLDEST and not IS_NEWEST):
        assert bad or not IS_NEWEST, f"{family} works: remove it from KNOWN_FAILURES"
        if bad:
            pytest.xfail(str(bad))
    if refusal is not None:
        assert results["construction"]["status"] == "refused", results["construction"]
        assert statuses <= {"passed", "refused", "stock"}, bad
        for result in results.values():
            if result["status"] == "refused":
                assert re.search(refusal.pattern, result["error"]), result["error"]
    elif family in NOT_RUNNABLE:
        assert re.search(NOT_RUNNABLE[family][1], results["full"]["error"]), results["full"]["error"]
        assert results["construction"]["status"] != "failed", results["construction"]
    else:
        assert not bad
    if IS_NEWEST and family not in NOT_RUNNABLE:
        for column in support_page.COLUMNS.values():
            result = results[column.check]
            if result["status"] == "passed":
                assert result["support"] == expected_support(family, column.check), (column.check, result)
                assert not result["reason"] or reason_of(family, column.check, result["reason"]) is not None
            elif result["status"] == "refused":
                assert expected_support(family, column.check) == "no", column.check


def test_every_family_has_one_status():
    listed = [family for refusal in REFUSALS for family in refusal.families]
    listed += [*NOT_RUNNABLE, *KNOWN_FAILURES, *NOT_BUILDABLE]
    assert len(set(listed)) == len(listed)
    if IS_NEWEST:
        assert set(listed) | set(FAST) <= set(model_classes())


def test_oracle_notices_missing_entries():
    case = get_case("llama")
    ids = case.prompt(LENGTH + 1)
    cache = CompressedCache(case.model, "capkv", 0.5)
    case.forward(ids[:, :LENGTH], cache)
    kept = kept_positions(cache)
    logits = case.forward(ids[:, LENGTH:], cache).logits
    for layer in kept:
        fewer = {**kept, layer: kept[layer].clone()}
        fewer[layer][0, 0, 8:12] = -1
        for readable, equal in ((kept, True), (fewer, False)):
            oracle = MaskedOracle(case)
            oracle.forward(ids[:, :LENGTH], {})
            expected = oracle.forward(ids[:, LENGTH:], readable)
            error = float((logits - expected).abs().max() / expected.abs().max())
            assert (error < TOLERANCE) == equal


def test_oracle_equals_the_cache_after_several_evictions():
    case = get_case("llama")
    cache = CompressedCache(case.model, "capkv", 12, evict="always", interval=2)
    compare_with_oracle(case, cache, case.prompt(50).split([20, 20, *[1] * 10], 1))


@pytest.mark.skipif(not IS_NEWEST, reason="the page is made with the newest transformers")
def test_support_page_agrees_with_what_is_expected():
    rows = support_page.read_rows()
    assert set(rows) == set(model_classes())
    for family, row in rows.items():
        is_tested = family not in {*NOT_RUNNABLE, *NOT_BUILDABLE}
        is_supported = is_tested and refusal_of(family) is None and family not in KNOWN_FAILURES
        assert all((row[name].support == "yes") == is_supported for name in ("default", "stream")), family
        for name, column in support_page.COLUMNS.items():
            if not is_tested:
                assert row[name].support == "–", (family, name)
                assert row[name].reason.startswith("not tested: "), (family, name)
                continue
            assert row[name].support == expected_support(family, column.check), (family, name)
            difference, refusal = difference_of(family, column.check), refusal_of(family)
            expected = difference.reason if difference else refusal.reason if refusal else ""
            assert row[name].reason == expected, (family, name)


@pytest.mark.skipif(not IS_NEWEST, reason="the list is made with the newest transformers")
def test_encoder_decoders_are_those_of_transformers():
    tested = set(model_classes()) - {*NOT_RUNNABLE, *NOT_BUILDABLE}
    assert {family for family in tested if tiny_config(family).is_encoder_decoder} == set(ENCODER_DECODERS)


def test_reasons_of_the_support_page_are_those_of_the_checks():
    shared = "repair must be False for DeepseekV3ForCausalLM, whose heads share cached latents, got True"
    assert reason_of("deepseek_v3", "repair", shared).startswith("its heads share cached latents")
    for family, reason in (("llama", shared), ("deepseek_v3", "another error")):
        with pytest.raises(ValueError, match=f"the reason of check 'repair' for {family} must be the expected one"):
            reason_of(family, "repair", reason)


def test_the_support_page_is_read_as_it_is_written(tmp_path, monkeypatch):
    families = sorted(model_classes())
    rows = {family: dict.fromkeys(support_page.COLUMNS, Answer("yes")) for family in families}
    rows[families[0]]["repair"] = Answer("no", "a reason, with `code` | and a bar")
    rows[families[1]] = dict.fromkeys(support_page.COLUMNS, Answer("–", "not tested: another reason"))
    monkeypatch.setattr(support_page, "PAGE", tmp_path / "support.md")
    support_page.PAGE.write_text(support_page.page(rows, "5.23.0"), encoding="utf-8")
    assert support_page.read_rows() == rows
