import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app import table_maintenance, tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import RegistryError, StageFailed, TableChanged, TableError
from app.settings.tables import MaintenanceConfig
from app.table_files import Manifests, stored, used
from app.table_maintenance import compact, expire, orphans
from app.table_versions import rollback, tag
from app.versions import TableVersion
from tests.table_rows import add, ids, rows, stage, table_of, trained_on

NOW = MaintenanceConfig(expire_days=1e-9, keep_versions=0, orphan_hours=1e-9)
"""Nothing is too young."""
WRITER = """
import sys, time
from app import tables
from app.config import Config
from tests.table_rows import rows, stage, table_of
config = Config().with_overrides({"storage.uri": sys.argv[1]})
for number in (100, 200):
    print(stage(table_of(config), rows(range(number, number + 50)), f"staged-{number}"), flush=True)
print("staged", flush=True)
time.sleep(60)
"""


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


def files_on_disk(config: Config) -> set[str]:
    return {file.uri for file in stored(table_of(config))}


def data_files(config: Config, version: TableVersion) -> set[str]:
    table = table_of(config)
    snapshot = table.snapshot_by_id(version.snapshot_id)
    assert snapshot is not None
    return set(Manifests(table).data_files(snapshot))


def many(config: Config, count: int = 10) -> list[TableVersion]:
    return [add(config, [2 * number, 2 * number + 1], marks=f"marks-{number}.json") for number in range(count)]


# --- compact ---


def test_compaction_makes_one_file_of_many_and_keeps_every_row(config: Config) -> None:
    before = many(config)
    rows_before = tables.read_local(config, before[-1])
    done = compact(config, table_of(config), MaintenanceConfig())
    after = tables.latest(config)
    assert after.snapshot_id == done.snapshot_id != before[-1].snapshot_id
    assert (done.files_before, done.files_after) == (10, 1)
    assert len(data_files(config, after)) == 1
    assert tables.read_local(config, after) == rows_before
    for number, version in enumerate(before, 1):
        assert tables.read_local(config, version).num_rows == 2 * number, "earlier versions are as they were"
    said = tables.summary(config, after)
    assert said["rayloop.marks"] == "marks-9.json", "sources are not read again"
    assert said["rayloop.maintenance"] == "compact"


def test_few_or_large_files_are_left_as_they_are(config: Config) -> None:
    last = many(config)[-1]
    size_bytes = max(file.size_bytes for file in stored(table_of(config)) if file.uri in data_files(config, last))
    for settings in (MaintenanceConfig(min_small_files=11), MaintenanceConfig(target_file_bytes=size_bytes)):
        done = compact(config, table_of(config), settings)
        assert (done.files_before, done.files_after, done.snapshot_id) == (10, 10, None)
    assert tables.latest(config) == last


def test_files_are_put_together_up_to_the_target_size(config: Config) -> None:
    last = many(config)[-1]
    sizes = [file.size_bytes for file in stored(table_of(config)) if file.uri in data_files(config, last)]
    settings = MaintenanceConfig(target_file_bytes=4 * max(sizes), min_small_files=2)
    done = compact(config, table_of(config), settings)
    assert 2 < done.files_after <= 4
    assert len(data_files(config, tables.latest(config))) == done.files_after
    assert ids(config, tables.latest(config)) == ids(config, last)


def test_a_dry_compaction_changes_no_file(config: Config) -> None:
    many(config)
    before = files_on_disk(config)
    done = compact(config, table_of(config), MaintenanceConfig(), dry_run=True)
    assert (done.files_before, done.files_after, done.snapshot_id) == (10, 1, None)
    assert files_on_disk(config) == before


