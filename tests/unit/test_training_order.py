"""The order of blocks, and what a step of it a worker takes, follow from the seed alone."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import Config
from app.errors import StageFailed
from app.training import data
from app.training.data import Sequence
from app.training.packing import NOT_LEARNED


def numbered(blocks: int) -> dict[str, np.ndarray]:
    numbers = np.arange(blocks, dtype=np.int32)[:, None]
    return {"input_ids": numbers, "labels": numbers, "position_ids": np.zeros_like(numbers)}


def taken(sequence: Sequence, start: int, count: int) -> list[int]:
    return [int(number) for number in sequence.take(start, count)["input_ids"][:, 0]]


@given(blocks=st.integers(1, 40), seed=st.integers(0, 5), cuts=st.lists(st.integers(1, 9), min_size=1))
def test_each_epoch_has_each_block_once_however_it_is_cut_into_batches(blocks: int, seed: int, cuts: list[int]) -> None:
    whole = taken(Sequence(numbered(blocks), seed), 0, 3 * blocks)
    for epoch in range(3):
        assert sorted(whole[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))
    sequence, found = Sequence(numbered(blocks), seed), []
    while len(found) < 3 * blocks:
        found += taken(sequence, len(found), cuts[len(found) % len(cuts)])
    assert found[: 3 * blocks] == whole


def test_epochs_have_orders_of_their_own_and_so_have_seeds() -> None:
    sequence = Sequence(numbered(50), seed=1)
    assert taken(sequence, 0, 50) != taken(sequence, 50, 50)
    assert taken(sequence, 0, 50) != taken(Sequence(numbered(50), seed=2), 0, 50)


def test_going_back_gives_the_same_blocks() -> None:
    sequence = Sequence(numbered(7), seed=1)
    before = taken(sequence, 3, 20)
    taken(sequence, 60, 20)
    assert taken(sequence, 3, 20) == before


@given(workers=st.integers(1, 6), others=st.integers(1, 6), micro_batch_size=st.integers(1, 5), more=st.integers(0, 20))
def test_a_step_has_the_same_blocks_on_any_number_of_workers(
    workers: int, others: int, micro_batch_size: int, more: int
) -> None:
    from app.training import loop

    blocks = max(workers, others) + more
    settings = {"training.micro_batch_size": micro_batch_size, "training.global_batch_size": blocks}
    training = Config().with_overrides({**settings, "training.num_workers": workers}).training
    sequence, steps = Sequence(numbered(31), seed=1), []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(others):
            patch.setattr(loop.dist, "get_world_size", lambda: others)
            patch.setattr(loop.dist, "get_rank", lambda rank=rank: rank)
            went_on = loop.on_so_many_workers(training, training.blocks_per_step, others)
            stream = loop.Stream(sequence.take, went_on, place=24)
            batches = [next(stream) for _ in range(went_on.gradient_accumulation_steps)]
            assert {len(batch["labels"]) for batch in batches} <= set(range(1, micro_batch_size + 1))
            steps += [int(number) for batch in batches for number in batch["labels"][:, 0] if number != NOT_LEARNED]
            assert stream.place == 24 + blocks
    assert sorted(steps) == sorted(taken(sequence, 24, blocks))


def test_more_workers_than_a_step_has_blocks_are_refused() -> None:
    from app.training import loop

    training = Config().with_overrides({"training.micro_batch_size": 1, "training.num_workers": 2}).training
    with pytest.raises(StageFailed, match="a step of this run learns from 2 blocks, which 3 workers cannot share"):
        loop.on_so_many_workers(training, training.blocks_per_step, 3)


def test_a_node_lays_blocks_out_once_and_forgets_those_that_nobody_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(tmp_path / "node"))

    def packed(name: str) -> data.Packed:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ids = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(24), pa.int32()), 4)
        pq.write_table(pa.table({"input_ids": ids.slice(0, 4)}), folder / "a.parquet")
        pq.write_table(pa.table({"input_ids": ids.slice(4)}), folder / "b.parquet")
        return data.Packed(str(folder), "", "", ("a.parquet", "b.parquet"), 6, 0, name)

    first = data.mapped(packed("first"))["input_ids"]
    assert first.tolist() == np.arange(24).reshape(6, 4).tolist()
    cache = tmp_path / "node" / f"rayloop-cache-{os.getuid()}"
    [laid_out] = cache.glob("blocks-*/")
    (tmp_path / "first" / "a.parquet").unlink()
    assert len(data.mapped(data.Packed(str(tmp_path / "first"), "", "", ("a.parquet",), 6, 0, ""))["input_ids"]) == 6
    os.utime(laid_out, (0, 0))
    data.mapped(packed("second"))
    assert not laid_out.exists()
    assert first[5].tolist() == [20, 21, 22, 23], "whoever has them keeps them"
