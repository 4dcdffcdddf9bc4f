"""Whether a table's columns are those that the code writes; and the columns that came later than the first tables.

A table is only written with the columns it has. Columns that are in `ADDED` are put into a table that was made before
them, when it is opened to be written: rows from before then read as null. Any other difference is refused.
"""

import logging
from typing import TYPE_CHECKING

import pyarrow as pa

from app import catalog
from app.errors import TableError

if TYPE_CHECKING:
    from pyiceberg.schema import Schema
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

ADDED = ("imputed", "masked", "anomaly_score", "minhash", "id_hash")
"""Columns that tables made by earlier versions of the code lack."""


def evolve(table: "Table", schema: pa.Schema) -> list[str]:
    """Put the columns of `ADDED` that the table lacks into it, in one commit; returns their names.

    Raises:
        TableError: The table's columns do not fit, whatever is added, or the catalog does not answer; nothing was
            changed.
    """
    from pyiceberg.exceptions import CommitFailedException

    missing = [field for field in schema if field.name in ADDED and field.name not in top_level(table.schema())]
    rest = pa.schema([field for field in schema if field not in missing])
    check(table, rest)
    if not missing:
        return []
    try:
        with table.update_schema() as update:
            update.union_by_name(pa.schema(missing))
    except CommitFailedException:  # another process was faster, with the same columns or with rows
        catalog.patiently(table.refresh)
        return evolve(table, schema)
    except catalog.failures() as error:
        raise catalog.no_catalog(error) from error
    names = [field.name for field in missing]
    logger.info("table %s got the columns %s; earlier rows have none", name_of(table), ", ".join(names))
    return names


def check(table: "Table", schema: pa.Schema) -> None:
    """Refuse a table whose columns are not those of the schema, in any order.

    Raises:
        TableError: A column is missing, unknown or of another type; every one is named.
    """
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    found = schema_to_pyarrow(table.schema(), include_field_ids=False)
    wrong = differences(found, schema)
    if wrong:
        raise TableError(
            f"the columns of table {name_of(table)} do not fit: {'; '.join(wrong)}",
            "let the settings name another table, or change this one's columns with the engine that made it",
        )


def differences(found: pa.Schema, wanted: pa.Schema) -> list[str]:
    """How the columns of a table differ from those wanted, a clause each."""
    clauses = []
    for name in dict.fromkeys([*wanted.names, *found.names]):
        ours, theirs = (_type(schema, name) for schema in (wanted, found))
        if ours != theirs:
            clauses.append(f"{name} is {theirs or 'missing'} in the table and {ours or 'unknown'} to the code")
    return clauses


def top_level(schema: "Schema") -> list[str]:
    """The names of a table's columns, without what is nested in them."""
    return [field.name for field in schema.fields]


def name_of(table: "Table") -> str:
    """A table's name, as namespace.name."""
    return ".".join(table.name())


def _type(schema: pa.Schema, name: str) -> str | None:
    place = schema.get_field_index(name)
    return (
        None if place < 0 else _shown(schema.field(place).type) + ("" if schema.field(place).nullable else " required")
    )


def _shown(kind: pa.DataType) -> str:
    """A type as Iceberg sees it: large and small strings, and the names of a list's elements, are the same."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_shown(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_shown(field.type)}' for field in kind)}>"
    return str(kind).removeprefix("large_")
