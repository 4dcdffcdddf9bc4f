"""Reports that people read: one HTML file with everything in it, no script, no address outside it.

    page = render("Evaluation of support/3", [Section("Figures", [Cards([Card("Perplexity", 1.38)])])])

A section is a title, a note and blocks: cards, tables, bars, plots and passages of text. All text is escaped.
"""

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

State = Literal["plain", "good", "bad"]
FEW_POINTS = 30
"""Of a curve whose points are marked."""
DECADE = 10.0
LABEL_CHARS = 30
INK, ACCENT = "#1d2733", "#2f6fb3"


@dataclass(frozen=True)
class Card:
    """One figure, large."""

    name: str
    value: Any
    note: str = ""
    state: State = "plain"


@dataclass(frozen=True)
class Cards:
    """Figures side by side."""

    cards: Sequence[Card]
    kind: str = field(default="cards", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of values; a column named in `shares` holds numbers from 0 to 1 and is drawn as bars."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shares: Sequence[str] = ()
    kind: str = field(default="table", init=False)

    @functools.cached_property
    def numeric(self) -> list[bool]:
        """Of each column whether it holds numbers and nothing else."""
        columns = [[row[place] for row in self.rows if row[place] is not None] for place in range(len(self.columns))]
        return [bool(values) and all(map(_is_number, values)) for values in columns]


@dataclass(frozen=True)
class Plot:
    """A drawing as SVG, made by `histogram` or `heatmap`."""

    svg: str
    caption: str
    kind: str = field(default="plot", init=False)


@dataclass(frozen=True)
class Bars:
    """Named series of values by category, beside each other: {series: {category: value}}; categories in the order of
    the first series. Drawn by the page itself, without a plot."""

    series: Mapping[str, Mapping[str, float]]
    caption: str
    kind: str = field(default="bars", init=False)

    @property
    def categories(self) -> list[str]:
        """Those of any series."""
        return list(dict.fromkeys(name for values in self.series.values() for name in values))

    @property
    def largest(self) -> float:
        """The value whose bar takes the whole width."""
        return max((value for values in self.series.values() for value in values.values()), default=0.0) or 1.0


@dataclass(frozen=True)
class Passages:
    """Texts to be read against each other: each item is a list of (name, text), with notes beside its number."""

    items: Sequence[Sequence[tuple[str, str]]]
    notes: Sequence[str] = ()
    kind: str = field(default="passages", init=False)


Block = Cards | Table | Plot | Bars | Passages


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the report comes to, in one sentence at its top."""

    sentence: str
    state: State = "plain"


def render(title: str, sections: Sequence[Section], subtitle: str = "", verdict: Verdict | None = None) -> str:
    """The report as one self-contained HTML page."""
    return str(_template().render(title=title, subtitle=subtitle, verdict=verdict, sections=sections))


def shown(value: Any) -> str:
    """A value as people read it: thousands apart, as many decimals as matter, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _decimal(value)
    return str(value)


def _decimal(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.3g}"
    return f"{value:,.{0 if size >= 1_000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def histogram(values: Sequence[float], caption: str, axis: str, bins: int = 20) -> Plot:
    """How often values between 0 and 1 occur."""
    figure, axes = _figure(6.4, 2.4)
    axes.hist(list(values), bins=bins, range=(0.0, 1.0), color=ACCENT, rwidth=0.9)
    axes.set_xlabel(_plain(axis))
    axes.set_ylabel("count")
    axes.set_xlim(0.0, 1.0)
    return Plot(_svg(figure, caption), caption)


def heatmap(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str], caption: str) -> Plot:
    """Counts as shades: `counts` is (rows, columns), and each row is shaded by its own total."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = counts / totals
    figure, axes = _figure(3.0 + 0.42 * len(columns), 1.6 + 0.34 * len(rows))
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), [_plain(label) for label in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [_plain(label) for label in rows])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    return Plot(_svg(figure, caption), caption)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], caption: str, x: str, y: str, legend: bool = True
) -> Plot:
    """Named curves, each its x values and its y values."""
    figure, axes = _figure(6.4, 2.6)
    for name, (across, up) in series.items():
        marker = "o" if len(across) <= FEW_POINTS else None  # a point alone is no line
        axes.plot(across, up, label=_plain(name), linewidth=1.6, marker=marker, markersize=3)
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    if legend and len(series) > 1:
        axes.legend(frameon=False)
    return Plot(_svg(figure, caption), caption)


def scatter(
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]], caption: str, x: str, y: str, *,
    log_x: bool = False, line: tuple[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Plot:  # fmt: skip
    """Named clouds of points, each its x values (numbers or words) and its y values; perhaps with one named line."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure, axes = _figure(6.4, 2.6)
    for name, (across, up) in series.items():
        places = [_plain(place) if isinstance(place, str) else place for place in across]
        axes.scatter(places, up, label=_plain(name), s=22, alpha=0.8)
    if line is not None:
        name, (across, up) = line
        axes.step(across, up, where="post", color=INK, linewidth=1.2, label=_plain(name))
    if log_x:
        axes.set_xscale("log")
        values = [place for across, _ in series.values() for place in across]
        if max(values) < DECADE * min(values):  # which has too few powers of ten to be read by
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:.4g}")
    axes.set_xlabel(_plain(x))
    axes.set_ylabel(_plain(y))
    if len(series) > 1 or line is not None:
        axes.legend(frameon=False)
    return Plot(_svg(figure, caption), caption)


