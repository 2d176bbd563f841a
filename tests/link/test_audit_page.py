"""The page of an audit and what the command prints: the verdict comes first, and its numbers are explained."""

import re
from html import unescape

import numpy as np
import pytest
import torch
from rich.console import Console

from suffice.cli.link_tables import audit_tables, verdict_text
from suffice.link import EdgeSet, audit
from suffice.link.auditing.kappa_tau import LABELS, MEANINGS
from suffice.link.auditing.verdict import LEVELS, Verdict
from suffice.link.study.report_sections import audit_page


def audited(reads_batch):
    """Audit a model that scores an edge by a noisy feature, or by how it differs from the mean of its batch."""
    features = torch.cat([torch.ones(200), torch.zeros(200)]) + 0.3 * torch.randn(
        400, generator=torch.Generator().manual_seed(0)
    )
    nodes = torch.arange(400)
    edges = EdgeSet(torch.stack([nodes[:200], nodes[:200]]), torch.stack([nodes[200:], nodes[200:]]))

    def score(pairs):
        values = features[pairs[0]]
        return values - (values.mean() if reads_batch else 0.5)

    return audit(score, edges, module=(), batch_size=64, repeats=4)


@pytest.fixture(scope="module")
def reports():
    return {reads_batch: audited(reads_batch) for reads_batch in (False, True)}


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


@pytest.mark.parametrize(("reads_batch", "level", "tone"), [(False, "unaffected", "good"), (True, "dominated", "bad")])
def test_the_page_begins_with_the_verdict_and_the_plot(reports, reads_batch, level, tone):
    report = reports[reads_batch]
    assert report.verdict.level == level
    html = audit_page(report, "suffice link audit").to_html()
    [(found_tone, word, sentence)] = re.findall(
        r'<div class="result (\w+)">\s*<p><strong>(.*?)</strong> (.*?)</p>', html
    )
    assert (found_tone, word.lower(), unescape(sentence)) == (tone, f"{level}.", report.verdict.headline)
    points = [text_of(item) for item in re.findall("<li>(.*?)</li>", html, re.DOTALL)]
    assert points == [f"Measured: {report.measured()}", f"What to do: {report.verdict.advice}"]
    places = [html.index(part) for part in ('class="result', "<svg", "judges each edge alone", "<h2>Statistics on")]
    assert places == sorted(places)


def test_the_summary_of_what_was_measured_has_the_three_statistics(reports):
    for report in reports.values():
        [(name, part)] = report.parts.items()
        means = {key: interval.mean for key, interval in part.statistics.items()}
        numbers = f"A_pure is {means['a_pure']:.2f}, τ is {means['tau']:.2f} and κ is {means['kappa']:.2f}."
        start = f"On {name} edges, {numbers} "
        assert report.measured() == start + report.verdict.why


def test_every_statistic_is_explained_beside_its_number(reports):
    report = reports[True]
    [part] = report.parts.values()
    assert set(MEANINGS) == set(part.statistics)
    html = audit_page(report, "suffice link audit").to_html()
    rows = [text_of(row) for row in re.findall(r"<tr role=\"row\">(.*?)</tr>", html, re.DOTALL)]
    shown = Console(width=300, record=True)
    for table in audit_tables(report):
        shown.print(table)
    printed = " ".join(re.sub(r"[│┃─├┼┤]", " ", shown.export_text()).split())
    for key, interval in part.statistics.items():
        assert f"{LABELS.get(key, key)} {interval} {MEANINGS[key]}" in rows
        assert f"{LABELS.get(key, key)} {interval}" in printed
    assert LABELS["kappa"] == "κ (kappa)"
    assert "Without bias: 0." in MEANINGS["kappa"]


def test_the_response_is_nearly_straight_unless_the_model_reads_the_batch(reports):
    """The caption of the plot says so: at both ends, the curve of a model that reads the batch bends down."""
    bends = {}
    for reads_batch, report in reports.items():
        [part] = report.parts.values()
        accuracy = np.array([point.accuracy.mean for point in part.curve])
        fractions = np.array([point.fraction for point in part.curve])
        line = np.interp(fractions, fractions[[1, -2]], accuracy[[1, -2]])
        ends = accuracy[[0, -1]] - line[[0, -1]]
        bends[reads_batch] = ends.max()
    assert abs(bends[False]) < 0.05
    assert bends[True] < -0.1


def test_the_terminal_shows_level_sentence_and_two_points(reports):
    report = reports[True]
    text = verdict_text(report)
    first, measured, advice = text.plain.split("\n")
    assert first == f"dominated: {report.verdict.headline}"
    assert measured == f"  • Measured: {report.measured()}"
    assert str(report).splitlines() == [
        f"{report.verdict.level}: {report.verdict.headline}",
        f"Measured: {report.measured()}",
        f"What to do: {report.verdict.advice}",
    ]
    assert advice == f"  • What to do: {report.verdict.advice}"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, len("dominated"), "bold")]


def test_every_level_has_a_sentence():
    sentences = [Verdict(level, "", "").headline for level in LEVELS]
    assert len(set(sentences)) == len(LEVELS)
    assert all(sentence.endswith(".") for sentence in sentences)
