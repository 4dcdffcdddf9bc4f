from typing import Any

import pyarrow as pa
import pytest

from app.errors import ConfigError
from app.ingestion.checks import applied, built, failing, frame, name_of, rule_of
from app.ingestion.columns import ACCEPTED
from app.settings.ingestion import CheckConfig, IngestionConfig


def check(column: str, name: str, severity: str = "quarantine", **arguments: Any) -> CheckConfig:
    return CheckConfig.model_validate({"column": column, "check": name, "arguments": arguments, "severity": severity})


def accepted(*texts: str, **columns: list[Any]) -> pa.Table:
    rows = [
        {
            "conversation_id": f"c{number}",
            "channel": "web",
            "language": "en",
            "started_at": None,
            "intent": "refund",
            "messages": [{"role": "user", "content": text, "intent": None}, {"role": "assistant", "content": "Yes."}],
            "warnings": [],
            "imputed": [],
            "masked": 0,
        }
        | {name: values[number] for name, values in columns.items()}
        for number, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=ACCEPTED)


def test_the_columns_of_checks_are_those_of_the_configuration_and_say_what_they_are() -> None:
    table = frame(accepted("Größe?", "hello"))
    assert set(CheckConfig.model_json_schema()["properties"]["column"]["enum"]) == set(table.columns)
    assert table["text"].to_list() == ["Größe?\nYes.", "hello\nYes."]
    assert table["chars"].to_list() == [11, 10]
    assert table["turns"].to_list() == [2, 2]


@pytest.mark.parametrize(
    ("rule", "failed"),
    [
        (check("channel", "isin", allowed_values=["web", "app"]), [1]),
        (check("channel", "notin", forbidden_values=["web"]), [0, 2]),
        (check("chars", "in_range", min_value=0, max_value=12), [2]),
        (check("turns", "ge", min_value=3), [0, 1, 2]),
        (check("text", "str_contains", pattern="refund"), [0, 1]),
        (check("text", "str_matches", pattern="^h"), [2]),
        (check("intent", "isin", allowed_values=["refund"]), [2]),
        (check("language", "isin", allowed_values=["en"]), []),
    ],
)
def test_a_row_fails_a_check_of_panderas(rule: CheckConfig, failed: list[int]) -> None:
    rows = accepted(
        "hello", "how?", "a refund please", channel=["web", "phone", "app"], intent=[None, "refund", "other"],
        language=[None, "en", "en"],
    )  # fmt: skip
    rows = rows.set_column(1, "channel", pa.array(["web", "phone", "web"]))
    assert failing(frame(rows), rule) == failed


def test_a_missing_value_passes() -> None:
    assert failing(frame(accepted("a", "b", intent=[None, None])), check("intent", "isin", allowed_values=["x"])) == []


def test_the_first_check_that_a_row_fails_is_its_reason_and_warnings_are_noted() -> None:
    rows = accepted("hello", "a very long text", "x", warnings=[["mojibake"], [], []])
    rules = [
        check("text", "str_contains", "warn", pattern="e"),
        check("chars", "le", max_value=15),
        check("chars", "in_range", min_value=8, max_value=15),
    ]
    noted, refused = applied(rows, rules)
    assert {row: refusal.reason for row, refusal in refused.items()} == {1: "check_chars_le", 2: "check_chars_in_range"}
    assert noted["warnings"].to_pylist() == [["mojibake"], [], []]
    noted, refused = applied(rows, [check("text", "str_contains", "warn", pattern="x")])
    assert noted["warnings"].to_pylist() == [
        ["mojibake", "check_text_str_contains"],
        ["check_text_str_contains"][:0],
        [],
    ]
    assert refused == {}
    assert noted.schema.equals(rows.schema)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (check("text", "no_such_check"), "'no_such_check' is no pandera check"),
        (check("text", "__init__"), "is no pandera check"),
        (check("chars", "ge", least=3), "ge does not take"),
    ],
)
def test_a_check_that_cannot_be_is_refused(rule: CheckConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(rule)


def test_a_check_on_a_column_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="str_contains cannot be applied to column chars"):
        failing(frame(accepted("a")), check("chars", "str_contains", pattern="x"))


def test_a_checks_own_severity_and_limit_hold() -> None:
    rule = check("chars", "le", "warn", max_value=5).model_copy(update={"max_fraction": 0.25})
    ingestion = IngestionConfig(checks=(rule,))
    found = rule_of(ingestion, name_of(rule))
    assert (name_of(rule), found.severity, found.limit) == ("check_chars_le", "warn", 0.25)
    assert rule_of(ingestion, "near_duplicate").severity == "drop"
