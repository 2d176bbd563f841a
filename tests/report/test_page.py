import re
from html.parser import HTMLParser

import pytest

from suffice.report.figures import Point, colour, head_map, lines, save
from suffice.report.page import Code, Figure, Page, Table, Text


class Checker(HTMLParser):
    """Collects what would load something, and checks that tags close."""

    LOADING = ("src", "href", "xlink:href")

    def __init__(self):
        super().__init__()
        self.loads, self.stack = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in self.LOADING and not (v or "").startswith(("#", "data:"))]
        if tag not in ("meta", "br", "path", "use", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in self.LOADING and not (v or "").startswith(("#", "data:"))]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture
def page():
    page = Page(title="<i>Title</i>", lead="Lead & more", command="suffice demo --seed 0")
    figure = lines(
        {"capkv": [Point(0.25, 1.0, 0.5, 1.5), Point(0.5, 0.2, 0.1, 0.3)], "<h2o>": [Point(0.25, 2), Point(0.5, 1)]},
        x_label="budget",
        y_label="KL, nats",
        percent_x=True,
    )
    cells = {(layer, head): float(layer) for layer in range(4) for head in range(2)}
    page.add("One", Text("<script>alert(1)</script>"), Code("a < b"), Table(["name", "x"], [["<b>", 1.5]], "caption"))
    page.add("Two", Figure(figure, "caption", 'alt "quoted"'), Figure(head_map({"kept": cells}), "map", "a map"))
    return page


def test_everything_given_is_escaped(page):
    html = page.html()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;i&gt;Title&lt;/i&gt;" in html
    assert "&lt;h2o&gt;" in html
    assert "<h2o>" not in html
    assert "alt &#34;quoted&#34;" in html


def test_nothing_is_loaded_and_tags_close(page):
    checker = Checker()
    checker.feed(page.html())
    assert checker.loads == []
    assert checker.stack == []
    assert "url(http" not in page.html()


def test_figures_take_the_pages_colour(page):
    html = page.html()
    assert html.count("<svg") == 2
    assert "currentColor" in html
    assert "#010203" not in html
    assert "<?xml" not in html


def test_page_says_how_it_was_made(page, tmp_path):
    path = page.save(tmp_path / "Ordner mit ä" / "page.html")
    text = path.read_text(encoding="utf-8")
    assert "<code>suffice demo --seed 0</code>" in text
    assert re.search(r"torch \d", text)


def test_ragged_table_is_refused():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells; accepted: 2"):
        Table(["a", "b"], [[1, 2], [3]])


def test_colours_are_fixed_by_name():
    assert colour("capkv") != colour("snapkv")
    assert colour("my own policy") == colour("my own policy")


def test_variants_share_a_colour_and_differ_in_dashes():
    series = {name: [Point(0, 1), Point(1, 2)] for name in ("fixed/batch", "random/batch", "fixed/layer")}
    first, second, third = lines(series, x_label="x", y_label="y").axes[0].lines
    assert first.get_color() == third.get_color() != second.get_color()
    assert first.get_linestyle() == second.get_linestyle() != third.get_linestyle()


def test_figures_are_the_same_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        figure = lines({"capkv": [Point(1, 2), Point(2, 3)]}, x_label="x", y_label="y", log_y=True)
        save(figure, str(tmp_path / name))
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    drop = re.compile(r"<dc:date>.*?</dc:date>")
    assert drop.sub("", first) == drop.sub("", second)
