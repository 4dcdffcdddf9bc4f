"""What makes an ingest new: sources, how they are read, and where streams go on from."""

import sqlite3
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.errors import ConfigError, SourceError, StageRefused
from app.ingestion import kafka, queries, sources
from app.ingestion.finalisation import Outcome
from app.ingestion.follow import Followed
from app.ingestion.pipeline import Ingested, check_rules, ingest_key
from app.versions import TableVersion


def configured(*given: dict[str, Any], **ingestion: Any) -> Config:
    settings = {"ingestion.sources": list(given)} | {f"ingestion.{name}": value for name, value in ingestion.items()}
    return Config().with_overrides(settings)


def database(folder: Path, *numbers: int) -> dict[str, Any]:
    with sqlite3.connect(folder / "tickets.db") as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS tickets (id INTEGER, question TEXT)")
        connection.execute("DELETE FROM tickets")
        connection.executemany("INSERT INTO tickets VALUES (?, 'hi')", [(number,) for number in numbers])
    columns = {"conversation_id": "id", "user": "question"}
    return {
        "uri": f"sqlite:///{folder}/tickets.db", "format": "sql", "query": "SELECT id, question FROM tickets",
        "columns": columns,
    }  # fmt: skip


def test_a_query_without_a_cursor_is_new_each_time(tmp_path: Path) -> None:
    config = configured(database(tmp_path, 1))
    assert ingest_key(config, sources.state(config)) != ingest_key(config, sources.state(config))
    assert len(sources.parts_of(config, {})) == 1


def test_a_file_that_is_to_be_read_in_another_way_is_new(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    before = configured({"uri": str(tmp_path / "a.jsonl"), "format": "jsonl"})
    [part] = sources.parts_of(before, {})
    mark = sources.mark_of(before, part)
    assert mark is not None
    assert sources.parts_of(before, dict([mark])) == []
    after = configured({"uri": str(tmp_path / "a.jsonl"), "format": "jsonl", "columns": {"user": "q"}})
    assert len(sources.parts_of(after, dict([mark]))) == 1
    assert ingest_key(after, sources.state(after)) != ingest_key(before, sources.state(before))


def test_a_table_made_anew_is_named_and_its_cursor_stays(tmp_path: Path) -> None:
    source = configured(database(tmp_path, 1, 2) | {"cursor_column": "id", "name": "tickets"}).ingestion.sources[0]
    [part] = queries.parts(source, 0, {})
    assert part.mark == ("sql:tickets", 2)
    assert queries.parts(source, 0, {"sql:tickets": 2}) == []
    with pytest.raises(SourceError, match="the highest id of tickets is 2, but 100 was read already"):
        queries.parts(source, 0, {"sql:tickets": 100})


@pytest.mark.parametrize(
    ("after", "until", "back"),
    [
        (2, 1, True),
        (1, 2, False),
        ("2026-01-02 10:00:00", "2026-01-01", True),
        ("2026-01-01", "2026-01-02", False),
        ("b", "A", False),  # only the database knows its order
        (5, "2026-01-01", False),
    ],
)
def test_whether_a_cursor_went_back(after: Any, until: Any, back: bool) -> None:
    assert queries._went_back(after, until) is back


def test_a_partition_that_has_gone_is_named() -> None:
    source = configured({"uri": "kafka://b:1/chats", "format": "kafka", "name": "chats"}).ingestion.sources[0]
    kafka._check_known(source, [0, 1], {"kafka:chats/1": 7, "kafka:other/5": 7})
    with pytest.raises(SourceError, match="chats/3 does not exist any more, but offsets up to 7 were committed"):
        kafka._check_known(source, [0, 1], {"kafka:chats/3": 7})


def test_streams_of_one_name_are_refused(tmp_path: Path) -> None:
    named = database(tmp_path, 1) | {"name": "tickets"}
    with pytest.raises(ConfigError, match="sql source 'tickets' is there twice"):
        configured(named, named | {"query": "SELECT 1"})
    assert len(configured(database(tmp_path, 1), database(tmp_path, 1) | {"query": "SELECT 1"}).ingestion.sources) == 2


def test_checks_of_one_name_are_refused() -> None:
    check = {"column": "text", "check": "str_contains", "arguments": {"pattern": "a"}}
    with pytest.raises(ConfigError, match="two checks are called text_str_contains: give each a `name`"):
        configured(checks=[check, check])
    assert len(configured(checks=[check, check | {"name": "b"}]).ingestion.checks) == 2


def test_the_limit_of_a_rule_that_drops_holds() -> None:
    outcome = Outcome(kept=10, near_duplicates=90)
    config = configured(rules={"near_duplicate": {"severity": "drop", "max_fraction": 0.5}})
    with pytest.raises(StageRefused, match="90 of 100 records break rule near_duplicate"):
        check_rules(config, outcome)
    check_rules(configured(), outcome)


def test_a_micro_batch_that_is_read_again_is_counted_once() -> None:
    followed, outcome = Followed(), Outcome(kept=10)
    followed.judge(Config(), outcome)
    followed.judge(Config(), outcome)
    followed.count(Ingested(TableVersion("a.b", 1), {}, True, outcome))
    assert (followed.figures["records_kept"], followed.batches) == (10, 1)


def test_a_stream_that_turns_bad_is_stopped_however_long_it_was_good() -> None:
    followed, config = Followed(), configured(max_refused_fraction=0.1)
    counted = partial(Ingested, TableVersion("a.b", 1), {}, True)
    followed.count(counted(Outcome(kept=1_000_000)))
    bad = Outcome(kept=300, quarantined=Counter(invalid_json=100))
    for _ in range(2):  # 800 records, too few to say
        followed.judge(config, bad)
        followed.count(counted(bad))
    with pytest.raises(StageRefused, match=r"refused 25.0% of 1200 records"):
        followed.judge(config, bad)


def test_a_wrong_setting_of_librdkafka_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_KAFKA_SASL_PASWORD", "s3cret")
    source = configured({"uri": "kafka://b:1/chats", "format": "kafka"}).ingestion.sources[0]
    with pytest.raises(ConfigError, match="set are RAYLOOP_KAFKA_SASL_PASWORD") as caught:
        kafka._consumer(source)
    assert "s3cret" not in str(caught.value)