def test_compaction_and_an_append_at_once_lose_nothing(config: Config) -> None:
    """Whichever is first: the compaction gives way, the append goes on top."""
    many(config)
    compactor, writer = table_of(config), table_of(config)
    mine = stage(writer, rows([100]), "mine")
    tables.append(table_of(config), [stage(compactor, rows([101]), "theirs")], {})
    on_disk = files_on_disk(config)
    with pytest.raises(TableChanged, match="changed by another writer"):
        compact(config, compactor, MaintenanceConfig())
    assert [uri for uri in files_on_disk(config) - on_disk if uri.endswith(".parquet")] == []
    with pytest.raises(TableChanged):
        tables.append(writer, [mine], {})
    writer = table_of(config)
    compact(config, table_of(config), MaintenanceConfig())
    tables.append(writer, [mine], {})
    numbers = sorted(tables.read_local(config, tables.latest(config))["position"].to_pylist())
    assert numbers == [*range(20), 100, 101]


def test_a_damaged_file_stops_the_compaction(config: Config) -> None:
    version = many(config)[-1]
    victim = Path(min(data_files(config, version)).removeprefix("file://"))
    victim.write_bytes(victim.read_bytes()[:-20])
    with pytest.raises(TableError, match=r"a data file of table support\.conversations, cannot be read"):
        compact(config, table_of(config), MaintenanceConfig())
    assert tables.latest(config) == version
    assert not list(victim.parent.glob("*compacted*"))


def test_a_file_with_other_rows_than_the_table_says_stops_the_compaction(config: Config) -> None:
    version = many(config)[-1]
    one, other = sorted(data_files(config, version))[:2]
    stage(table_of(config), rows([1, 2, 3]), Path(one).stem)
    assert other
    with pytest.raises(StageFailed, match=r"10 data files .* hold 21 rows, the table says 20: nothing was changed"):
        compact(config, table_of(config), MaintenanceConfig())
    assert tables.latest(config) == version


@pytest.mark.parametrize("damage", ["gone", "cut short"])
@pytest.mark.parametrize("step", ["compact", "expire", "orphans"])
def test_a_lost_manifest_stops_every_step_before_it_changes_anything(config: Config, damage: str, step: str) -> None:
    version = many(config)[-1]
    snapshot = table_of(config).current_snapshot()
    manifest = Path(snapshot.manifests(table_of(config).io)[0].manifest_path.removeprefix("file://"))
    manifest.unlink() if damage == "gone" else manifest.write_bytes(manifest.read_bytes()[:100])
    before = files_on_disk(config)
    with pytest.raises(TableError, match=r"avro, which says what is in a version of .* cannot be read"):
        table_maintenance.STEPS[step](config, table_of(config), NOW, False)
    assert files_on_disk(config) == before
    assert tables.latest(config) == version


def test_an_empty_table_needs_nothing(config: Config) -> None:
    table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
    for step in table_maintenance.STEPS.values():
        done = step(config, table, NOW, False)
        assert (done.removed, done.expired, done.snapshot_id) == ([], [], None)


# --- expire ---


def test_old_versions_go_with_the_files_that_only_they_need(config: Config) -> None:
    versions = many(config)
    compact(config, table_of(config), MaintenanceConfig())
    current = tables.latest(config)
    before, rows_before = files_on_disk(config), tables.read_local(config, current)
    lost = data_files(config, versions[-1])
    done = expire(config, table_of(config), NOW)
    assert done.expired == [version.snapshot_id for version in versions]
    assert lost <= set(done.removed)
    after = files_on_disk(config)
    assert not set(done.removed) & after
    assert done.bytes_freed > 0
    assert before - after >= lost
    assert tables.latest(config) == current
    assert tables.read_local(config, current) == rows_before
    assert not any(tables.exists(config, version) for version in versions)


