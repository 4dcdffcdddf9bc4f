"""Preference pairs from rated answers and from files, and what is said where there are none."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.config import Config
from app.conversation import Message
from app.errors import SourceError, StageFailed
from app.preferences import Pair, collect, of_exchanges, parse, rated
from app.storage import Storage
from app.traffic import Exchange, Feedback, TrafficLog, new_writer
from app.versions import TableVersion
from jobs.train import inputs

QUESTION: list[Message] = [{"role": "user", "content": "Where is my order?"}]


def exchange(number: int, reply: str, messages: list[Message] = QUESTION, **other: Any) -> Exchange:
    given: dict[str, Any] = {"status": "ok", "handover": None, **other}
    return Exchange(
        f"chatcmpl-{number:031x}", f"2026-11-24T10:00:{number:02d}.000+00:00", "champion", "1", messages, reply, None,
        None, finish_reason="stop", prompt_tokens=1, completion_tokens=1, time_to_first_token_s=None, end_to_end_s=1.0,
        stream=False, user_hash=None, **given,
    )  # fmt: skip


def feedback(number: int, rating: int | None, at: int = 0) -> Feedback:
    return Feedback(f"chatcmpl-{number:031x}", f"2026-11-24T11:00:{at:02d}.000+00:00", rating, None, None)


def logged(store: str, *records: Exchange | Feedback) -> Storage:
    storage = Storage(store)
    log = TrafficLog(storage, new_writer("test"))
    for record in records:
        log.append(record)
    return storage


def config(store: str, *sources: str) -> Config:
    settings = {"storage.uri": store, "training.base_model": "some/model", "training.objective": "dpo"}
    return Config().with_overrides({**settings, **({"training.dpo.sources": list(sources)} if sources else {})})


def test_good_and_bad_answers_to_the_same_question_are_pairs(store: str) -> None:
    logged(
        store,
        exchange(1, "It arrives on Tuesday."),
        exchange(2, "I do not know.", [{"role": "user", "content": " where is  my ORDER?"}]),
        exchange(3, "What?", [{"role": "user", "content": "Another question"}]),
        exchange(4, "Nobody rated this."),
        feedback(1, 1), feedback(2, -1), feedback(3, -1),
    )  # fmt: skip
    [pair] = collect(config(store))
    assert (pair.chosen, pair.rejected) == ("It arrives on Tuesday.", "I do not know.")
    assert pair.prompt[0]["content"] == "Where is my order?"


def test_only_the_newest_rating_counts_and_a_person_is_never_judged(store: str) -> None:
    storage = logged(
        store,
        exchange(1, "Good."), exchange(2, "Bad."), exchange(3, "Withdrawn."), exchange(4, "Both."),
        exchange(5, "Both."),
        exchange(6, "Handed over.", handover="intent"), exchange(7, "Cut", status="cancelled"),
        feedback(1, -1, 1), feedback(1, 1, 2), feedback(2, -1), feedback(3, -1, 1), feedback(3, None, 2),
        feedback(4, 1), feedback(5, -1), feedback(6, -1), feedback(7, -1),
    )  # fmt: skip
    assert [(pair.chosen, pair.rejected) for pair in of_exchanges(*rated(storage))] == [("Good.", "Bad.")]


def test_a_question_asked_all_day_gives_a_bounded_number_of_pairs() -> None:
    exchanges = [exchange(number, f"answer {number}") for number in range(40)]
    ratings = {each.response_id: 1 if number % 2 else -1 for number, each in enumerate(exchanges)}
    assert len(of_exchanges(exchanges, ratings)) == 16


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_pairs_of_files_are_masked_and_each_taken_once(store: str, tmp_path: Path, kind: str) -> None:
    row = {"prompt": "My mail is ann@example.com", "chosen": "I wrote to ann@example.com.", "rejected": "No."}
    rows = [row, row, {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}]
    folder = tmp_path / "pairs"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    uri = str(folder if kind == "folder" else folder / f"a.{kind}")
    pairs = collect(config(store, uri))
    assert len(pairs) == 2
    masked = next(pair for pair in pairs if "mail" in pair.prompt[0]["content"])
    assert (masked.prompt[0]["content"], masked.chosen) == ("My mail is [EMAIL_1]", "I wrote to [EMAIL_1].")
    assert collect(config(store, uri)) == pairs, "the same every time"


def test_a_pair_may_be_two_conversations_that_begin_alike() -> None:
    asked = [{"role": "system", "content": "Be kind."}, *QUESTION]
    row = {
        "chosen": [*asked, {"role": "assistant", "content": "Here."}],
        "rejected": [*asked, {"role": "assistant", "content": "Nowhere."}],
    }
    assert parse(row) == Pair(tuple(asked), "Here.", "Nowhere.")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "it is no object"),
        ({"prompt": "q", "chosen": "a"}, "rejected is missing"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": " a"}, "chosen and rejected are the same"),
        (
            {"prompt": [{"role": "robot", "content": "x"}], "chosen": "a", "rejected": "b"},
            "prompt holds something other",
        ),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "chosen is not one reply"),
        (
            {"chosen": [*QUESTION, {"role": "assistant", "content": "a"}], "rejected": "b"},
            "chosen and rejected answer different messages",
        ),
    ],
)
def test_what_is_no_pair_says_why(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(row)


def test_no_pairs_at_all_is_said_with_what_to_do(store: str) -> None:
    with pytest.raises(StageFailed, match=r"there are no preference pairs in traffic:: .*collect feedback"):
        collect(config(store))


def test_too_many_broken_records_stop_it_and_few_are_left_out(store: str, tmp_path: Path) -> None:
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{good}\nnot json\n")
    with pytest.raises(StageFailed, match=r"50% of the records of .* are no preference pairs: 1 times it is no object"):
        collect(config(store, str(file)))
    lenient = config(store, str(file)).with_overrides({"ingestion.max_refused_fraction": 0.5})
    assert len(collect(lenient)) == 1
    with pytest.raises(SourceError, match=r"no \.jsonl or \.parquet file"):
        collect(config(store, str(tmp_path / "missing.jsonl")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match="cannot read preference pairs"):
        collect(config(store, str(tmp_path / "bad.parquet")))


def test_new_feedback_is_another_input_of_training(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.tables.version", lambda config: TableVersion("support.conversations", 1))
    logged(store, exchange(1, "On Tuesday."), exchange(2, "No idea."), feedback(1, 1), feedback(2, -1))
    before = inputs(config(store))
    assert before == inputs(config(store))
    logged(store, exchange(3, "Who knows."), feedback(3, -1))
    assert inputs(config(store))["pairs"] != before["pairs"]