def _plain(label: str) -> str:
    """A label as matplotlib draws it letter by letter: text between dollar signs would be set as mathematics."""
    short = label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"
    return short.replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: Any, caption: str) -> str:
    """The figure as an <svg> element without prologue, metadata or namespaces, which HTML does not need."""
    import matplotlib as mpl

    text = io.StringIO()
    # The salt makes element ids differ between the plots of a page, and repeat between runs.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans-serif"}):
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawing)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    environment.filters["number"] = _is_number
    return environment.from_string(PAGE)


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6672; --line: #e2e6ea; --paper: #fff; --good: #1f7a4d;
  --bad: #b3372f; --accent: #2f6fb3 }
* { box-sizing: border-box }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em }
h2 { font-size: 17px; margin: 0 0 12px }
p { margin: 0 0 12px } .soft { color: var(--soft) } .subtitle { margin-bottom: 20px; overflow-wrap: anywhere }
.verdict { border-left: 4px solid var(--accent); background: var(--paper); padding: 12px 16px; margin-bottom: 20px;
  border-radius: 0 6px 6px 0; box-shadow: 0 1px 2px #1d273314 }
.verdict.good { border-color: var(--good) } .verdict.bad { border-color: var(--bad) }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 20px; margin: 0 0 20px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin-bottom: 12px }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px }
.card b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; font-weight: 600 }
.card.good b { color: var(--good) } .card.bad b { color: var(--bad) }
.card span { font-size: 13px; color: var(--soft); display: block }
.scroll { overflow-x: auto; margin-bottom: 12px }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; white-space: nowrap }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: baseline }
tr:last-child td { border-bottom: 0 }
td:first-child { overflow-wrap: anywhere }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.number { text-align: right }
td.share { min-width: 104px; white-space: nowrap; font-variant-numeric: tabular-nums }
.bar { display: inline-block; width: 52px; height: 8px; background: #eaeef2; border-radius: 4px; margin-right: 8px }
.bar i { display: block; height: 8px; border-radius: 4px; background: var(--accent) }
figure { margin: 0 0 12px } figure svg { max-width: 100%; height: auto; display: block }
.bars { max-width: 640px } .bars i { display: block; height: 9px; min-width: 1px; background: #b9c4cf }
.bars i.s1 { background: var(--accent) } .bars p { font-size: 13px; margin: 0 0 6px }
.bars p i { display: inline-block; width: 12px; margin: 0 6px 0 12px } .bars p i:first-child { margin-left: 0 }
.bars div { display: grid; grid-template-columns: 190px 1fr 60px; gap: 0 10px; align-items: center; padding: 2px 0 }
.bars div { font-size: 12px; line-height: 1.1; overflow-wrap: anywhere } .bars div span:last-child { text-align: right;
  font-variant-numeric: tabular-nums } .bars div span:first-child { text-align: right }
figcaption { font-size: 13px; color: var(--soft) }
.passage { border-top: 1px solid var(--line); padding: 12px 0 4px }
.passage:first-child { border-top: 0; padding-top: 0 }
.passage .soft { font-size: 13px; margin-bottom: 6px }
dl { display: grid; grid-template-columns: 104px 1fr; gap: 4px 12px; margin: 0 0 8px }
dt { color: var(--soft); font-size: 13px; padding-top: 1px }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
@media print { body { background: #fff } section { break-inside: avoid } }
@media (max-width: 560px) { main { padding: 16px 12px } dl { grid-template-columns: 1fr } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft subtitle">{{ subtitle }}</p>
{% if verdict %}
<div class="verdict {{ verdict.state }}">{{ verdict.sentence }}</div>
{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.note %}
<p class="soft">{{ section.note }}</p>
{% endif %}
{% for block in section.blocks %}
{% if block.kind == "cards" %}
<div class="cards">
{% for card in block.cards %}
<div class="card {{ card.state }}"><span>{{ card.name }}</span><b>{{ card.value|shown }}</b>\
<span>{{ card.note }}</span></div>
{% endfor %}
</div>
{% elif block.kind == "table" %}
<div class="scroll"><table>
<thead><tr>{% for column in block.columns %}<th{% if block.numeric[loop.index0] \
and column not in block.shares %} class="number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for value in row %}{% if block.columns[loop.index0] in block.shares and value|number %}\
<td class="share"><span class="bar"><i style="width:{{ (100 * value)|round(1) }}%"></i></span>{{ value|shown }}</td>\
{% else %}<td{% if block.numeric[loop.index0] %} class="number"{% endif %}>{{ value|shown }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% elif block.kind == "bars" %}
<figure class="bars">
{% if block.series|length > 1 %}
<p class="soft">{% for name in block.series %}<i class="s{{ loop.revindex }}"></i>{{ name }} {% endfor %}</p>
{% endif %}
{% for category in block.categories %}
<div><span>{{ category }}</span><span>{% for name, values in block.series.items() %}\
<i class="s{{ loop.revindex }}" style="width:{{ (100 * values.get(category, 0.0) / block.largest)|round(2) }}%" \
title="{{ name }}: {{ values.get(category, 0.0)|shown }}"></i>{% endfor %}</span>\
<span>{% for values in block.series.values() %}{{ values.get(category, 0.0)|shown }}<br>{% endfor %}</span></div>
{% endfor %}
<figcaption>{{ block.caption }}</figcaption></figure>
{% elif block.kind == "plot" %}
<figure>{{ block.svg|safe }}<figcaption>{{ block.caption }}</figcaption></figure>
{% else %}
{% for item in block.items %}
<div class="passage">{% if block.notes %}<p class="soft">{{ block.notes[loop.index0] }}</p>{% endif %}
<dl>{% for name, text in item %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl></div>
{% endfor %}
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
