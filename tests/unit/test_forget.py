import json
from pathlib import Path

import pyarrow as pa
import pytest

from app import export, table_versions, tables
from app.config import Config
from app.conversation import id_hash
from app.errors import RegistryError, TableChanged, TableError
from app.forget import Outcome, forget
from app.ingestion.quarantine import QUARANTINE
from app.registry import Registry
from app.serving.conversations import Conversations, Turn
from app.settings.tables import ExportConfig
from app.storage import Storage
from app.table_maintenance import expire
from app.versions import TableVersion, as_json
from tests import forgettable
from tests.forgettable import GONE, SETTINGS, STAY, Forgettable, traces
from tests.table_rows import add, ids, rows, stage, table_of, text


@pytest.fixture
def made(store: str) -> Forgettable:
    return forgettable.make(store)


def quarantined(config: Config) -> list[int]:
    version = tables.resolve(config, None, config.ingestion.quarantine_table)
    table = tables.open_table(config.storage, version.table)
    found: list[int] = table.scan(snapshot_id=version.snapshot_id).to_arrow()["position"].to_pylist()
    return sorted(found)


def test_what_is_to_go_is_there_and_can_be_found(made: Forgettable, store: str) -> None:
    """Or the tests below would prove nothing."""
    found = traces(store)
    assert {each for names in found.values() for each in names} == {*GONE, *(text(n) for n in forgettable.NUMBERS)}
    assert {name.rpartition(".")[2] for name in found} >= {"parquet", "avro"}
    assert len([name for name in found if name.endswith(".parquet")]) == 6


def test_forgotten_conversations_are_gone_from_every_version_and_from_the_disk(made: Forgettable, store: str) -> None:
    config = made.config
    outcome = forget(config, GONE, SETTINGS)
    assert traces(store) == {}
    assert ids(config, tables.latest(config)) == STAY
    assert quarantined(config) == [3, 4, 5], "the id within a longer one, and the text of another, stay"
    conversations, quarantine = outcome.tables
    assert (conversations.table, conversations.rows, conversations.files) == ("support.conversations", 4, 5)
    assert (quarantine.rows, quarantine.files) == (2, 1)
    assert outcome.unknown == []
    assert not list((Path(store) / "forgetting").glob("*")), "no journal is left"
    assert not [name for name in table_of(config).refs() if name.startswith("rayloop-")]


def test_tags_lead_to_what_is_left_of_their_version(made: Forgettable) -> None:
    config = made.config
    outcome = forget(config, GONE, SETTINGS)
    now = tables.resolve(config, "raw")
    assert now != made.raw
    assert ids(config, now) == [identity for identity in STAY if identity < "conversation-110"]
    assert outcome.tables[0].rewritten.tags == {"raw": (made.raw.snapshot_id, now.snapshot_id)}
    assert made.raw.snapshot_id in outcome.tables[0].expired


def test_what_a_model_was_trained_on_can_still_be_read_by_its_old_id(made: Forgettable) -> None:
    config = made.config
    forget(config, GONE, SETTINGS)
    assert ids(config, made.learned) == [identity for identity in STAY if identity < "conversation-120"]
    assert tables.exists(config, made.learned)
    assert ids(config, made.current) == STAY
    assert not tables.exists(config, made.free), "nothing held it"
    listed = {entry.snapshot_id: entry.models for entry in table_versions.versions(config)}
    assert [str(made.model)] in listed.values()


def test_rows_that_stay_are_the_same_and_so_is_what_is_said_of_the_version(made: Forgettable) -> None:
    config = made.config
    before = tables.read_local(config, made.current).to_pylist()
    forget(config, GONE, SETTINGS)
    latest = tables.latest(config)
    assert tables.read_local(config, latest).to_pylist() == [
        row for row in before if row["conversation_id"] not in GONE
    ]  # fmt: skip
    said = tables.summary(config, latest)
    assert said["rayloop.marks"] == "m-3.json", "sources are not read again"
    assert said["rayloop.maintenance"] == "forget"
    assert tables.rows(config, latest) == len(STAY)


def test_models_that_learned_from_them_are_listed_and_marked(made: Forgettable) -> None:
    outcome = forget(made.config, GONE, SETTINGS)
    assert outcome.tables[0].models == [str(made.model)]
    assert outcome.out_of_reach["models"]["what"] == [str(made.model)]
    registry = Registry(made.config)
    assert registry.tags(made.model)["rayloop.forgotten"].endswith("up to 4 conversations it was trained on")
    assert "rayloop.forgotten" not in registry.tags(made.other_model)


def test_a_model_that_never_saw_them_is_not_marked(made: Forgettable) -> None:
    outcome = forget(made.config, ["conversation-125"], SETTINGS)
    assert outcome.tables[0].models == []
    assert "rayloop.forgotten" not in Registry(made.config).tags(made.model)
    assert ids(made.config, made.learned) == [f"conversation-{number}" for number in range(100, 120)]
    assert tables.resolve(made.config, "raw") == made.raw, "its files have no such row, so it stays as it is"


