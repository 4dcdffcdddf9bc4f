"""`ingestion.checks`: rules of a user's own, as pandera checks on batches of conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from app.errors import ConfigError
from app.ingestion.columns import documents
from app.ingestion.quality import Refusal
from app.settings.ingestion import CheckConfig, IngestionConfig, RuleConfig

if TYPE_CHECKING:
    import polars as pl


def name_of(check: CheckConfig) -> str:
    """What a check is called where reasons are counted."""
    return f"check_{check.name or f'{check.column}_{check.check}'}"


def rule_of(ingestion: IngestionConfig, name: str) -> RuleConfig:
    """What holds for a rule, or for a check of the user's own."""
    for check in ingestion.checks:
        if name == name_of(check):
            return RuleConfig(severity=check.severity, max_fraction=check.max_fraction)
    return ingestion.rule(name)  # type: ignore[arg-type]


def built(check: CheckConfig) -> Any:
    """The pandera check that a configuration names.

    Raises:
        ConfigError: pandera has none of that name, or it takes other arguments.
    """
    import pandera.polars as pandera

    factory = getattr(pandera.Check, check.check, None)
    if check.check.startswith("_") or not callable(factory):
        raise ConfigError(
            f"ingestion.checks: {check.check!r} is no pandera check", "use isin, str_matches, in_range, ge, le, ..."
        )
    try:
        return factory(**check.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"ingestion.checks: {check.check} does not take {check.arguments} ({error})", "see pandera's Check"
        ) from error


def applied(accepted: pa.Table, checks: Sequence[CheckConfig]) -> tuple[pa.Table, dict[int, Refusal]]:
    """The rows with the checks that only warn noted in them, and the refusal of each row that fails another.

    A missing value passes: that a column must be there is a rule of its own.

    Args:
        accepted: `ACCEPTED` rows.
        checks: Applied in order; the first that a row fails is its reason.
    """
    table = frame(accepted)
    warned: dict[int, list[str]] = {}
    refused: dict[int, Refusal] = {}
    for check in checks:
        for row in failing(table, check):
            if check.severity == "warn":
                warned.setdefault(row, []).append(name_of(check))
            else:
                refused.setdefault(row, Refusal(name_of(check)))
    if warned:
        warnings = accepted["warnings"].to_pylist()
        for row, names in warned.items():
            warnings[row] = [*warnings[row], *names]
        index = accepted.schema.get_field_index("warnings")
        accepted = accepted.set_column(index, "warnings", pa.array(warnings, pa.list_(pa.string())))
    return accepted, refused


def failing(table: "pl.DataFrame", check: CheckConfig) -> list[int]:
    """The rows whose value fails a check."""
    import pandera.polars as pandera
    from pandera.errors import SchemaErrors

    schema = pandera.DataFrameSchema({check.column: pandera.Column(checks=built(check), nullable=True)})
    try:
        schema.validate(table.select(check.column), lazy=True)
    except SchemaErrors as error:
        cases = error.failure_cases
        if cases["index"].null_count():
            raise ConfigError(
                f"ingestion.checks: {check.check} cannot be applied to column {check.column} ({cases['check'][0]})",
                "its values have another type",
            ) from None
        return sorted(set(cases["index"].to_list()))
    return []


def frame(accepted: pa.Table) -> "pl.DataFrame":
    """The columns that checks look at, one row a conversation."""
    import polars as pl

    texts = documents(accepted["messages"].combine_chunks())
    found = pl.from_arrow(
        accepted.select(["conversation_id", "channel", "language", "started_at", "intent"])
        .append_column("turns", pc.list_value_length(accepted["messages"]))
        .append_column("text", texts)
        .append_column("chars", pc.utf8_length(texts))
    )
    assert isinstance(found, pl.DataFrame)
    return found
