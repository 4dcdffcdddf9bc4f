"""Versions as Ray Data streams them: time travel across added columns, forgotten rows, and a catalog on a server."""

from pathlib import Path

import pyarrow as pa

from app import table_versions, tables
from app.config import Config
from app.conversation import SCHEMA
from app.forget import forget
from app.settings.tables import MaintenanceConfig
from app.versions import TableVersion
from tests.conftest import RunningCluster
from tests.servers import postgres
from tests.table_rows import add, ids, rows, stage


def test_a_version_from_before_a_column_has_nulls_in_it(cluster: RunningCluster, store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    before = pa.schema([field for field in SCHEMA if field.name not in ("masked", "minhash")])
    table = tables.open_table(config.storage, config.ingestion.table, before)
    tables.append(table, [stage(table, rows(range(20)).select(before.names), "before")], {})
    old = tables.latest(config)
    new = add(config, range(20, 40))
    for version, count in ((old, 20), (new, 40)):
        found = tables.read(config, version).take_all()
        assert sorted(row["position"] for row in found) == list(range(count))
        assert {row["masked"] for row in found} == {None}
        assert set(found[0]) == set(SCHEMA.names)
        local = tables.read_local(config, version, ["position"], "train")["position"].to_pylist()
        part = tables.read(config, version, ["position", "masked"], "train").take_all()
        assert sorted(row["position"] for row in part) == sorted(local)
        assert 0 < len(part) < count


def test_a_forgotten_version_is_streamed_by_its_old_id_and_tag(cluster: RunningCluster, tmp_path: Path) -> None:
    with postgres.start(tmp_path) as uri:
        config = Config().with_overrides({"storage.uri": str(tmp_path / "store"), "storage.catalog_uri": uri})
        old = add(config, range(100, 110))
        table_versions.tag(config, old, "train-2026-11")
        add(config, range(110, 120))
        forget(config, ["conversation-103"], MaintenanceConfig(orphan_hours=1e-9))
        for version in (old, tables.resolve(config, "train-2026-11")):
            assert _streamed(config, version) == ids(config, version)
            assert len(_streamed(config, version)) == 9


def _streamed(config: Config, version: TableVersion) -> list[str]:
    found = tables.read(config, version, ["conversation_id"]).take_all()
    return sorted(row["conversation_id"] for row in found)
