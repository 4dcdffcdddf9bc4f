"""Near-duplicates through whole ingests: within a batch, against what the table holds, in one batch or in two."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from app import tables
from app.config import Config
from app.ingestion.pipeline import Ingested, ingest

pytestmark = pytest.mark.usefixtures("cluster")

WORDS = [
    f"{first}{second}" for first in ("gar", "lam", "pot", "she", "rak") for second in ("den", "p", "ting", "lf", "e")
]


def conversation(number: int, text: str, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": text if turn == 0 else f"And number {number} in turn {turn}?"})
        messages.append({"role": "assistant", "content": f"We look into it for you, number {number}."})
    return {"conversation_id": f"c{number}", "channel": "web", "language": "en", "messages": messages}


def texts(count: int) -> list[str]:
    draw = random.Random(11)
    return [" ".join(draw.choices(WORDS, k=60)) for _ in range(count)]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(store: str, folder: Path, **overrides: Any) -> Config:
    return Config().with_overrides(
        {
            "storage.uri": store,
            "ingestion.sources": [{"uri": str(folder), "format": "jsonl"}],
            "ingestion.anomalies.detect": False,
            "ingestion.max_refused_fraction": 0.9,
        }
        | {f"ingestion.{key}": value for key, value in overrides.items()}
    )


def kept(config: Config) -> set[str]:
    return set(tables.read_local(config, tables.latest(config), ["conversation_id"])["conversation_id"].to_pylist())


def ids(*numbers: int) -> set[str]:
    return {f"c{number}" for number in numbers}


@pytest.mark.parametrize("severity", ["quarantine", "drop"])
def test_nothing_is_lost_for_a_conversation_that_is_refused_for_its_id(
    severity: str, store: str, tmp_path: Path
) -> None:
    first, copied, similar = texts(3)
    rows = [
        conversation(1, first),
        conversation(2, copied) | {"conversation_id": "c1"},
        conversation(2, copied),
        conversation(3, f"{similar} indeed") | {"conversation_id": "c1"},  # better, as it is longer
        conversation(3, similar),
    ]
    write(tmp_path / "in", "a.jsonl", rows)
    config = configured(store, tmp_path / "in", rules={"duplicate_conversation_id": {"severity": severity}})
    assert ingest(config).figures["refused_by_reason"] == {"duplicate_conversation_id": 2}
    assert kept(config) == ids(1, 2, 3)


@pytest.fixture(scope="module")
def batches() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Twenty conversations, and twenty more: 0-4 again nearly as they were, 5-9 exactly, ten new ones."""
    found = texts(30)
    first = [conversation(number, text) for number, text in enumerate(found[:20])]
    near = [conversation(100 + number, f"{found[number]} please") for number in range(5)]
    exact = [row | {"conversation_id": f"c{200 + number}"} for number, row in enumerate(first[5:10])]
    new = [conversation(300 + number, text) for number, text in enumerate(found[20:])]
    return first, near + exact + new


def test_of_nearly_equal_conversations_in_one_batch_the_longest_stays(store: str, tmp_path: Path) -> None:
    text, other = texts(2)
    rows = [
        conversation(1, text),
        conversation(2, f"{text} please"),
        conversation(3, f"now {text} please"),
        conversation(4, other),
    ]
    write(tmp_path / "in", "all.jsonl", rows)
    config = configured(store, tmp_path / "in")
    result = ingest(config)
    assert kept(config) == ids(3, 4)
    assert (result.figures["records_kept"], result.figures["near_duplicates"]) == (2, 2)


def test_a_second_batch_is_compared_with_what_the_table_holds(
    store: str, tmp_path: Path, batches: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    first, second = batches
    write(tmp_path / "in", "a.jsonl", first)
    config = configured(store, tmp_path / "in")
    assert ingest(config).figures["near_duplicates"] == 0
    before = kept(config)
    write(tmp_path / "in", "b.jsonl", second)
    result: Ingested = ingest(config)
    assert before == ids(*range(20))
    # What is held stays, also where the new one is longer.
    assert kept(config) == before | ids(*range(300, 310))
    assert (result.figures["near_duplicates"], result.figures["duplicates"]) == (5, 5)


def test_in_one_batch_as_many_stay_as_in_two(
    store: str, tmp_path: Path, batches: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    first, second = batches
    write(tmp_path / "in", "a.jsonl", first)
    write(tmp_path / "in", "b.jsonl", second)
    config = configured(store, tmp_path / "in")
    result = ingest(config)
    # Of a pair the longer one stays, which is the second here.
    assert kept(config) == ids(*range(5, 20), *range(100, 105), *range(300, 310))
    assert (result.figures["near_duplicates"], result.figures["duplicates"]) == (5, 5)


def test_a_rule_may_set_near_duplicates_aside_or_only_warn(store: str, tmp_path: Path) -> None:
    text = texts(1)[0]
    write(tmp_path / "in", "all.jsonl", [conversation(1, text), conversation(2, f"{text} please")])
    aside = configured(store, tmp_path / "in", rules={"near_duplicate": {"severity": "quarantine"}})
    assert ingest(aside).figures["refused_by_reason"] == {"near_duplicate": 1}
    assert kept(aside) == ids(2)
    warned = configured(f"{store}-warned", tmp_path / "in", rules={"near_duplicate": {"severity": "warn"}})
    assert ingest(warned).figures["warned_by_rule"]["near_duplicate"] == 1
    assert kept(warned) == ids(1, 2)


def test_another_threshold_finds_others(store: str, tmp_path: Path) -> None:
    words = texts(1)[0].split()
    changed = " ".join(["changed" if place in (10, 30, 50) else word for place, word in enumerate(words)])
    write(tmp_path / "in", "all.jsonl", [conversation(1, " ".join(words)), conversation(2, changed)])
    strict = configured(store, tmp_path / "in", **{"near_duplicates.threshold": 0.9})
    assert ingest(strict).figures["near_duplicates"] == 0
    loose = configured(f"{store}-loose", tmp_path / "in", **{"near_duplicates.threshold": 0.6})
    assert ingest(loose).figures["near_duplicates"] == 1
