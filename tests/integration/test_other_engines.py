"""The tables are Iceberg's own: plain pyiceberg and DuckDB read them without a line of ours."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app import table_versions, tables
from app.config import Config
from app.conversation import SCHEMA
from app.forget import forget
from app.settings.tables import MaintenanceConfig
from app.table_maintenance import compact
from tests.servers.running import installed
from tests.table_rows import add, ids, rows, stage, table_of

SCAN = """
import json, sys
import duckdb
import duckdb_extension_avro, duckdb_extension_iceberg
metadata, snapshot_id = sys.argv[1:]
connection = duckdb.connect()
for module, name in ((duckdb_extension_avro, "avro"), (duckdb_extension_iceberg, "iceberg")):
    folder = module.__path__[0]
    connection.execute(f"LOAD '{folder}/extensions/v{duckdb.__version__}/{name}.duckdb_extension'")
query = f"SELECT conversation_id, messages[1].content FROM iceberg_scan('{metadata}', snapshot_from_id={snapshot_id})"
versions = connection.execute(f"SELECT snapshot_id FROM iceberg_snapshots('{metadata}')").fetchall()
print(json.dumps({"rows": connection.execute(query).fetchall(), "versions": [row[0] for row in versions]}))
"""


@pytest.fixture
def config(store: str) -> Config:
    """A table with three versions by appends, columns that came later, a tag, and a compaction."""
    config = Config().with_overrides({"storage.uri": store})
    before = [name for name in SCHEMA.names if name not in ("masked", "minhash")]
    table = tables.open_table(config.storage, config.ingestion.table, rows([]).select(before).schema)
    tables.append(table, [stage(table, rows(range(10)).select(before), "first")], {})
    table_versions.tag(config, tables.latest(config), "raw")
    add(config, range(10, 20))
    add(config, range(20, 30))
    compact(config, table_of(config), MaintenanceConfig(min_small_files=2))
    return config


def test_plain_pyiceberg_reads_every_version(config: Config, store: str) -> None:
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("rayloop", uri=f"sqlite:///{store}/catalog.db", warehouse=f"file://{store}/tables")
    table = catalog.load_table("support.conversations")
    assert table.scan().to_arrow().num_rows == 30
    raw = table.snapshot_by_name("raw")
    assert raw is not None
    found = table.scan(snapshot_id=raw.snapshot_id, selected_fields=("conversation_id",)).to_arrow()
    assert sorted(found["conversation_id"].to_pylist()) == ids(config, tables.resolve(config, "raw"))
    late = table.scan(row_filter="conversation_id = 'conversation-25'").to_arrow().to_pylist()
    assert [entry["messages"][0]["content"] for entry in late] == ["where is my order 25, asked 0 times before?"]
    assert table.scan().to_arrow()["masked"].null_count == 30


def test_plain_duckdb_reads_the_data_files_of_every_version(config: Config) -> None:
    import duckdb

    for version, expected in ((tables.resolve(config, "raw"), 10), (tables.latest(config), 30)):
        planned = [task.file.file_path for task in table_of(config).scan(snapshot_id=version.snapshot_id).plan_files()]
        query = "SELECT conversation_id, messages[1].content FROM read_parquet($files, union_by_name := true)"
        found = duckdb.execute(query, {"files": [uri.removeprefix("file://") for uri in planned]}).fetchall()
        assert sorted(row[0] for row in found) == ids(config, version)
        assert len(found) == expected
        assert dict(found)["conversation-3"] == "where is my order 3, asked 0 times before?"


def scanned(config: Config, snapshot_id: int) -> dict[str, Any]:
    """What DuckDB's own Iceberg reader finds, in its own environment: PyPI has it for another version than ours."""
    python = installed("duckdb") / "venv" / "bin" / "python"
    metadata = table_of(config).metadata_location.removeprefix("file://")
    run = subprocess.run([python, "-c", SCAN, metadata, str(snapshot_id)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_duckdbs_own_iceberg_reader_reads_every_version(config: Config) -> None:
    for version in (tables.resolve(config, "raw"), tables.latest(config)):
        found = scanned(config, version.snapshot_id)
        assert sorted(row[0] for row in found["rows"]) == ids(config, version)
        assert dict(found["rows"])["conversation-3"] == "where is my order 3, asked 0 times before?"
    assert sorted(found["versions"]) == sorted(entry.snapshot_id for entry in table_versions.versions(config))


def test_other_engines_see_what_was_forgotten_no_more(config: Config) -> None:
    forget(config, ["conversation-3"], MaintenanceConfig(orphan_hours=1e-9))
    for version in (tables.resolve(config, "raw"), tables.latest(config)):
        found = scanned(config, version.snapshot_id)
        assert "conversation-3" not in dict(found["rows"])
        assert sorted(row[0] for row in found["rows"]) == ids(config, version)
    assert not list(Path(config.storage.uri).glob("forgetting/*"))
