"""Preference pairs as packed blocks of tokens, with what the reference model thinks of each.

Both replies of a pair lie in one block, each after its prompt, and do not see each other (see app/training/packing.py),
so batches are made, sharded and resumed as in supervised training. The reference is the model that training starts
from. It is asked once, before training; with adapters that is the model with its adapters off.
"""

import io
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from app import cluster, preferences
from app.config import Config
from app.conversation import Message, encode, split_of
from app.errors import StageFailed
from app.preferences import Pair
from app.storage import Storage
from app.training import adapters, data
from app.training.base_model import source
from app.training.data import MANIFEST, Packed
from app.training.packing import NOT_LEARNED, pack
from app.versions import TableVersion, code_version, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sides:
    """A pair as tokens: prompt and reply, twice."""

    ids: tuple[np.ndarray, np.ndarray]
    """Chosen and rejected, each (tokens,) int32."""
    learned: tuple[np.ndarray, np.ndarray]
    """For each, (tokens,) bool: the reply and the end of its turn."""

    def __len__(self) -> int:
        return len(self.ids[0]) + len(self.ids[1])


def prepare(config: Config, table: TableVersion) -> Packed:
    """The packed pairs with the reference's log-probabilities, made now unless they are on storage already.

    Raises:
        SourceError, StageFailed: There are no pairs, as `preferences.collect` says; none fits into a block; none is
            held out; or there are fewer blocks than one step needs.
        ClusterError: No node has room for the reference model.
    """
    pairs = preferences.collect(config)
    storage = Storage(config.storage.uri)
    name = _name(config, table, pairs)
    packed = _find(storage, name)
    if packed is None:
        gpus = float(config.training.use_gpu)
        [split] = cluster.collect([cluster.submit(_make, config, table, pairs, gpus=gpus)])
        packed = _write(storage, name, split, data.prepare(config, table)[0])
    training = config.training
    needed = min(training.blocks_per_step, training.max_workers * training.micro_batch_size)
    if packed.blocks < needed:
        raise StageFailed(
            f"{len(pairs)} preference pairs fill {packed.blocks} blocks of {training.block_tokens} tokens, one step "
            f"takes {needed} (training.num_workers={training.max_workers} x "
            f"training.micro_batch_size={training.micro_batch_size}, or training.global_batch_size)",
            "collect more feedback or lower one of these",
        )
    return packed


def pairs_digest(config: Config) -> str:
    """Names the pairs that a run would learn from now."""
    return preferences.pairs_digest(preferences.collect(config))


def tokens_of(tokenizer: "PreTrainedTokenizerBase", pair: Pair) -> Sides:
    """A pair as tokens, in the base model's own chat template."""
    ids, learned = [], []
    for text in (pair.chosen, pair.rejected):
        reply: Message = {"role": "assistant", "content": text}
        encoded = encode(tokenizer, [*pair.prompt, reply], "last")
        ids.append(encoded.ids)
        learned.append(encoded.learned)
    return Sides((ids[0], ids[1]), (learned[0], learned[1]))


def fill(pairs: Sequence[Sides], block_tokens: int, pad_id: int) -> dict[str, np.ndarray]:
    """Pack pairs into blocks, both sides of one in the same.

    Args:
        pairs: None longer than a block.
        block_tokens: Tokens of a block.
        pad_id: What fills the rest.

    Returns:
        input_ids, position_ids, labels as in `packing.Blocks`, and `pair`: +n on the chosen and -n on the rejected side
        of the n-th pair of a block, from 1; 0 in padding. Each (blocks, block_tokens) int32.
    """
    block_of = pack(np.array([len(pair) for pair in pairs], dtype=np.int64), block_tokens)
    shape = (int(block_of.max()) + 1 if len(pairs) else 0, block_tokens)
    columns = {name: np.zeros(shape, np.int32) for name in ("input_ids", "position_ids", "labels", "pair")}
    columns["input_ids"][:] = pad_id
    columns["labels"][:] = NOT_LEARNED
    used, count = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    for pair, block in zip(pairs, block_of.tolist(), strict=True):
        count[block] += 1
        for ids, learned, sign in zip(pair.ids, pair.learned, (1, -1), strict=True):
            place = slice(used[block], used[block] + len(ids))
            columns["input_ids"][block, place] = ids
            columns["position_ids"][block, place] = np.arange(len(ids))
            columns["labels"][block, place] = np.where(learned & (np.arange(len(ids)) > 0), ids, NOT_LEARNED)
            columns["pair"][block, place] = sign * count[block]
            used[block] += len(ids)
    return columns


