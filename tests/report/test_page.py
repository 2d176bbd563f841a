"""Pages escape what they are given, load nothing, and say how they were made."""

import re
from html.parser import HTMLParser

import pytest

from suffice.report import (
    Code,
    Figure,
    KeptText,
    LinePoint,
    Page,
    Result,
    Table,
    Text,
    color_of,
    head_heatmap,
    line_plot,
    save_figure,
)


class Checker(HTMLParser):
    """Collects the addresses that a page loads, and checks that tags are closed."""

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
    page = Page(title="<i>Title</i>", summary="Summary & more", command="suffice demo --seed 0")
    figure = line_plot(
        {
            "capkv": [LinePoint(0.25, 1.0, 0.5, 1.5), LinePoint(0.5, 0.2, 0.1, 0.3)],
            "<h2o>": [LinePoint(0.25, 2), LinePoint(0.5, 1)],
        },
        x_label="budget",
        y_label="KL, nats",
        percent_x=True,
    )
    cells = {(layer, head): float(layer) for layer in range(4) for head in range(2)}
    page.add("One", Text("<script>alert(1)</script>"), Code("a < b"), Table(["name", "x"], [["<b>", 1.5]], "caption"))
    page.add("Two", Figure(figure, "caption", 'alt "quoted"'), Figure(head_heatmap({"kept": cells}), "map", "a map"))
    return page


def test_all_texts_are_escaped(page):
    html = page.to_html()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;i&gt;Title&lt;/i&gt;" in html
    assert "&lt;h2o&gt;" in html
    assert "<h2o>" not in html
    assert "alt &#34;quoted&#34;" in html


def test_nothing_is_loaded_and_all_tags_are_closed(page):
    checker = Checker()
    checker.feed(page.to_html())
    assert checker.loads == []
    assert checker.stack == []
    assert "url(http" not in page.to_html()


def test_figures_take_the_pages_color_of(page):
    html = page.to_html()
    assert html.count("<svg") == 2
    assert "currentColor" in html
    assert "#010203" not in html
    assert "<?xml" not in html


def test_a_page_says_how_it_was_made(page, tmp_path):
    path = page.save(tmp_path / "Ordner mit ä" / "page.html")
    text = path.read_text(encoding="utf-8")
    assert "<code>suffice demo --seed 0</code>" in text
    assert re.search(r"with python 3\.\d+\.\d+, machine .*, torch \d", text)


def test_a_table_with_rows_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match=r"rows\[1\] must have 2 cells, got 1"):
        Table(["a", "b"], [[1, 2], [3]])


def test_short_and_long_cells_of_a_column_of_sentences_are_aligned_alike():
    table = Table(["name", "x", "meaning"], [["a", "0.5", "Short."], ["b", "0.7", "A sentence that is much longer."]])
    assert [table.is_text(column) for column in range(3)] == [False, False, True]
    page = Page("t", "s", "c")
    page.add("Numbers", table)
    assert page.to_html().count(' class="text"') == 3  # the header and both cells


def test_each_name_has_a_fixed_color():
    assert color_of("capkv") != color_of("snapkv")
    assert color_of("my own policy") == color_of("my own policy")


def test_variants_share_a_color_and_differ_in_dashes():
    series = {name: [LinePoint(0, 1), LinePoint(1, 2)] for name in ("fixed/batch", "random/batch", "fixed/layer")}
    first, second, third = line_plot(series, x_label="x", y_label="y").axes[0].lines
    assert first.get_color() == third.get_color() != second.get_color()
    assert first.get_linestyle() == second.get_linestyle() != third.get_linestyle()


def test_a_figure_is_written_the_same_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        figure = line_plot({"capkv": [LinePoint(1, 2), LinePoint(2, 3)]}, x_label="x", y_label="y", log_y=True)
        save_figure(figure, str(tmp_path / name))
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    date = re.compile(r"<dc:date>.*?</dc:date>")
    assert date.sub("", first) == date.sub("", second)


def test_shares_of_kept_text_that_are_impossible_are_refused():
    with pytest.raises(ValueError, match="shares must hold one value for each of 2 pieces, got 1"):
        KeptText(["a", "b"], [0.5], "caption")
    with pytest.raises(ValueError, match=r"shares must be from 0 to 1, got 1\.5"):
        KeptText(["a", "b"], [0.5, 1.5], "caption")


def test_kept_text_joins_tokens_of_the_same_tenth():
    block = KeptText(["a ", "b ", "c", "d"], [0.51, 0.54, 1.0, 0.0], "caption")
    assert block.spans == [(5, "a b "), (10, "c"), (0, "d")]


def test_the_end_of_kept_text_can_be_marked():
    block = KeptText(["a ", "b ", "c", "d"], [0.51, 0.54, 0.49, 0.0], "caption", marked_from=1)
    assert block.parts == [(False, [(5, "a ")]), (True, [(5, "b c"), (0, "d")])]
    assert KeptText(["a"], [0.0], "caption").parts == [(False, [(0, "a")])]
    page = Page("t", "s", "c")
    page.add("Kept", block)
    html = page.to_html()
    assert '<span class="most" title="kept by 50 % of heads">a </span><div class="marked" id="marked">' in html
    with pytest.raises(ValueError, match="marked_from must be from 0 to 3, got 4"):
        KeptText(["a ", "b ", "c", "d"], [0.5] * 4, "caption", marked_from=4)


@pytest.mark.parametrize(("share", "name"), [(0.0, "few"), (0.14, "few"), (0.2, "some"), (0.44, "some"), (0.5, "most")])
def test_kept_text_has_three_shades(share, name):
    page = Page("t", "s", "c")
    page.add("Kept", KeptText(["word"], [share], "caption"))
    assert re.search(f'<span class="{name}" title="[^"]*">word</span>', page.to_html())


def test_the_scale_of_a_heat_map_says_what_its_colors_mean():
    cells = {(layer, head): float(layer) for layer in range(4) for head in range(2)}
    figure = head_heatmap({"tokens kept": cells, "share": cells})
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert [label for label in labels if label != "layer"] == [
        "tokens kept (brighter: more)",
        "share (brighter: more)",
    ]


def test_the_legend_is_below_the_panel():
    names = ["capkv", "snapkv", "expected-attention", "h2o"]
    figure = line_plot({name: [LinePoint(0, 1), LinePoint(1, 2)] for name in names}, x_label="x", y_label="y")
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert legend.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_the_main_result_has_a_word_a_sentence_and_points(tmp_path):
    page = Page("t", "s", "c")
    page.add("Verdict", Result("Bad.", "It <fails>.", [("Measured", "a < b"), ("What to do", "Wait.")], "bad"))
    html = page.to_html()
    assert '<div class="result bad">\n<p><strong>Bad.</strong> It &lt;fails&gt;.</p>' in html
    assert re.findall("<li>.*</li>", html) == [
        "<li><b>Measured:</b> a &lt; b</li>",
        "<li><b>What to do:</b> Wait.</li>",
    ]
    text = page.save(tmp_path / "page.md").read_text(encoding="utf-8")
    assert "**Bad.** It \\<fails\\>.\n\n* **Measured:** a \\< b\n* **What to do:** Wait." in text
    with pytest.raises(ValueError, match="tone must be one of good, warning, bad, neutral, got 'ugly'"):
        Result("Bad.", "It fails.", tone="ugly")


def test_cells_name_their_column_where_narrow_pages_show_rows_as_lists():
    page = Page("t", "s", "c")
    page.add("Numbers", Table(["name", "KL, nats"], [["h2o", "0.5"]]))
    assert '<td role="cell" data-column="KL, nats">0.5</td>' in page.to_html()
