"""`jobs.versions`, `jobs.maintain`, `jobs.export` and `jobs.forget` as a user runs them: exit code and last line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import tables
from app.config import Config
from jobs import export, forget, maintain, versions
from tests import forgettable
from tests.forgettable import GONE, STAY, traces
from tests.table_rows import add, ids, trained_on

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def config(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store})


@pytest.fixture
def run(store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a job; gives its exit code and its last line. The error stands on stderr too."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"storage": {"uri": store}}))

    def run(job: Any, *settings: str, dry_run: bool = False) -> tuple[int, dict[str, Any]]:
        arguments = ["--config", str(file), *(part for setting in settings for part in ("--set", setting))]
        code = job.JOB.main([*arguments, *(["--dry-run"] if dry_run else [])])
        out, err = capfd.readouterr()
        line: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert set(line) == {"stage", "status", "inputs", "outputs", "figures", "seconds", "error"}
        assert (line["error"] is None) == (code == 0)
        assert line["error"] is None or line["error"] in err
        return code, line

    return run


def files(store: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(store).rglob("*") if path.is_file()}


# --- versions ---


def test_versions_are_listed(run: Run, config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    code, line = run(versions)
    assert (code, line["stage"], line["status"]) == (0, "versions", "done")
    assert line["outputs"]["table"] == {"table": "support.conversations", "snapshot_id": second.snapshot_id}
    assert [entry["snapshot_id"] for entry in line["figures"]["versions"]] == [first.snapshot_id, second.snapshot_id]
    assert [entry["rows"] for entry in line["figures"]["versions"]] == [1, 2]


def test_a_version_is_tagged_moved_and_untagged(run: Run, config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    tag = ("versions.action=tag", "versions.tag=train-2026-11")
    code, line = run(versions, *tag, f"versions.version={first.snapshot_id}")
    assert (code, line["status"], line["figures"]) == (0, "done", {"tag": "train-2026-11"})
    assert tables.resolve(config, "train-2026-11") == first
    assert run(versions, *tag, f"versions.version={first.snapshot_id}")[1]["status"] == "up_to_date"
    code, line = run(versions, *tag)
    assert (code, line["status"]) == (1, "failed")
    assert line["error"] == (
        f"tag 'train-2026-11' of table support.conversations names {first.snapshot_id}: "
        "set versions.move=true to move it"
    )
    assert run(versions, *tag, "versions.move=true")[0] == 0
    assert tables.resolve(config, "train-2026-11") == second
    code, line = run(versions, "versions.action=delete_tag", "versions.tag=train-2026-11")
    assert (code, line["outputs"]["table"]["snapshot_id"]) == (0, second.snapshot_id)
    code, line = run(versions, "versions.action=delete_tag", "versions.tag=train-2026-11")
    assert (code, line["error"]) == (1, "table support.conversations has no version tagged 'train-2026-11': tags: none")


def test_going_back_to_a_tag(run: Run, config: Config) -> None:
    first, second = add(config, [1]), add(config, [2])
    run(versions, "versions.action=tag", "versions.tag=clean", f"versions.version={first.snapshot_id}")
    back = ("versions.action=rollback", "versions.version=clean")
    code, line = run(versions, *back)
    assert (code, line["status"], line["figures"]) == (0, "done", {"before": second.snapshot_id})
    assert tables.latest(config) == first
    assert run(versions, *back)[1]["status"] == "up_to_date"


def test_two_versions_are_compared_and_the_earlier_one_is_the_default(run: Run, config: Config) -> None:
    first = add(config, [1])
    add(config, [2, 3])
    code, line = run(versions, "versions.action=diff")
    assert code == 0
    assert (line["figures"]["added"], line["figures"]["removed"], line["figures"]["changed"]) == (2, 0, 0)
    assert line["inputs"]["old"]["snapshot_id"] == first.snapshot_id
    assert Path(line["outputs"]["report"]).read_text().startswith("<!doctype html>")
    code, line = run(versions, "versions.action=diff", f"versions.version={first.snapshot_id}")
    assert code == 1
    assert line["error"].endswith("is the first of its history: name another version as versions.old")


@pytest.mark.parametrize(
    "settings",
    [
        ("versions.action=tag", "versions.tag=x"),
        ("versions.action=rollback", "versions.version=first"),
        ("versions.action=diff", "versions.old=first"),
        ("versions.action=delete_tag", "versions.tag=first"),
    ],
)
def test_a_dry_run_of_versions_changes_no_file(run: Run, config: Config, store: str, settings: tuple[str, ...]) -> None:
    first = add(config, [1])
    add(config, [2])
    run(versions, "versions.action=tag", "versions.tag=first", f"versions.version={first.snapshot_id}")
    before = files(store)
    code, line = run(versions, *settings, dry_run=True)
    assert (code, line["outputs"]) == (0, {})
    assert line["figures"]["plan"]["action"] == settings[0].partition("=")[2]
    assert files(store) == before


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (("versions.version=claen",), 1, "table support.conversations has no version tagged 'claen': tags: clean"),
        (("versions.version=42",), 1, "support.conversations@42 does not exist: newest snapshots: "),
        (("versions.table=support.none",), 1, "no table support.none under "),
        (("versions.table=none",), 2, "'none' is not a table name: write it as namespace.name"),
        (("versions.acton=tag",), 2, "versions.acton is not a setting; did you mean 'action'?"),
        (("versions.action=drop",), 2, "versions.action: "),
        (("versions.action=tag",), 2, "tag needs `tag`"),
        (("versions.action=rollback",), 2, "rollback needs `version`, a snapshot id or a tag"),
        (("versions.action=tag", "versions.tag=Big Tag"), 2, "versions.tag: "),
        (("versions.action=tag", "versions.tag=main"), 2, "'main' is not a tag's name"),
    ],
)
def test_what_is_wrong_with_versions_is_said(
    run: Run, config: Config, settings: tuple[str, ...], code: int, said: str
) -> None:  # fmt: skip
    add(config, [1])
    run(versions, "versions.action=tag", "versions.tag=clean")
    found, line = run(versions, *settings)
    assert said in line["error"]
    assert (found, line["status"]) == (code, "failed")


# --- maintain ---


def test_maintenance_says_what_each_step_did(run: Run, config: Config, store: str) -> None:
    made = [add(config, [number]) for number in range(10)]
    kept = trained_on(config, made[2])
    settings = ("maintenance.expire_days=1e-9", "maintenance.keep_versions=1", "maintenance.orphan_hours=1e-9")
    before = files(store)
    code, line = run(maintain, *settings, dry_run=True)
    assert code == 0
    assert files(store) == before
    assert [step["step"] for step in line["figures"]["plan"]["steps"]] == [
        "compact", "expire", "orphans", "leftovers",
    ]  # fmt: skip
    code, line = run(maintain, *settings)
    assert (code, line["status"]) == (0, "done")
    compact, expire, orphans, _ = line["figures"]["steps"]
    assert (compact["files_before"], compact["files_after"]) == (10, 1)
    assert sorted(expire["expired"]) == sorted(v.snapshot_id for v in made if v != made[2])
    assert expire["held"][str(made[2].snapshot_id)] == [f"model {kept}"]
    assert expire["bytes_freed"] > 0
    assert orphans["table"] == "support.conversations"
    assert line["outputs"]["tables"] == {"support.conversations": tables.latest(config).snapshot_id}
    assert ids(config, made[2]) == [f"conversation-{number}" for number in range(3)]


def test_a_named_table_that_is_missing_is_an_error_although_another_is_there(run: Run, config: Config) -> None:
    add(config, [1])
    code, line = run(maintain, "maintenance.tables=[support.conversations, support.conversation]")
    assert (code, line["status"]) == (1, "failed")
    assert "no table support.conversation under" in line["error"]


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("ingestion.table=support.none", 1, "no table support.none under "),
        ("maintenance.expire_day=3", 2, "maintenance.expire_day is not a setting; did you mean 'expire_days'?"),
        ("maintenance.steps=[compact, vacuum]", 2, "maintenance.steps"),
        ("maintenance.orphan_hours=0", 2, "maintenance.orphan_hours"),
    ],
)
def test_what_is_wrong_with_maintenance_is_said(run: Run, config: Config, setting: str, code: int, said: str) -> None:
    add(config, [1])
    found, line = run(maintain, setting)
    assert said in line["error"]
    assert found == code


# --- export ---


def test_an_export_is_made_once_and_again_when_a_file_is_damaged(run: Run, config: Config, tmp_path: Path) -> None:
    add(config, range(20))
    settings = (f"export.uri={tmp_path}/out", "export.format=jsonl")
    code, line = run(export, *settings, dry_run=True)
    assert (code, line["figures"]["plan"]["rows"], line["figures"]["plan"]["there"]) == (0, 20, False)
    assert not (tmp_path / "out").exists()
    code, line = run(export, *settings)
    assert (code, line["status"], line["figures"]["rows"], line["figures"]["files"]) == (0, "done", 20, 1)
    assert line["outputs"]["uri"] == f"{tmp_path}/out"
    assert line["figures"]["bytes"] == (tmp_path / "out" / "part-00000.jsonl").stat().st_size
    assert run(export, *settings)[1]["status"] == "up_to_date"
    (tmp_path / "out" / "part-00000.jsonl").write_text("damaged")
    code, line = run(export, *settings)
    assert (code, line["status"]) == (1, "failed")
    assert "part-00000.jsonl is missing or not as _SUCCESS says: delete _SUCCESS there" in line["error"]
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert run(export, *settings)[1]["status"] == "done"
    assert run(export, *settings)[1]["status"] == "up_to_date"


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("export.version=clean", 1, "has no version tagged 'clean': tags: none"),
        ("export.table=support.none", 1, "no table support.none under "),
        ("export.format=csv", 2, "export.format: "),
        ("export.columns=[conversation_id, mood]", 2, "table support.conversations has no column mood: columns: "),
        ("export.uri=ftp://host/out", 1, "cannot open 'ftp://host/out'"),
        ("export.folder=x", 2, "export.folder is not a setting; "),
    ],
)
def test_what_is_wrong_with_an_export_is_said(run: Run, config: Config, setting: str, code: int, said: str) -> None:
    add(config, [1])
    found, line = run(export, setting)
    assert said in line["error"]
    assert found == code


# --- forget ---


def test_forget_tells_lines_and_never_ids(run: Run, store: str, tmp_path: Path) -> None:
    made = forgettable.make(store)
    file = tmp_path / "ids.txt"
    # As an editor on Windows writes it, with a byte order mark.
    file.write_text("\r\n".join([GONE[0], "", "nobody-1", *GONE[1:], " nobody-2 "]), encoding="utf-8-sig")
    settings = (f"forget.ids_uri={file}", "maintenance.orphan_hours=1e-9")
    before = files(store)
    code, line = run(forget, *settings, dry_run=True)
    assert (code, files(store)) == (0, before)
    assert [entry["rows"] for entry in line["figures"]["plan"]["tables"]] == [4, 2]
    code, line = run(forget, *settings)
    assert (code, line["status"], line["inputs"]["conversations"]) == (0, "done", 6)
    assert line["figures"]["unknown_lines"] == [3, 7]
    assert line["figures"]["tables"][0]["models"] == [str(made.model)]
    assert traces(store) == {}, "not in the receipt either"
    assert not any(identity in json.dumps(line) for identity in (*GONE, "nobody"))
    assert ids(made.config, tables.latest(made.config)) == STAY
    code, line = run(forget, *settings)
    assert (code, line["status"]) == (0, "up_to_date")
    assert line["figures"]["unknown_lines"] == [1, 3, 4, 5, 6, 7]


def test_what_is_wrong_with_forget_is_said(run: Run, config: Config, tmp_path: Path) -> None:
    add(config, [1])
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for settings, code, said in (
        ((), 2, "forget.ids_uri is not set: name a file with one conversation id a line"),
        ((f"forget.ids_uri={tmp_path}/none.txt",), 2, "cannot read forget.ids_uri="),
        ((f"forget.ids_uri={tmp_path}/empty.txt",), 2, "holds no id: give one conversation id a line"),
        ((f"forget.ids_uri={tmp_path}/binary",), 2, "give one id a line, in UTF-8"),
        (("forget.id=1",), 2, "forget.id is not a setting; allowed here: ids_uri"),
    ):
        found, line = run(forget, *settings)
        assert said in line["error"]
        assert found == code
    (tmp_path / "ids.txt").write_text("conversation-9")
    code, line = run(forget, f"forget.ids_uri={tmp_path}/ids.txt", "ingestion.table=support.none")
    assert (code, line["status"]) == (1, "failed")
    assert "no table support.none under" in line["error"]