def _name(config: Config, table: TableVersion, pairs: Sequence[Pair]) -> str:
    training = config.training
    reference = [training.base_model, training.method, training.precision, training.lora.load_in_8bit]
    parts = [data.data_digest(config, table), preferences.pairs_digest(pairs), reference]
    return digest([*parts, config.ingestion.validation_fraction, code_version("training")])[:16]


def _make(config: Config, table: TableVersion, pairs: Sequence[Pair]) -> dict[str, dict[str, np.ndarray]]:
    """The blocks of both splits, with the reference's log-probabilities as `reference`, (blocks, block_tokens)."""
    import torch

    training = config.training
    _, tokenizer = data.prepare(config, table)
    fraction = config.ingestion.validation_fraction
    split: dict[str, list[Sides]] = {"train": [], "validation": []}
    longest = left_out = 0
    for pair in pairs:
        sides = tokens_of(tokenizer, pair)
        longest = max(longest, len(sides))
        if len(sides) <= training.block_tokens:
            split[split_of(pair.key, fraction)].append(sides)
        else:
            left_out += 1
    if left_out:
        logger.warning(
            "%d of %d preference pairs are left out: blocks have %d tokens, the longest pair %d",
            left_out, len(pairs), training.block_tokens, longest,
        )  # fmt: skip
    for name, remedy in (
        ("train", "raise training.block_tokens"),
        ("validation", "raise ingestion.validation_fraction"),
    ):
        if not split[name]:
            raise StageFailed(
                f"of {len(pairs)} preference pairs none is left for {name}: blocks have {training.block_tokens} "
                f"tokens, the longest pair {longest}; ingestion.validation_fraction is {fraction:g}",
                f"{remedy}, or collect more pairs",
            )
    model: Any = adapters.load_base(training, source(training.base_model))
    if not getattr(model, "is_loaded_in_8bit", False):  # which is where and what it has to be
        precision = torch.bfloat16 if training.precision == "bf16" else torch.float32
        model = model.to(device="cuda" if training.use_gpu else "cpu", dtype=precision)
    filled = {name: fill(sides, training.block_tokens, data.pad_id(tokenizer)) for name, sides in split.items()}
    for columns in filled.values():
        columns["reference"] = _reference(model, columns, training.micro_batch_size)
    return filled


def _reference(model: Any, columns: Mapping[str, np.ndarray], blocks_at_once: int) -> np.ndarray:
    """(blocks, block_tokens) float32: the log-probability of each learned token, 0 elsewhere."""
    import torch

    from app.training.dpo import log_probabilities

    reference = np.zeros(columns["labels"].shape, np.float32)
    with torch.inference_mode():
        for start in range(0, len(reference), blocks_at_once):
            batch = {name: column[start : start + blocks_at_once] for name, column in columns.items()}
            logps_l, learned_bt = log_probabilities(model, batch)
            reference[start : start + blocks_at_once][learned_bt.cpu().numpy()] = logps_l.cpu().numpy()
    return reference


def _write(storage: Storage, name: str, split: dict[str, dict[str, np.ndarray]], packed: Packed) -> Packed:
    """Keep the blocks; the manifest comes last and at once."""
    from ray.data.block import BlockAccessor

    folder, file = uuid.uuid4().hex[:12], "pairs.parquet"
    table = BlockAccessor.batch_to_arrow_block(split["train"])
    content = io.BytesIO()
    pq.write_table(table, content, **data.PARQUET)
    storage.write(content.getvalue(), "packed", name, folder, "blocks", file)
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, **split["validation"])
    storage.write(held.getvalue(), "packed", name, folder, "validation", "blocks.npz")
    size = sum(column.nbytes for column in split["train"].values())
    manifest = {
        "folder": folder,
        "files": [file],
        "blocks": table.num_rows,
        "bytes": size,
        "tokenizer": packed.tokenizer_uri,
    }
    storage.write(json.dumps(manifest).encode(), "packed", name, MANIFEST)
    found = _find(storage, name)
    assert found is not None
    return found


def _find(storage: Storage, name: str) -> Packed | None:
    if not storage.exists("packed", name, MANIFEST):
        return None
    found = json.loads(storage.read("packed", name, MANIFEST))
    return Packed(
        uri=storage.uri("packed", name, found["folder"], "blocks"),
        tokenizer_uri=found["tokenizer"],
        validation_uri=storage.uri("packed", name, found["folder"], "validation"),
        files=tuple(found["files"]),
        blocks=found["blocks"],
        bytes=found["bytes"],
        digest=name,
    )
