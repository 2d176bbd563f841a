"""A page in a real browser has no errors, loads nothing, fits the window, and is sorted by keyboard."""

import os
from pathlib import Path

import pytest

from suffice.report import (
    Code,
    Figure,
    ForestRow,
    KeptText,
    LinePoint,
    Page,
    Result,
    Table,
    Text,
    forest_plot,
    head_heatmap,
    line_plot,
    tsne_plot,
)

pytest.importorskip("aiohttp")
from tests.report.browser import CHROMIUM, visit_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
AXE = os.environ.get("SUFFICE_TEST_AXE")  # the file axe.min.js of the npm package axe-core
PICTURES = os.environ.get("SUFFICE_TEST_PICTURES")  # a folder for screenshots


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    page = Page(
        "A study of <b>everything</b>", "Two of two runs are done. " * 3, "suffice report 'my study' --to x.html"
    )
    names = ("capkv", "snapkv", "h2o", "expected-attention")
    series = {
        name: [LinePoint(b, n + 1 / b, n + 0.8 / b, n + 1.2 / b) for b in (0.25, 0.5, 0.75)]
        for n, name in enumerate(names)
    }
    rows = [[name, f"{n * 7 % 4 - 1}.500 [0.100, 0.900]", 3] for n, name in enumerate(names)]
    numbers = Table(["policy", "KL, nats/token", "seeds"], rows, "Mean and 95 % interval.")
    drawn = line_plot(series, x_label="budget", y_label="KL, nats/token", percent_x=True, title="agnostic")
    page.add("Trade-off", Figure(drawn, "Lower is closer.", "KL against budget", numbers), numbers)
    cells = {(layer, head): float(layer * head) for layer in range(12) for head in range(3)}
    page.add("Budget by layer and head", Figure(head_heatmap({"tokens": cells, "capacity": cells}), "Kept.", "A map"))
    differences = [ForestRow(name, n - 1.5, n - 2, n - 1) for n, name in enumerate(names)]
    page.add(
        "Differences",
        Figure(forest_plot({"KL": differences, "AUC": differences}, x_label="difference, nats"), "f", "Forest"),
    )
    positions = [[float(i % 7), float(i % 11)] for i in range(100)]
    maps = {
        "fixed/batch": (positions, [i % 3 for i in range(100)]),
        "random/batch": (positions, [i % 3 for i in range(100)]),
    }
    page.add("Embeddings", Figure(tsne_plot(maps), "t-SNE.", "Maps"))
    words = [f"word{i} " for i in range(200)]
    page.add("What was kept", KeptText(words, [(i * 37 % 101) / 100 for i in range(200)], "capkv at 25 %.", 180))
    page.add("Verdict", *(Result("Word.", "A sentence.", [("Measured", "x")], tone) for tone in ("good", "bad")))
    wide = Table([f"a long column {i}" for i in range(14)], [[f"{i * j}" for i in range(14)] for j in range(3)])
    page.add("Wide", wide, Text("x" * 300), Code("suffice " + "--option value " * 30))
    return page.save(tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, False), (360, True), (1280, True)])
def test_a_page_has_no_errors_loads_nothing_and_fits_the_window(address, width, dark):
    async def visit(browser):
        await browser.set_size(width)
        await browser.set_dark(dark)
        if PICTURES:
            await browser.screenshot(Path(PICTURES) / f"page-{width}-{'dark' if dark else 'light'}.png")
        code = (
            "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('td')).display]"
        )
        return await browser.evaluate(code), browser.messages, browser.requests

    (scroll_width, background, cell), messages, requests = visit_page(address, visit)
    assert scroll_width <= width
    assert cell == ("block" if width == 360 else "table-cell")  # narrow pages show each row as a list
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert (background == "rgb(255, 255, 255)") != dark


@pytest.mark.skipif(AXE is None, reason="SUFFICE_TEST_AXE does not name the file axe.min.js")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)])
def test_a_page_is_accessible(address, width, dark):
    async def visit(browser):
        await browser.call("Page.setBypassCSP", enabled=True)
        await browser.set_size(width)
        await browser.set_dark(dark)
        await browser.evaluate(Path(AXE).read_text(encoding="utf-8") + "; 0")
        code = "axe.run().then(found => [found.passes.length, found.violations.map(each => each.id)])"
        result = await browser.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        return result["result"]["value"]

    passes, violations = visit_page(address, visit)
    assert passes > 10
    assert violations == []


def test_tables_can_be_sorted_by_keyboard(address):
    async def visit(browser):
        body = "document.querySelector('main > section > .scroll tbody')"
        column = f"[...{body}.rows].map(row => row.cells[1].innerText)"
        before = await browser.evaluate(column)
        await browser.evaluate("document.querySelector('main > section > .scroll th:nth-child(2) button').focus()")
        sorted_columns = []
        for _ in range(2):
            await browser.press("Enter")
            sorted_columns.append(await browser.evaluate(column))
        state = await browser.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        await browser.press("Tab")
        focus = await browser.evaluate("document.activeElement.innerText")
        return before, sorted_columns, state, focus, browser.messages

    before, (ascending, descending), state, focus, messages = visit_page(address, visit)
    numbers = [float(text.split()[0]) for text in before]
    assert [float(text.split()[0]) for text in ascending] == sorted(numbers) != numbers
    assert [float(text.split()[0]) for text in descending] == sorted(numbers, reverse=True)
    assert state == "descending"
    assert focus == "seeds"
    assert messages == []