def test_a_dry_run_finds_the_same_and_changes_nothing(made: Forgettable, store: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(store).rglob("*") if path.is_file()}
    said = forget(made.config, GONE, SETTINGS, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in Path(store).rglob("*") if path.is_file()} == before
    done = forget(made.config, GONE, SETTINGS)

    def figures(outcome: Outcome) -> list[tuple[object, ...]]:
        return [(each.table, each.rows, each.files, each.models) for each in outcome.tables]

    assert figures(said) == figures(done)
    for planned, made_so in zip(said.tables, done.tables, strict=True):
        assert set(planned.expired) <= set(made_so.expired)
        assert planned.rewritten.held.keys() == made_so.rewritten.replaced.keys()


def test_forgetting_again_finds_nothing(made: Forgettable) -> None:
    forget(made.config, GONE, SETTINGS)
    latest = tables.latest(made.config)
    again = forget(made.config, GONE, SETTINGS)
    assert sorted(again.unknown) == sorted(GONE)
    assert [(each.rows, each.files, each.deleted) for each in again.tables] == [(0, 0, 0)] * 2
    assert tables.latest(made.config) == latest


def test_ids_that_no_version_has_are_told(made: Forgettable) -> None:
    outcome = forget(made.config, ["conversation-103", "conversation-1", "CONVERSATION-110"], SETTINGS)
    assert outcome.unknown == ["CONVERSATION-110", "conversation-1"]
    assert "conversation-110" in ids(made.config, tables.latest(made.config))


def test_a_later_customer_is_forgotten_from_versions_that_stand_for_others(made: Forgettable, store: str) -> None:
    config = made.config
    forget(config, GONE[:1], SETTINGS)
    forget(config, GONE[1:], SETTINGS)
    assert traces(store) == {}
    assert ids(config, made.learned) == [identity for identity in STAY if identity < "conversation-120"]
    registry = Registry(config)
    assert "rayloop.forgotten" in registry.tags(made.model)


def test_what_a_rollback_left_behind_is_forgotten_too(made: Forgettable, store: str) -> None:
    config = made.config
    table_versions.rollback(config, made.raw)
    outcome = forget(config, GONE, SETTINGS)
    assert traces(store) == {}
    assert outcome.tables[0].rows == 1
    assert ids(config, tables.latest(config)) == [identity for identity in STAY if identity < "conversation-110"]


def test_other_engines_branches_are_moved(made: Forgettable, store: str) -> None:
    config = made.config
    table_of(config).manage_snapshots().create_branch(made.free.snapshot_id, "audit").commit()
    forget(config, GONE, SETTINGS)
    assert traces(store) == {}
    branch = TableVersion(config.ingestion.table, table_of(config).refs()["audit"].snapshot_id)
    assert ids(config, branch) == [identity for identity in STAY if identity < "conversation-130"]
    assert table_of(config).refs()["audit"].snapshot_ref_type == "branch"


def test_a_version_of_which_nothing_is_left_is_empty(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, [103])
    table_versions.tag(config, tables.latest(config), "one")
    forget(config, ["conversation-103"], SETTINGS)
    assert ids(config, tables.latest(config)) == []
    assert ids(config, tables.resolve(config, "one")) == []
    assert traces(store) == {}


def test_ingestion_and_maintenance_go_on_after_it(made: Forgettable) -> None:
    config = made.config
    forget(config, GONE, SETTINGS)
    add(config, [200, 201])
    assert ids(config, tables.latest(config)) == [*STAY, "conversation-200", "conversation-201"]
    done = expire(config, table_of(config), SETTINGS.model_copy(update={"expire_days": 1e-9, "keep_versions": 0}))
    assert any("model" in reason for reasons in done.held.values() for reason in reasons)
    assert ids(config, made.learned) == [identity for identity in STAY if identity < "conversation-120"]


def test_an_append_prepared_before_it_goes_on_top(made: Forgettable) -> None:
    config = made.config
    writer = table_of(config)
    file = stage(writer, rows([200]), "prepared")
    forget(config, GONE, SETTINGS.model_copy(update={"orphan_hours": 24.0}))
    tables.append(writer, [file], {})
    assert ids(config, tables.latest(config)) == [*STAY, "conversation-200"]
    late = table_of(config)
    file = stage(late, rows([201]), "late")
    add(config, [202])
    forget(config, ["conversation-202"], SETTINGS.model_copy(update={"orphan_hours": 24.0}))
    with pytest.raises(TableChanged, match="run the job again"):
        tables.append(late, [file], {})


def test_a_file_that_an_ingest_may_still_commit_is_told(made: Forgettable, store: str) -> None:
    config = made.config
    staged = stage(table_of(config), rows([103, 200]), "running")
    outcome = forget(config, GONE, SETTINGS.model_copy(update={"orphan_hours": 24.0}))
    assert outcome.tables[0].staged == [staged]
    assert outcome.out_of_reach["staged"]["what"] == [staged]
    assert list(traces(store)) == [staged.removeprefix(f"file://{store}/")]
    assert forget(config, GONE, SETTINGS).tables[0].staged == []
    assert traces(store) == {}, "it was too old to be committed"


