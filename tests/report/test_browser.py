"""A page in a real browser: silent, self-contained, sortable by keyboard, within the window."""

import os
from pathlib import Path

import pytest

from suffice.report.figures import Point, head_map, lines
from suffice.report.page import Code, Figure, KeptText, Page, Table, Text
from suffice.report.plots import Difference, forest, scatter_maps

pytest.importorskip("aiohttp")
from tests.report.browser import CHROMIUM, look

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PICTURES = os.environ.get("SUFFICE_TEST_PICTURES")  # a folder: keep what was seen


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    page = Page(
        "A study of <b>everything</b>", "Two of two runs are done. " * 3, "suffice report 'my study' --to x.html"
    )
    names = ("capkv", "snapkv", "h2o", "expected-attention")
    series = {
        name: [Point(b, n + 1 / b, n + 0.8 / b, n + 1.2 / b) for b in (0.25, 0.5, 0.75)] for n, name in enumerate(names)
    }
    rows = [[name, f"{n * 7 % 4 - 1}.500 [0.100, 0.900]", 3] for n, name in enumerate(names)]
    numbers = Table(["policy", "KL, nats/token", "seeds"], rows, "Mean and 95 % interval.")
    drawn = lines(series, x_label="budget", y_label="KL, nats/token", percent_x=True, title="agnostic")
    page.add("Trade-off", Figure(drawn, "Lower is closer.", "KL against budget", numbers), numbers)
    cells = {(layer, head): float(layer * head) for layer in range(12) for head in range(3)}
    page.add("Budget by layer and head", Figure(head_map({"tokens": cells, "capacity": cells}), "Kept.", "A map"))
    differences = [Difference(name, n - 1.5, n - 2, n - 1) for n, name in enumerate(names)]
    page.add(
        "Differences",
        Figure(forest({"KL": differences, "AUC": differences}, x_label="difference, nats"), "f", "Forest"),
    )
    places = [[float(i % 7), float(i % 11)] for i in range(100)]
    maps = {"fixed/batch": (places, [i % 3 for i in range(100)]), "random/batch": (places, [i % 3 for i in range(100)])}
    page.add("Embeddings", Figure(scatter_maps(maps), "t-SNE.", "Maps"))
    words = [f"word{i} " for i in range(200)]
    page.add("What was kept", KeptText(words, [(i * 37 % 101) / 100 for i in range(200)], "capkv at 25 %."))
    wide = Table([f"a long column {i}" for i in range(14)], [[f"{i * j}" for i in range(14)] for j in range(3)])
    page.add("Wide", wide, Text("x" * 300), Code("suffice " + "--option value " * 30))
    return page.save(tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, False), (360, True), (1280, True)])
def test_page_is_silent_self_contained_and_fits(address, width, dark):
    async def visit(browser):
        await browser.size(width)
        await browser.dark(dark)
        if PICTURES:
            await browser.picture(Path(PICTURES) / f"page-{width}-{'dark' if dark else 'light'}.png")
        code = "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        return await browser.value(code), browser.said, browser.asked

    (found, background), said, asked = look(address, visit)
    assert found <= width
    assert said == []
    assert [one for one in asked if not one.startswith("data:")] == [address]
    assert (background == "rgb(255, 255, 255)") != dark


def test_tables_are_sorted_by_keyboard(address):
    async def visit(browser):
        body = "document.querySelector('main > section > .scroll tbody')"
        column = f"[...{body}.rows].map(row => row.cells[1].innerText)"
        before = await browser.value(column)
        await browser.value("document.querySelector('main > section > .scroll th:nth-child(2) button').focus()")
        found = []
        for _ in range(2):
            await browser.press("Enter")
            found.append(await browser.value(column))
        state = await browser.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        await browser.press("Tab")
        focus = await browser.value("document.activeElement.innerText")
        return before, found, state, focus, browser.said

    before, (up, down), state, focus, said = look(address, visit)
    number = [float(text.split()[0]) for text in before]
    assert [float(text.split()[0]) for text in up] == sorted(number) != number
    assert [float(text.split()[0]) for text in down] == sorted(number, reverse=True)
    assert state == "descending"
    assert focus == "seeds"
    assert said == []
