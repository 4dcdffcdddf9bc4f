"""`why`, from an answer down to the files and positions that its model learned from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from app import lineage
from app.config import Config
from app.errors import ResponseNotFound
from app.storage import Storage
from app.traffic import TrafficLog, new_response_id, new_writer, now
from app.versions import TableVersion
from app.why import why
from jobs import why as job
from tests.table_rows import add
from tests.traffic_records import exchange
from tests.unit.test_lineage import MADE, add_from


def answer(config: Config, model_uri: str) -> str:
    """The id of an answer in the traffic log."""
    given = exchange(1, response_id=new_response_id(), received_at=now(), model_uri=model_uri)
    TrafficLog(Storage(config.storage.uri), new_writer("test")).append(given)
    return given.response_id


def trained(config: Config, folder: Path, version: TableVersion) -> str:
    """A model folder whose lineage is that of a table version."""
    folder.mkdir()
    made = replace(
        MADE, table=version.table, snapshot_id=version.snapshot_id, sources=lineage.sources_of(config, version)
    )
    lineage.write(folder, made)
    return str(folder)


def test_an_answer_leads_to_every_source_and_its_positions(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config().with_overrides({"storage.uri": store})
    add(config, range(3, 10))
    version = add_from(config, "chats/0", range(20, 25))
    asked = answer(config, trained(config, tmp_path / "model", version))
    (tmp_path / "c.yaml").write_text(f"storage: {{uri: {store}}}")
    assert job.main([asked, "--config", str(tmp_path / "c.yaml")]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    chain = json.loads(last)
    assert chain["table"] == {"table": "support.conversations", "snapshot_id": version.snapshot_id}
    assert chain["sources"] == [
        {"uri": "chats/0", "records": 5, "first_position": 20, "last_position": 24},
        {"uri": "file:///in.jsonl", "records": 7, "first_position": 3, "last_position": 9},
    ]
    assert "  - uri: chats/0, records: 5, first_position: 20, last_position: 24" in text


def test_where_the_model_folder_is_gone_the_chain_says_so_and_ends(store: str, tmp_path: Path) -> None:
    config = Config().with_overrides({"storage.uri": store})
    chain = why(Storage(store), answer(config, str(tmp_path / "gone")))
    assert "lineage.json cannot be read" in chain["model"]["missing"]
    assert "sources" not in chain


def test_an_id_that_no_answer_carries_is_a_sentence(store: str) -> None:
    with pytest.raises(ResponseNotFound, match="there is no response 'chatcmpl-x'"):
        why(Storage(store), "chatcmpl-x")