def test_places_that_still_tell_of_them_are_named(made: Forgettable) -> None:
    config = made.config
    settings = ExportConfig(version=made.free.snapshot_id)
    uri, *_ = export.export(config, settings)
    storage = Storage(config.storage.uri)
    storage.write(
        b'{"conversation_id": "conversation-103"}\n{"conversation_id": "conversation-1030"}\n', "traffic", "a"
    )
    storage.write(f"<td>{text(110)}</td>".encode(), "reports", "ingest", "report.html")
    remembered = Conversations(storage, 60.0)
    for conversation_id in ("conversation-103", "conversation-1030"):
        turn = Turn("web", conversation_id, 0, ({"role": "user", "content": "hi"},))
        with remembered.going_on(turn) as said:
            remembered.add(turn, said, {"role": "assistant", "content": "hello"})
    storage.write(json.dumps({"question": text(110)}).encode(), "handovers", "open", "r.json")
    outcome = forget(config, GONE, SETTINGS)
    told = {name: entry["what"] for name, entry in outcome.out_of_reach.items()}
    assert told["exports"] == [uri]
    kept = [name for name in told["files"] if name.startswith("serving/conversations/")]
    assert len(kept) == 1
    assert told["files"] == {"traffic/a": 1, "reports/ingest/report.html": 1, "handovers/open/r.json": 1, kept[0]: 1}
    assert told["sources"] == {"file:///in.jsonl": 4}
    assert all(entry["remedy"] for entry in outcome.out_of_reach.values())


def test_tokens_made_of_versions_that_are_gone_go_with_them(made: Forgettable, store: str) -> None:
    storage = Storage(store)
    others = {"table": "support.others", "snapshot_id": made.free.snapshot_id}
    of = {"gone": as_json(made.free), "trained": as_json(made.learned), "others": others, "pairs": None}
    for name, table in of.items():
        manifest = {"folder": "x"} | ({} if table is None else {"table": table})
        storage.write(json.dumps(manifest).encode(), "packed", name, "packed.json")
        storage.write(b"tokens", "packed", name, "x", "blocks", "0.parquet")
    storage.write(b"tokens", "packed", "being made", "x", "blocks", "0.parquet")
    planned = forget(made.config, GONE, SETTINGS, dry_run=True)
    assert storage.list("packed") == sorted([*of, "being made"])
    outcome = forget(made.config, GONE, SETTINGS)
    assert outcome.packs == planned.packs == ["gone", "pairs", "trained"]
    assert storage.list("packed") == ["being made", "others"]
    assert outcome.out_of_reach["nodes"]["what"] == outcome.packs


def test_a_refused_record_is_found_by_its_id_whatever_is_left_of_its_text(made: Forgettable, store: str) -> None:
    quarantine = tables.open_table(made.config.storage, made.config.ingestion.quarantine_table)
    row = {
        "source": "file:///in.jsonl", "position": 9, "reason": "too_long_message", "detail": "", "raw": '{"a": [',
        "raw_bytes": 9_000, "refusal_hash": "9" * 64, "id_hash": id_hash(GONE[0]),
    }  # fmt: skip
    content = pa.Table.from_pylist([row, row | {"position": 10, "id_hash": id_hash("another")}], schema=QUARANTINE)
    tables.append(quarantine, [stage(quarantine, content, "by-id")], {})
    forget(made.config, GONE, SETTINGS)
    quarantine.refresh()
    assert 10 in (left := quarantine.scan().to_arrow()["position"].to_pylist())
    assert 9 not in left


def test_nothing_is_removed_while_the_registry_cannot_be_asked(made: Forgettable, store: str) -> None:
    before = traces(store)
    (Path(store) / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError, match="the model registry cannot be asked"):
        forget(made.config, GONE, SETTINGS)
    assert traces(store) == before


def test_a_quarantine_table_that_cannot_be_read_is_not_passed_over(made: Forgettable, store: str) -> None:
    quarantine = tables.open_table(made.config.storage, made.config.ingestion.quarantine_table)
    Path(quarantine.metadata_location.removeprefix("file://")).unlink()
    with pytest.raises(TableError, match=r"support\.quarantine has lost its files"):
        forget(made.config, GONE, SETTINGS)
    assert set(GONE) <= set(ids(made.config, tables.latest(made.config)))


def test_without_a_table_there_is_nothing_to_forget(store: str) -> None:
    config = Config().with_overrides({"storage.uri": store})
    with pytest.raises(TableError, match=r"no table support\.conversations"):
        forget(config, ["conversation-1"], SETTINGS)
    add(config, [103])
    assert forget(config, ["conversation-103"], SETTINGS).tables[0].rows == 1, "no quarantine table is needed"
