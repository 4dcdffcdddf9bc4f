from dataclasses import replace
from pathlib import Path

import pytest

from app import lineage
from app.errors import ModelError
from app.lineage import Lineage

MADE = Lineage(
    model="support",
    version=None,
    run_id="r1",
    stage="train",
    table="support.conversations",
    snapshot_id=42,
    sources=[{"uri": "sample:shop", "records": 10, "first_position": 0, "last_position": 9}],
    config_digest="c",
    code_version="d",
    job_id="job-1",
    parent=None,
    created_at=lineage.now(),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lineage.write(tmp_path, MADE)
    assert lineage.read(str(tmp_path)) == MADE
    lineage.write(tmp_path, replace(MADE, version="3"))
    assert lineage.read(str(tmp_path)).version == "3"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": "support"}'])
def test_a_damaged_lineage_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / lineage.FILE).write_text(content)
    with pytest.raises(ModelError, match=r"lineage\.json cannot be read"):
        lineage.read(str(tmp_path))


def test_a_folder_without_lineage_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must be one that jobs\.train or jobs\.compress made"):
        lineage.read(str(tmp_path))
