"""The pages and the output of `compare` and `tune` begin with the result, and warn of too few measurements."""

import re
from html import unescape

import pytest
from typer.testing import CliRunner

from suffice.cli import app
from suffice.kv.eval.cache_scores import cache_scores, main_result, samples_warning
from suffice.kv.eval.compare import Comparison, metric_interval
from suffice.kv.eval.report_sections import comparison_page, tuning_page
from suffice.kv.eval.tune import Trial, TuningResult
from suffice.study.results import Group, mean_interval

FACTS = "\n---\n".join(f"The parrot of {name} is called Otto, and it lives in a house. " * 6 for name in "ABC")


def group(policy, budget, kl, size, score=None, task="multikey", full_score=1.0):
    """Return a group with one KL value for each sample, and the same bytes and score for all."""
    settings = {"task": task, "mode": "agnostic", "policy": policy, "allocation": "own", "budget": budget}
    values = {"kl": kl, "bytes": [size] * len(kl), "bytes_kept": [size] * len(kl), "bytes_full": [100.0] * len(kl)}
    if score is not None:
        values |= {"score": [score] * len(kl), "full_score": [full_score] * len(kl), "chance": [0.0] * len(kl)}
    return Group(settings, {name: dict(enumerate(each)) for name, each in values.items()})


def comparison(*scores, samples=8):
    """Return a comparison of `a` and `b` at two budgets with these scores, and a task without scores."""
    sizes = {("a", 0.5): 52.0, ("a", 0.25): 27.0, ("b", 0.5): 50.0, ("b", 0.25): 25.0}
    kl = [0.001] * (samples - 1) + [0.8]
    groups = [group(*key, kl, size, score) for (key, size), score in zip(sizes.items(), scores, strict=True)]
    groups += [group(*key, kl, size, task="text") for key, size in sizes.items()]
    return Comparison({"samples": samples}, groups)


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_smallest_cache_that_answers_as_well_is_named():
    found = comparison(1.0, 0.9, 1.0, 0.8)
    assert [score.name for score in cache_scores(found)] == [f"{m} at budget {b}" for b in (0.25, 0.5) for m in "ba"]
    assert [score.score for score in cache_scores(found)] == [0.8, 0.9, 1.0, 1.0]
    assert main_result(found) == (
        "b at budget 0.5 is the smallest cache that answers as well as the full cache: 100% of what is asked with "
        "50.0% of the bytes; the full cache answers 100%."
    )
    # Of equally good answers, those with fewer bytes are named.
    assert main_result(comparison(0.9, 0.9, 0.7, 0.6)) == (
        "No cache answers as well as the full cache. The best is a at budget 0.25: 90% of what is asked with 27.0% of "
        "the bytes; the full cache answers 100%."
    )
    unscored = Comparison({"samples": 8}, [group("a", 0.5, [0.2], 50.0), group("a", 0.25, [0.4], 25.0)])
    assert main_result(unscored) == (
        "a at budget 0.5 stays closest to the full cache: KL 0.200 nats per token with 50.0% of its bytes. No answers "
        "were scored."
    )


def test_intervals_of_divergences_are_not_negative():
    found = comparison(1.0, 1.0, 1.0, 1.0)
    [own] = {str(metric_interval(each, "kl")) for each in found.groups}
    values = list(found.groups[0].values["kl"].values())
    assert mean_interval(values).low < 0  # Student's t interval of the same values
    interval = metric_interval(found.groups[0], "kl")
    assert min(values) <= interval.low < interval.mean < interval.high <= max(values)
    # The mean of 8 draws with replacement: the largest value is drawn k times with Binomial(8, 1/8).
    assert interval.high == pytest.approx((3 * 0.8 + 5 * 0.001) / 8)
    assert interval.low == pytest.approx(0.001)
    html = comparison_page(found, "suffice kv compare").to_html()
    assert own in html
    assert "[-" not in text_of(html[: html.index("Paired differences")])
    assert all(row["low"] >= 0 for row in found.rows())
    single = group("a", 0.5, [0.2], 50.0)
    assert not metric_interval(single, "kl").has_bounds


