"""One pass over the window: measured, written down as report.html and report.json, and handed on as figures."""

import datetime
import json
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.config import Config
from app.job import job_id
from app.monitoring.quality import QUANTILES, Quality, Tally, most_frequent, quantiles, read
from app.report import Card, Cards, Plot, Section, Table, Verdict, lines, render
from app.storage import Storage

LATENCIES = (("Time to first token", "time_to_first_token_s"), ("End to end", "end_to_end_s"))


@dataclass(frozen=True)
class MonitoringReport:
    """What a pass found, and where it is written down."""

    uri: str
    """Of report.html; report.json lies beside it."""
    figures: dict[str, Any]
    sentence: str
    """What the pass comes to, for people."""


def monitor(config: Config) -> MonitoringReport:
    """Measure the traffic of the last `monitoring.window_s` seconds and write the report."""
    until = datetime.datetime.now(datetime.UTC)
    traffic = Storage(config.serving.storage_uri or config.storage.uri)
    quality = read(traffic, config.monitoring.window_s)
    figures = quality.figures()
    folder = ("reports", "monitor", until.strftime("%Y%m%dT%H%M%S.%fZ"))
    since = until - datetime.timedelta(seconds=config.monitoring.window_s)
    window = {"from": since.isoformat(timespec="seconds"), "until": until.isoformat(timespec="seconds")}
    content = {"stage": "monitor", "job": job_id(), "traffic": traffic.uri("traffic"), "window": window}
    storage = Storage(config.storage.uri)
    storage.write(json.dumps(content | {"figures": figures}, indent=2).encode(), *folder, "report.json")
    uri = storage.write(page(quality, window, config.monitoring.window_s).encode(), *folder, "report.html")
    return MonitoringReport(uri, figures, sentence(quality, config.monitoring.window_s))


def page(quality: Quality, window: dict[str, str], window_s: float) -> str:
    """The report as one HTML page."""
    subtitle = f"Exchanges received from {window['from']} until {window['until']}"
    verdict = Verdict(sentence(quality, window_s))
    whole = quality.whole
    sections = [Section("At a glance", [Cards(cards(quality))])]
    if whole.exchanges:
        sections += [
            Section(
                "Latency", latency(whole), "First tokens of every answer; end to end of answers that were finished."
            ),
            Section("Variants", variants(quality)),
            Section(
                "Intents",
                [Table(*intents(whole), shares=("share", "accuracy"))],
                "As the intent model chose them; accuracy where feedback names the right one.",
            ),
        ]
    if whole.handovers:
        sections.append(Section("Hand-overs to a person", [Table(*handovers(whole), shares=("share",))]))
    return render("Monitoring", sections, subtitle, verdict)


def sentence(quality: Quality, window_s: float) -> str:
    """What the pass comes to."""
    span = f"in the last {_span(window_s)}"
    if not quality.whole.exchanges:
        return f"No traffic {span}: there is nothing to judge yet."
    first = quantiles(quality.whole.time_to_first_token_s)["p95"]
    speed = f"; 95 of 100 saw a first token within {first:.2f} s" if first is not None else ""
    return f"{quality.whole.exchanges:,} exchanges {span}, {quality.feedback:,} feedback received{speed}."


def cards(quality: Quality) -> list[Card]:
    """The figures to see first."""
    whole = quality.whole
    first, end = quantiles(whole.time_to_first_token_s), quantiles(whole.end_to_end_s)
    failed = whole.statuses["error"]
    rated = whole.positive + whole.negative
    return [
        Card("Exchanges", whole.exchanges, f"{whole.statuses['cancelled']:,} cancelled"),
        Card("Errors", failed, state="bad" if failed else "plain"),
        Card("First token, p50", _seconds(first["p50"]), f"p95 {_seconds(first['p95'])}"),
        Card("End to end, p50", _seconds(end["p50"]), f"p95 {_seconds(end['p95'])}"),
        Card("Feedback", quality.feedback, f"on {_percent(whole.feedback_fraction)} of the exchanges"),
        Card("Positive", _percent(whole.positive_fraction), f"of {rated:,} rated"),
        Card("Intent accuracy", _percent(whole.intent_accuracy), f"of {whole.labelled.total():,} labelled"),
        Card("Tokens written", whole.completion_tokens, f"{whole.prompt_tokens:,} read"),
        Card("Damaged records", quality.unreadable, "left out", "bad" if quality.unreadable else "plain"),
    ]


def latency(whole: Tally) -> list[Table | Plot]:
    """Quantiles, and the share of answers within a time."""
    rows, curves = [], {}
    for name, attribute in LATENCIES:
        values: array[float] = getattr(whole, attribute)
        rows.append([name, len(values), *quantiles(values).values()])
        if values:
            shares = np.linspace(0, 1, 101)
            curves[name] = (np.quantile(np.frombuffer(values), shares).tolist(), shares.tolist())
    table = Table(("", "answers", *(f"{name} (s)" for name in QUANTILES)), rows)
    caption = "Share of answers within a time"
    return [table, lines(curves, caption, x="seconds", y="share")] if curves else [table]


def variants(quality: Quality) -> list[Table]:
    """One row a variant: counts and latencies, then shares."""
    columns = ["variant", "exchanges", "errors", "cancelled"]
    columns += ["first token p50 (s)", "p95 (s)", "end to end p50 (s)", "p95 (s)"]
    counts, shares = [], []
    for name, tally in sorted(quality.variants.items()):
        times = [quantiles(values) for values in (tally.time_to_first_token_s, tally.end_to_end_s)]
        row = [name, tally.exchanges, tally.statuses["error"], tally.statuses["cancelled"]]
        counts.append([*row, *(found[quantile] for found in times for quantile in ("p50", "p95"))])
        handed_over = tally.handovers.total() / tally.exchanges
        shares.append([name, handed_over, tally.feedback_fraction, tally.positive_fraction, tally.intent_accuracy])
    names = ("handed over", "with feedback", "positive", "intent accuracy")
    return [Table(columns, counts), Table(["variant", *names], shares, shares=names)]


def intents(whole: Tally) -> tuple[tuple[str, ...], list[list[Any]]]:
    """One row an intent, most frequent first."""
    rows = []
    for intent, count in most_frequent(whole.intents).items():
        labelled = whole.labelled[intent]
        accuracy = whole.right[intent] / labelled if labelled else None
        rows.append([intent, count, count / whole.exchanges, labelled, accuracy])
    return ("intent", "exchanges", "share", "labelled", "accuracy"), rows


def handovers(whole: Tally) -> tuple[tuple[str, ...], list[list[Any]]]:
    """One row a reason, most frequent first."""
    counts = most_frequent(whole.handovers)
    return ("reason", "exchanges", "share"), [[name, count, count / whole.exchanges] for name, count in counts.items()]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} s"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} seconds"
