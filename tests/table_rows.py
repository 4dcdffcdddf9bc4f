"""Tables for tests of versions and maintenance: conversations by number, appended as ingestion does."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table

from app import tables
from app.config import Config
from app.conversation import SCHEMA, content_hash, split_of
from app.ingestion.finalisation import DataFile, Target
from app.registry import Registry
from app.versions import ModelVersion, TableVersion


def text(number: int, again: int = 0) -> str:
    return f"where is my order {number}, asked {again} times before?"


def row(number: int, again: int = 0) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": text(number, again), "intent": "order_status" if number % 2 else "refund"},
        {"role": "assistant", "content": "It is on its way.", "intent": None},
    ]
    key = content_hash(messages)  # type: ignore[arg-type]
    return {
        "conversation_id": f"conversation-{number}",
        "channel": "web",
        "language": "en",
        "intent": messages[0]["intent"],
        "messages": messages,
        "content_hash": key,
        "split": split_of(key, 0.5),
        "source": "file:///in.jsonl",
        "position": number,
    }


def rows(numbers: Sequence[int], again: int = 0) -> pa.Table:
    return pa.Table.from_pylist([row(number, again) for number in numbers], schema=SCHEMA)


def stage(table: Table, content: pa.Table, name: str) -> str:
    """Rows as a data file that nobody sees yet, written as ingestion writes them; returns its URI."""
    with DataFile(Target.of(table), name) as file:
        file.write(content)
    return file.uri


def add(
    config: Config, numbers: Sequence[int], again: int = 0, name: str | None = None, **about: str
) -> TableVersion:  # fmt: skip
    table = tables.open_table(config.storage, name or config.ingestion.table, SCHEMA)
    files = [stage(table, rows(numbers, again), tables.fresh_name())] if numbers else []
    said = {f"rayloop.{key}": value for key, value in about.items()}
    return TableVersion(name or config.ingestion.table, tables.append(table, files, said))


def ids(config: Config, version: TableVersion) -> list[str]:
    return sorted(tables.read_local(config, version, ["conversation_id"])["conversation_id"].to_pylist())


def table_of(config: Config) -> Any:
    return tables.open_table(config.storage, config.ingestion.table)


def trained_on(config: Config, version: TableVersion) -> ModelVersion:
    """A model version of a real registry, registered as training does."""
    root = Path(config.storage.uri)
    if not (root / "mlflow.db").exists():
        root.mkdir(parents=True, exist_ok=True)
        (root / "mlflow.db").write_bytes(_empty_registry())
    registry = Registry(config)
    run_id = registry.start_run("train", {}, {})
    tags = {"rayloop.table": version.table, "rayloop.snapshot_id": str(version.snapshot_id)}
    return registry.register(run_id, str(root / "models" / run_id), {"rayloop.stage": "train", **tags})


@functools.cache
def _empty_registry() -> bytes:
    """MLflow's SQLite file as it is when it is new: making one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config().with_overrides({"storage.uri": folder})
        Registry(config).start_run("train", {}, {})
        return (Path(folder) / "mlflow.db").read_bytes()
