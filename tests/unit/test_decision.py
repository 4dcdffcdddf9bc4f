from collections import defaultdict
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ingestion.decision import HELD, VERDICTS, _shared, decided, held_keys
from app.ingestion.staging import KEYS

Row = tuple[int, int, str, str | None]
records = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["u", "v", "w"]), st.sampled_from(["x", "y", None])), max_size=25
)


def half(text: str) -> bytes:
    return text.encode() * 16


def keys(rows: list[tuple[str | None, str | None, str | None]], part: int = 0) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "part": part, "position": position, "start": 0, "rows": len(rows), "row": position,
                "content_hash": half(text) if text else None, "conversation_id": name, "intent": intent,
                "turns": 2, "chars": 10,
            }
            for position, (text, name, intent) in enumerate(rows)
        ],
        schema=KEYS,
    )  # fmt: skip


def held(rows: list[tuple[str, str, str | None]]) -> pa.Table:
    made = [{"content_hash": half(text), "conversation_id": name, "intent": intent} for text, name, intent in rows]
    return pa.Table.from_pylist(made, schema=HELD)


def verdicts(found: pa.Table) -> dict[tuple[int, int], str]:
    assert found.schema == VERDICTS
    return {(row["part"], row["row"]): row["verdict"] for row in found.to_pylist()}


def expected(rows: list[tuple[str, str, str | None]], history: list[tuple[str, str, str | None]]) -> dict[Any, str]:
    """The same, record by record."""
    first = {}
    for text, _, intent in history:
        first.setdefault(text, intent)
    ids = {name for _, name, _ in history}
    said: dict[tuple[int, int], str] = {}
    for row, (text, name, intent) in enumerate(rows):
        if text in first:
            contradicts = None not in (intent, first[text]) and intent != first[text]
            said[0, row] = "contradictory_label" if contradicts else "duplicate"
            continue
        first[text] = intent
        if name in ids:
            said[0, row] = "duplicate_conversation_id"
        ids.add(name)
    return said


@settings(deadline=None)  # polars is imported in the first call
@given(records, st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["u", "q"])), max_size=3))
def test_verdicts_are_those_of_reading_one_record_after_another(
    rows: list[tuple[str, str, str | None]], history: list[tuple[str, str]]
) -> None:
    once = {text: (text, name, "x") for text, name in history}
    before = list(once.values())
    assert verdicts(decided([keys(rows)], [held(before)])) == expected(rows, before)


@given(records, st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["u", "q"])), max_size=3))
def test_where_repeated_ids_are_refused_no_text_is_lost_that_has_an_id_of_its_own(
    rows: list[tuple[str, str, str | None]], history: list[tuple[str, str]]
) -> None:
    before = [(text, name, "x") for text, name in dict(history).items()]
    said = verdicts(decided([keys(rows)], [held(before)], refuse_repeated_ids=True))
    kept = [row for number, row in enumerate(rows) if (0, number) not in said]
    texts = {text for text, _, _ in before} | {text for text, _, _ in kept}
    ids = {name for _, name, _ in before} | {name for _, name, _ in kept}
    assert len(texts) == len({text for text, _, _ in before}) + len(kept)
    assert len(ids) == len({name for _, name, _ in before}) + len(kept)
    assert all(text in texts or name in ids for text, name, _ in rows)
    for number, (text, name, _) in enumerate(rows):
        verdict = said.get((0, number))
        if verdict == "duplicate_conversation_id":
            assert name in ids
        elif verdict is not None and text not in texts:  # its original is set aside under its own name
            assert "duplicate_conversation_id" in [said.get((0, at)) for at in range(number) if rows[at][0] == text]


def test_a_copy_takes_the_place_of_an_original_that_is_refused_for_its_id() -> None:
    rows = [("a", "u", "x"), ("b", "u", "x"), ("b", "v", "y"), ("b", "w", "x"), ("b", "v", None), ("c", "v", None)]
    assert verdicts(decided([keys(rows)], [], refuse_repeated_ids=True)) == {
        (0, 1): "duplicate_conversation_id",
        (0, 3): "contradictory_label",
        (0, 4): "duplicate",
        (0, 5): "duplicate_conversation_id",
    }
    found = verdicts(decided([keys([("b", "u", "x"), ("b", "v", "y")])], [held([("a", "u", "x")])], True))
    assert found == {(0, 0): "duplicate_conversation_id"}


def test_where_no_copy_has_an_id_of_its_own_the_first_is_set_aside() -> None:
    rows = [("a", "u", "x"), ("b", "u", "x"), ("b", "u", "x")]
    assert verdicts(decided([keys(rows)], [], refuse_repeated_ids=True)) == {
        (0, 1): "duplicate_conversation_id",
        (0, 2): "duplicate",
    }


@given(records, st.randoms())
def test_verdicts_do_not_depend_on_how_records_arrive(rows: list[tuple[str, str, str | None]], random: Any) -> None:
    whole = keys(rows)
    pieces = [whole.slice(at, 3) for at in range(0, len(rows), 3)]
    random.shuffle(pieces)
    assert decided(pieces, []) == decided([whole], [])


def test_the_part_that_comes_first_counts() -> None:
    found = verdicts(decided([keys([("a", "1", None)], part=1), keys([("a", "2", None)], part=0)], []))
    assert found == {(1, 0): "duplicate"}


def test_refused_records_take_no_part() -> None:
    assert verdicts(decided([keys([(None, None, None), ("a", "1", "x"), (None, None, None)])], [])) == {}


def test_a_table_that_holds_a_text_twice_decides_as_one_that_holds_it_once() -> None:
    found = verdicts(decided([keys([("a", "1", "y")])], [held([("a", "2", "x"), ("a", "3", "x")])]))
    assert found == {(0, 0): "contradictory_label"}


def test_nothing_new_has_no_verdicts() -> None:
    assert decided([], [held([("a", "1", None)])]).num_rows == 0


def test_the_keys_of_held_rows_are_the_first_halves_of_their_hashes() -> None:
    rows = pa.table({"content_hash": ["ab" * 32], "conversation_id": ["1"], "intent": pa.nulls(1, pa.string())})
    assert held_keys(rows).to_pylist() == [
        {"content_hash": b"\xab" * 16, "conversation_id": "1", "intent": None}
    ]  # fmt: skip


def test_each_record_has_at_most_one_verdict() -> None:
    rows = [("a", "u", "x"), ("b", "u", "x"), ("a", "u", "y"), ("b", "v", "x")]
    count: dict[Any, int] = defaultdict(int)
    for row in decided([keys(rows)], []).to_pylist():
        count[row["part"], row["row"]] += 1
    assert count == {(0, 1): 1, (0, 2): 1, (0, 3): 1}


def test_texts_that_are_equal_in_64_bits_only_are_two_texts() -> None:
    rows = keys([("a", "u", None), ("b", "v", None), ("c", "w", None)])
    alike = [b"12345678" + end * 8 for end in (b"x", b"y", b"x")]
    place = rows.schema.get_field_index("content_hash")
    rows = rows.set_column(place, "content_hash", pa.array(alike, pa.binary(16)))
    assert verdicts(decided([rows], [])) == {(0, 2): "duplicate"}


def test_only_what_could_have_a_verdict_is_compared() -> None:
    new = keys([("a", "u", None), ("b", "v", None), (None, None, None), ("c", "w", None), ("a", "x", None)])
    some, known = _shared([new, keys([], part=1)], [held([("d", "w", None), ("e", "z", None)])])
    assert [table["position"].to_pylist() for table in some] == [[0, 3, 4]]
    assert [table["conversation_id"].to_pylist() for table in known] == [["w"]]
