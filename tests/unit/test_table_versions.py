from pathlib import Path

import pytest

from app import table_versions, tables
from app.config import Config
from app.errors import ConfigError, RegistryError, TableChanged, TableError
from app.registry import Registry
from app.table_versions import delete_tag, held, rollback, tag, versions
from app.versions import TableVersion
from tests.table_rows import add, ids, stage, table_of, trained_on


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


def test_a_tag_names_its_version_whatever_is_added(config: Config) -> None:
    first = add(config, range(3))
    assert tag(config, first, "train-2026-11")
    add(config, [3, 4])
    assert tables.resolve(config, "train-2026-11") == first
    assert ids(config, tables.resolve(config, "train-2026-11")) == [f"conversation-{number}" for number in range(3)]
    assert not tag(config, first, "train-2026-11"), "it was there already"


def test_a_tag_is_moved_only_when_that_is_asked_for(config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    tag(config, first, "clean")
    with pytest.raises(TableError, match=rf"tag 'clean' .* names {first.snapshot_id}: set versions\.move=true"):
        tag(config, second, "clean")
    assert tables.resolve(config, "clean") == first
    assert tag(config, second, "clean", move=True)
    assert tables.resolve(config, "clean") == second


def test_a_deleted_tag_leaves_its_version(config: Config) -> None:
    first = add(config, [1])
    add(config, [2])
    tag(config, first, "raw")
    assert delete_tag(config, "raw") == first
    assert ids(config, first) == ["conversation-1"]
    with pytest.raises(TableError, match=r"has no version tagged 'raw': tags: none"):
        tables.resolve(config, "raw")
    with pytest.raises(TableError, match="has no version tagged 'raw'"):
        delete_tag(config, "raw")


@pytest.mark.parametrize("name", ["", "Main", "main", "4711", "a b", "a/b", "x" * 65, "é"])
def test_a_name_that_would_be_mistaken_is_no_tag(config: Config, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a tag's name: use up to 64"):
        tag(config, add(config, [1]), name)


def test_a_branch_of_another_engine_is_not_overwritten(config: Config) -> None:
    first = add(config, [1])
    table_of(config).manage_snapshots().create_branch(first.snapshot_id, "audit").commit()
    with pytest.raises(ConfigError, match="'audit' is a branch"):
        tag(config, first, "audit", move=True)


def test_a_tag_that_another_sets_at_the_same_moment_is_a_clean_error(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    first, second = add(config, [1]), add(config, [2])
    stale = table_of(config)
    tag(config, second, "clean")
    monkeypatch.setattr(table_versions, "open_table", lambda *_: stale)
    with pytest.raises(TableChanged, match=r"changed by another writer meanwhile.* try again"):
        tag(config, first, "clean")
    assert tables.resolve(config, "clean") == second


def test_after_a_rollback_readers_see_the_earlier_version_and_can_go_back(config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    assert rollback(config, first)
    assert tables.latest(config) == first
    assert ids(config, tables.latest(config)) == ["conversation-1"]
    assert ids(config, second) == ["conversation-1", "conversation-2"], "what was left behind can still be read"
    third = add(config, [3])
    assert ids(config, third) == ["conversation-1", "conversation-3"]
    assert rollback(config, second)
    assert ids(config, tables.latest(config)) == ["conversation-1", "conversation-2"]
    assert not rollback(config, second), "it is the current one"


def test_a_rollback_to_what_is_not_there_changes_nothing(config: Config) -> None:
    first = add(config, [1])
    with pytest.raises(TableError, match=r"support\.conversations@42 does not exist: newest snapshots"):
        rollback(config, TableVersion(first.table, 42))
    assert tables.latest(config) == first


def test_an_append_prepared_before_a_rollback_is_refused(config: Config) -> None:
    first = add(config, [1])
    add(config, [2])
    writer = table_of(config)
    file = stage(writer, tables.read_local(config, first), "prepared")
    rollback(config, first)
    with pytest.raises(TableChanged):
        tables.append(writer, [file], {})
    assert tables.latest(config) == first


def test_the_list_tells_of_each_version(config: Config) -> None:
    first, second = add(config, [1, 2], note="one"), add(config, [3])
    model = trained_on(config, first)
    tag(config, first, "raw")
    rollback(config, first)
    one, two = versions(config)
    assert (one.snapshot_id, two.snapshot_id) == (first.snapshot_id, second.snapshot_id)
    assert (one.rows, two.rows) == (2, 3)
    assert (one.parent_id, two.parent_id) == (None, first.snapshot_id)
    assert (one.current, two.current) == (True, False)
    assert (one.tags, two.tags) == (["raw"], [])
    assert (one.models, two.models) == ([str(model)], [])
    assert one.summary == {"rayloop.note": "one"}
    assert one.made_at <= two.made_at
    assert one.made_at.endswith("+00:00")


def test_what_holds_a_version_is_told(config: Config) -> None:
    first, second, third, fourth = (add(config, [number]) for number in range(4))
    tag(config, first, "raw")
    model = trained_on(config, second)
    found = held(config, table_of(config))
    assert found == {
        first.snapshot_id: ["tag raw"],
        second.snapshot_id: [f"model {model}"],
        fourth.snapshot_id: ["current"],
    }
    assert third.snapshot_id not in found


def test_versions_down_to_the_newest_with_marks_are_held(config: Config) -> None:
    add(config, [0])
    marked, later = add(config, [1], marks="marks.json"), add(config, [2])
    found = held(config, table_of(config))
    assert found == {
        marked.snapshot_id: ["says how far the sources were read"],
        later.snapshot_id: ["says how far the sources were read", "current"],
    }


def test_a_registry_that_cannot_be_asked_is_not_taken_for_an_empty_one(config: Config) -> None:
    add(config, [1])
    (Path(config.storage.uri) / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError, match="cannot be asked"):
        held(config, table_of(config))


def test_asking_for_versions_makes_no_registry(config: Config) -> None:
    add(config, [1])
    versions(config)
    assert not (Path(config.storage.uri) / "mlflow.db").exists()


def test_a_model_learned_from_what_its_base_model_learned_from(config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    base = trained_on(config, first)
    adapted = trained_on(config, second)
    compressed = trained_on(config, second)
    registry = Registry(config)
    registry.tag_version(adapted, "rayloop.base_model", f"{base.model}/{base.version}")
    registry.tag_version(compressed, "rayloop.parent", adapted.version)
    learned = set(table_versions.trained(config))
    assert learned == {(base, first), (adapted, first), (adapted, second), (compressed, first), (compressed, second)}