@pytest.mark.parametrize("samples", [7, 8])
def test_the_page_begins_with_the_cache_that_answers_right(samples):
    found = comparison(1.0, 0.9, 1.0, 0.8, samples=samples)
    html = comparison_page(found, "suffice kv compare").to_html()
    section = html.split("<section>")[1]
    assert "<h2>Which cache answers right?</h2>" in section
    assert main_result(found) in text_of(section)
    rows = [text_of(row) for row in re.findall(r'<tr role="row">(.*?)</tr>', section, re.DOTALL)][1:]
    assert rows[0] == "b at budget 0.25 25.0% 80% 100% 0.101" if samples == 8 else rows[0].startswith("b at budget")
    assert len(rows) == 4
    warning = samples_warning(found)
    assert (warning == "") == (samples == 8)
    assert ("Few samples: Only 7 samples of each task" in text_of(section)) == (samples == 7)


def trial(policy, memory, safe, mean=0.1):
    shared = {"allocation": "own", "budget": None, "bound": mean + 0.05, "within": 0.9, "bytes_kept": 1e6}
    return Trial(policy, memory=memory, mean=mean, safe=safe, bytes=memory * 1e7, **shared)


def tuning(prompts=20):
    trials = [trial("h2o", 0.5, True), trial("h2o", 0.25, True), trial("h2o", 0.1, False, 0.6)]
    trials += [trial("tova", 0.5, False, 0.4), trial("tova", 0.25, False, 0.5)]
    settings = {"mode": "aware", "max_new_tokens": 8, "model": {"name": "m"}}
    return TuningResult("kl", 0.2, 0.95, prompts, trials, settings)


def test_a_row_for_each_policy_shows_its_smallest_safe_cache_or_its_closest_one():
    columns, rows = tuning().policy_rows()
    assert columns == ["policy", "allocation", "memory", "mean KL", "bound", "on target", "MB", "safe"]
    assert rows == [
        ["h2o", "own", "25%", "0.1000", "0.1500", "90%", "2.5", "yes"],
        ["tova", "own", "50%", "0.4000", "0.4500", "90%", "5.0", "no"],
    ]
    assert len(tuning().trial_rows()[1]) == 5
    explained = tuning().explain_columns()
    assert "Bound: upper bound of this mean" in explained
    assert "Safe: the bound meets the target at this memory limit and at every larger one" in explained


@pytest.mark.parametrize("prompts", [19, 20])
def test_the_page_of_tune_begins_with_the_cache_and_its_program(prompts):
    found = tuning(prompts)
    html = tuning_page(found, "suffice kv tune").to_html()
    parts = ("Recommended cache", found.verdict(), "CompressedCache(model, policy='h2o', memory=0.25", "of each policy")
    places = [unescape(html).index(part) for part in parts]
    assert places == sorted(places)
    assert found.explain_columns() in unescape(html)
    assert ("Use at least 20 prompts" in html) == (prompts == 19)
    assert found.verdict() in found.summary()


def test_the_commands_print_the_result_first(folder, tmp_path):
    arguments = ["kv", "compare", "--model", folder, "--policies", "h2o", "--budgets", "50%", "--tokens", "300"]
    done = CliRunner().invoke(app, [*arguments, "--tasks", "multikey:agnostic", "--samples", "2", "--quiet"])
    assert done.exit_code == 0, done.output
    parts = ("h2o at budget 0.5", "Warning: Only 2 samples of each task", "KL to the full cache")
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    prompts, page = tmp_path / "prompts.txt", tmp_path / "page.html"
    prompts.write_text(FACTS, encoding="utf-8")
    arguments = ["kv", "tune", "--prompts", str(prompts), "--model", folder, "--max-new-tokens", "2", "--policies"]
    arguments += ["h2o,knorm", "--budgets", "90%,50%", "--target-kl", "90", "--quiet", "--report", str(page)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    parts = (
        "at budget 0.5 meets mean KL ≤ 90",
        "Warning: Use at least 20 prompts",
        "CompressedCache(",
        "The smallest safe cache",
    )
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert len([line for line in done.stdout.splitlines() if line.startswith("│")]) == 2
    assert "Recommended cache" in page.read_text(encoding="utf-8")
    every = CliRunner().invoke(app, [*arguments, "--trials"])
    assert len([line for line in every.stdout.splitlines() if line.startswith("│")]) == 2 + 4
