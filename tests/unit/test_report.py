"""Reports stand alone and escape what they show."""

import html.parser
import re

import numpy as np
import pytest

from app.report import Bars, Card, Cards, Passages, Section, Table, Verdict, heatmap, histogram, lines, render, shown

NASTY = "<script>alert('x')</script> & \"quotes\" $\\frac{1}{2 $ {{ 7*7 }}"


class Elements(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "path", "use", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def everything(text: str) -> str:
    return render(
        text,
        [
            Section(text, [Cards([Card(text, 0.5, text, "good")])], text),
            Section("Table", [Table([text, "share"], [[text, 0.25], [None, 1.0]], shares=["share"])]),
            Section(
                "Plots",
                [
                    histogram([0.1, 0.9], text, text),
                    heatmap(np.array([[3, 1], [0, 0]]), [text, "b"], ["a", text], text),
                    lines({text: ([0, 1], [2, 3]), "other": ([0, 1], [1, 1])}, text, text, text),
                ],
            ),
            Section("Passages", [Passages([[("Customer", text), ("Reply", text)]], [text])]),
        ],
        subtitle=text,
        verdict=Verdict(text, "bad"),
    )


def test_page_holds_no_address_and_no_script() -> None:
    page = everything("plain")
    assert not re.findall(r"https?:|//[a-z]|@import|<script|<link|<iframe|javascript:", page)
    assert page.count("<svg") == 3
    assert "default-src 'none'" in page


def test_what_is_shown_is_escaped_everywhere() -> None:
    page = everything(NASTY)
    assert "<script" not in page
    assert "49" not in Elements(page).text
    parsed = Elements(page)
    assert parsed.tags.count("svg") == 3
    assert parsed.text.count("<script>alert('x')</script>") >= 12


def test_every_element_is_closed() -> None:
    assert Elements(everything(NASTY)).open == []


def test_the_same_findings_give_the_same_page() -> None:
    assert everything("x") == everything("x")


def test_shares_are_drawn_as_bars() -> None:
    page = render("t", [Section("s", [Table(["a", "b"], [["x", 0.255]], shares=["b"])])])
    assert 'style="width:25.5%"' in page
    assert "0.255" in page


def test_series_are_drawn_beside_each_other_by_category() -> None:
    drawn = Bars({"before": {"a<b": 0.2}, "new": {"a<b": 0.4, "c": 0.1}}, "Intents")
    page = render("t", [Section("s", [drawn])])
    assert drawn.categories == ["a<b", "c"]
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", page)] == [50.0, 100.0, 0.0, 25.0]
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert Bars({"new": {}}, "nothing").largest == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (float("nan"), "–"), (True, "yes"), (12_345, "12,345"), (12_345.6, "12,346"), (0.12345, "0.123"),
        (1.0, "1.000"), (12.345, "12.35"), (123.45, "123.5"), (0.0001234, "0.000123"), (0.0, "0.000"), ("a", "a"),
        (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_values_are_written_as_people_read_them(value: object, text: str) -> None:
    assert shown(value) == text
