import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from app import traffic
from app.config import Config
from app.monitoring.quality import measure
from app.monitoring.report import monitor, sentence
from app.storage import Storage
from app.traffic import TrafficLog
from tests.traffic_records import SECRET, exchange, feedback, of_the_secret


def configuration(store: str, **overrides: Any) -> Config:
    return Config().with_overrides(
        {"storage.uri": store} | {key.replace("__", "."): overrides[key] for key in overrides}
    )


def log(store: str, exchanges: int = 20) -> None:
    writer = TrafficLog(Storage(store), traffic.new_writer("test"))
    for number in range(exchanges):
        chosen = ["track_order", "refund", "<b>bold</b>"][number % 3]
        handover = "intent" if number == 4 else None
        writer.append(exchange(number, received_at=traffic.now(), intent=chosen, handover=handover))
        writer.append(feedback(number, received_at=traffic.now(), rating=(-1) ** number, intent=SECRET))


class Addresses(HTMLParser):
    """Every address a page would load or link to, and every script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "link", "iframe", "img") else []
        self.found += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]


def test_report_is_written_as_html_and_json_below_the_store(store: str) -> None:
    log(store)
    report = monitor(configuration(store))
    page = Path(report.uri)
    assert page.name == "report.html"
    assert page.parent.parent == Path(store) / "reports" / "monitor"
    written = json.loads((page.parent / "report.json").read_text())
    assert written["figures"] == report.figures
    assert report.figures["exchanges"] == report.figures["feedback"] == 20
    assert written["window"]["from"] < written["window"]["until"]


def test_report_stands_alone_and_holds_no_word_of_a_customer(store: str) -> None:
    log(store)
    page = Path(monitor(configuration(store)).uri)
    addresses = Addresses()
    addresses.feed(page.read_text())
    assert addresses.found == []
    for file in page.parent.iterdir():
        text = file.read_text()
        assert of_the_secret(text) == [], file
        assert "<b>bold" not in text, file
    assert "track_order" in page.read_text()


def test_no_traffic_is_said_plainly(store: str) -> None:
    report = monitor(configuration(store))
    assert report.figures["exchanges"] == report.figures["feedback"] == 0
    assert report.figures["time_to_first_token_s_p50"] is report.figures["time_to_first_token_s_p95"] is None
    assert "No traffic in the last 24 hours: there is nothing to judge yet." in Path(report.uri).read_text()


def test_only_the_window_is_read(store: str) -> None:
    writer = TrafficLog(Storage(store), traffic.new_writer("test"))
    writer.append(exchange(0))
    writer.append(exchange(1, received_at=traffic.now()))
    assert monitor(configuration(store, monitoring__window_s=60)).figures["exchanges"] == 1


def test_traffic_is_read_where_serving_logs_it(store: str, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    log(elsewhere, exchanges=3)
    report = monitor(configuration(store, serving__storage_uri=elsewhere))
    assert report.figures["exchanges"] == 3
    assert report.uri.startswith(store)


@pytest.mark.parametrize(
    ("window_s", "span"),
    [(86_400, "24 hours"), (259_200, "3 days"), (600, "10 minutes"), (90, "90 seconds"), (5_400, "90 minutes")],
)
def test_window_is_said_in_words(window_s: float, span: str) -> None:
    assert f"in the last {span}" in sentence(measure([exchange(0)], []), window_s)