@pytest.mark.parametrize("holder", ["tag", "model", "branch"])
def test_what_a_tag_a_model_or_a_branch_holds_stays_readable(config: Config, holder: str) -> None:
    versions = many(config)
    kept = versions[3]
    if holder == "tag":
        tag(config, kept, "train-2026-11")
    elif holder == "branch":
        table_of(config).manage_snapshots().create_branch(kept.snapshot_id, "audit").commit()
    else:
        trained_on(config, kept)
    compact(config, table_of(config), MaintenanceConfig())
    rows_before = tables.read_local(config, kept)
    done = expire(config, table_of(config), NOW)
    assert kept.snapshot_id not in done.expired
    assert len(done.expired) == 9
    assert holder in done.held[kept.snapshot_id][0]
    assert tables.read_local(config, kept) == rows_before
    assert rows_before.num_rows == 8


def test_a_deleted_tag_lets_its_version_go(config: Config) -> None:
    from app.table_versions import delete_tag

    versions = many(config, 3)
    tag(config, versions[0], "raw")
    assert expire(config, table_of(config), NOW).expired == [versions[1].snapshot_id]
    delete_tag(config, "raw")
    assert expire(config, table_of(config), NOW).expired == [versions[0].snapshot_id]


def test_the_version_that_knows_how_far_the_sources_were_read_stays(config: Config) -> None:
    marked, unmarked, last = add(config, [1], marks="m.json"), add(config, [2]), add(config, [3])
    done = expire(config, table_of(config), NOW)
    assert done.expired == []
    assert set(done.held) == {marked.snapshot_id, unmarked.snapshot_id, last.snapshot_id}


def test_young_versions_and_the_newest_stay(config: Config) -> None:
    versions = many(config)
    assert expire(config, table_of(config), MaintenanceConfig()).expired == []
    young = MaintenanceConfig(expire_days=1, keep_versions=0)
    assert expire(config, table_of(config), young).expired == []
    newest = MaintenanceConfig(expire_days=1e-9, keep_versions=4)
    assert expire(config, table_of(config), newest).expired == [version.snapshot_id for version in versions[:6]]


def test_a_dry_expiry_says_the_same_and_removes_nothing(config: Config) -> None:
    many(config)
    compact(config, table_of(config), MaintenanceConfig())
    before = files_on_disk(config)
    said = expire(config, table_of(config), NOW, dry_run=True)
    assert files_on_disk(config) == before
    done = expire(config, table_of(config), NOW)
    assert (said.expired, said.removed, said.bytes_freed) == (done.expired, done.removed, done.bytes_freed)
    assert len(said.expired) == 10


def test_a_rollback_in_the_same_moment_is_not_undone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = many(config, 4)
    real, done_once = table_maintenance.drop, []

    def late(table: Any, snapshot_ids: Any) -> None:
        if not done_once:
            done_once.append(True)
            rollback(config, versions[1])
        real(table, snapshot_ids)

    monkeypatch.setattr(table_maintenance, "drop", late)
    done = expire(config, table_of(config), NOW)
    assert done_once
    assert tables.latest(config) == versions[1]
    assert versions[1].snapshot_id not in done.expired
    assert ids(config, versions[1]) == [f"conversation-{number}" for number in range(4)]


