"""What a read task gives: pieces of records put together to blocks, in order and none lost."""

from collections.abc import Iterator

import pytest

from app.ingestion import parts
from app.ingestion.formats import Piece

RECORD = b"x" * 1_000


def pieces(count: int) -> Iterator[Piece]:
    """Ten records each."""
    for start in range(0, 10 * count, 10):
        yield Piece(range(start, start + 10), [RECORD] * 10, None, identified=True)


@pytest.mark.parametrize(("block_bytes", "rows"), [(1, [10] * 7), (25_000, [30, 30, 10]), (1 << 20, [70])])
def test_a_block_is_as_many_pieces_as_it_takes(
    block_bytes: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", block_bytes)
    found = list(parts.blocks(3, lambda: pieces(7)))
    assert [block.num_rows for block in found] == rows
    assert [position for block in found for position in block["position"].to_pylist()] == list(range(70))
    assert all(block["part"].unique().to_pylist() == [3] for block in found)


def test_a_part_without_records_has_no_block() -> None:
    assert list(parts.blocks(0, lambda: pieces(0))) == []
