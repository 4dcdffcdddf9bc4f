"""Logs are one JSON object a line; progress is readable; metric names follow one rule."""

import io
import json
import logging
import re

import pytest

from app import telemetry
from app.telemetry import JsonFormatter, Metric, Progress

METRICS = [value for value in vars(telemetry).values() if isinstance(value, Metric)]


@pytest.mark.parametrize("text", ['a\nINFO forged "line"', "\x1b[31mred\x1b[0m", "100%n %s", "\u2028"])
def test_a_record_is_one_line_whatever_its_text(text: str) -> None:
    formatter = JsonFormatter(job="j1", stage="train")
    record = logging.LogRecord("app.x", logging.INFO, "f", 1, "%s", (text,), None)
    record.fields = {"version": "support/3"}
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    found = json.loads(line)
    assert found["message"] == text
    assert (found["job"], found["stage"], found["version"]) == ("j1", "train", "support/3")


def test_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("bad\nvalue")
    except ValueError as error:
        record = logging.LogRecord("app", logging.ERROR, "f", 1, "failed", (), (ValueError, error, error.__traceback__))
    assert "ValueError" in json.loads(JsonFormatter().format(record))["exception"]


def test_off_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("train", 100, "steps")
    for step in range(100):
        bar.update(step)
    assert capsys.readouterr().out == ""
    bar.close()
    assert re.fullmatch(r"train: 99/100 steps in \d+ s\n", capsys.readouterr().out)


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)  # a terminal cannot be had here
    bar = Progress("train", 10, "steps")
    bar.update(5, "loss 1.0")
    bar.close()
    assert "[##########..........] 5/10 steps" in terminal.getvalue()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metric_names_follow_the_rule(metric: Metric) -> None:
    assert re.fullmatch(r"rayloop_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not {"deployment", "replica", "application"} & set(metric.tags), "reserved by Ray Serve"
    assert len({other.name for other in METRICS}) == len(METRICS)