def test_a_tag_set_in_the_same_moment_holds_its_version(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = many(config, 4)
    real, done_once = table_maintenance.drop, []

    def late(table: Any, snapshot_ids: Any) -> None:
        if not done_once:
            done_once.append(True)
            tag(config, versions[1], "just-now")
        real(table, snapshot_ids)

    monkeypatch.setattr(table_maintenance, "drop", late)
    done = expire(config, table_of(config), NOW)
    assert done_once
    assert versions[1].snapshot_id not in done.expired
    assert tables.resolve(config, "just-now") == versions[1]
    assert len(ids(config, versions[1])) == 4


def test_nothing_expires_while_the_registry_cannot_be_asked(config: Config) -> None:
    versions = many(config, 3)
    (Path(config.storage.uri) / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError):
        expire(config, table_of(config), NOW)
    assert all(tables.exists(config, version) for version in versions)


# --- orphans ---


def test_what_a_killed_writer_left_is_listed_and_removed(config: Config, store: str) -> None:
    version = many(config)[-1]
    rows_before, before = tables.read_local(config, version), files_on_disk(config)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert writer.stdout is not None
    left = [writer.stdout.readline().strip() for _ in range(2)]
    assert writer.stdout.readline().strip() == "staged"
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert files_on_disk(config) - before == set(left), "it was killed between writing and committing"
    assert tables.latest(config) == version
    assert tables.read_local(config, version) == rows_before, "nobody saw the rows"

    assert orphans(config, table_of(config), MaintenanceConfig()).removed == [], "they could still be committed"
    listed = orphans(config, table_of(config), NOW, dry_run=True)
    assert sorted(listed.removed) == sorted(left)
    assert listed.bytes_freed == sum(Path(uri.removeprefix("file://")).stat().st_size for uri in left)
    assert files_on_disk(config) - before == set(left)
    assert sorted(orphans(config, table_of(config), NOW).removed) == sorted(left)
    assert files_on_disk(config) == before
    assert tables.read_local(config, version) == rows_before
    assert orphans(config, table_of(config), NOW).removed == []


def test_a_file_that_another_engine_noted_in_its_own_way_is_no_orphan(config: Config) -> None:
    many(config, 2)
    table = table_of(config)
    file = stage(table, rows([100]), "theirs")
    noted = file.replace("file:///", "file:/")  # as Spark does
    tables.append(table, [noted], {})
    assert noted in data_files(config, tables.latest(config))
    assert orphans(config, table_of(config), NOW).removed == []
    assert "conversation-100" in ids(config, tables.latest(config))


@pytest.mark.parametrize("folder", ["My Data", "ünï", "a[b]", "a+b&c=d"])
def test_the_storage_may_be_in_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    config = Config().with_overrides({"storage.uri": str(tmp_path / folder)})
    for number in range(3):
        add(config, [number])
    stage(table_of(config), rows([9]), "left")
    assert compact(config, table_of(config), MaintenanceConfig(min_small_files=2)).files_after == 1
    assert len(expire(config, table_of(config), NOW).expired) == 3
    assert [Path(uri).name for uri in orphans(config, table_of(config), NOW).removed] == ["left.parquet"]
    assert ids(config, tables.latest(config)) == [f"conversation-{number}" for number in range(3)]


def test_the_age_of_an_orphan_decides(config: Config) -> None:
    many(config, 2)
    file = Path(stage(table_of(config), rows([100]), "left").removeprefix("file://"))
    settings = MaintenanceConfig(orphan_hours=24)
    for hours, expected in ((23, 0), (25, 1)):
        then_s = time.time() - hours * 3_600
        os.utime(file, (then_s, then_s))
        assert len(orphans(config, table_of(config), settings, dry_run=True).removed) == expected


def test_what_commits_that_failed_have_left_is_removed_and_every_version_stays(config: Config) -> None:
    versions = many(config, 4)
    tag(config, versions[0], "raw")
    stale = table_of(config)
    add(config, [100])
    with pytest.raises(TableChanged):
        tables.append(stale, [stage(stale, rows([101]), "late")], {})
    late = [uri for uri in files_on_disk(config) if uri.endswith("late.parquet")]
    assert late
    assert orphans(config, table_of(config), NOW).removed == late
    assert [len(ids(config, version)) for version in versions] == [2, 4, 6, 8]
    table = table_of(config)
    assert used(table, Manifests(table)) == files_on_disk(config), "there is what is needed, and nothing else"


def test_a_file_that_is_committed_while_orphans_are_sought_stays(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    many(config, 2)
    writer = table_of(config)
    file = stage(writer, rows([100]), "just-in-time")
    real = table_maintenance.stored

    def listed_then_committed(table: Any) -> Any:
        found = real(table)
        assert file in {entry.uri for entry in found}
        tables.append(writer, [file], {})
        return found

    monkeypatch.setattr(table_maintenance, "stored", listed_then_committed)
    assert file not in orphans(config, table_of(config), NOW).removed
    assert "conversation-100" in ids(config, tables.latest(config))
