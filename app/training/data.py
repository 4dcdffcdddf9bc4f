"""From a table version to packed blocks of tokens.

Blocks are made once for a table version, tokenizer and block length, and kept as Parquet under
`packed/<digest>/`: epochs, trials, workers that come back and resubmitted jobs all read the same blocks in the
same order, and nothing is tokenised twice.
"""

import hashlib
import io
import json
import logging
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app import conversation, tables
from app import model as models
from app.config import Config
from app.errors import StageFailed
from app.storage import Storage, local_folder, resolve
from app.training import packing
from app.training.packing import Blocks, fill
from app.versions import TableVersion, as_json, digest

if TYPE_CHECKING:
    import ray.data
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_CONVERSATIONS = 10_000
"""Conversations the BPE merges are learned from: more no longer changed the tokens per message."""
CONVERSATIONS_PER_BATCH = 2_048
SHUFFLE_BLOCKS = 4_096
"""Blocks a worker holds to draw its batches from."""
MANIFEST = "packed.json"
_CODE = (Path(__file__), Path(packing.__file__), Path(conversation.__file__))
IN_MEMORY_BYTES = 200_000_000
"""Blocks up to this size live in Ray's object store while they are trained on."""


@dataclass(frozen=True)
class Packed:
    """The training blocks of a table version, on storage."""

    uri: str
    """Folder of the Parquet files."""
    tokenizer_uri: str
    """Folder of the tokenizer."""
    validation_uri: str
    """Folder of the held-out blocks."""
    files: tuple[str, ...]
    """Their names, in the order they are read in."""
    blocks: int
    """Rows in all."""
    bytes: int
    """Their size in memory."""
    digest: str
    """Of all that decides their content."""


def source(base_model: str) -> str:
    """A base model as transformers takes it: a local folder's full path, or a hub id."""
    folder = resolve(base_model)
    return folder if Path(folder).is_dir() else base_model


def make_tokenizer(config: Config, table: TableVersion) -> "PreTrainedTokenizerBase":
    """The base model's tokenizer; for a preset, one trained on the table version's conversations.

    Raises:
        ModelError: The base model has none that can be loaded.
        StageFailed: The table version has no conversation to train one on.
    """
    if not models.is_preset(config.training.base_model):
        return _base_tokenizer(source(config.training.base_model))
    sample = tables.read_local(config, table, ["messages"], "train", TOKENIZER_CONVERSATIONS)
    if not len(sample):
        raise StageFailed(
            f"{table} has no conversations to train on", "ingest more, or lower ingestion.validation_fraction"
        )
    texts = (message["content"] for messages in sample["messages"].to_pylist() for message in messages)
    return conversation.train_tokenizer(texts, config.training.vocab_size)


def blocks(config: Config, table: TableVersion, tokenizer: "PreTrainedTokenizerBase", split: str) -> "ray.data.Dataset":
    """Packed blocks of a split, streaming: input_ids, position_ids and labels, each (block_tokens,) int32."""
    dataset = tables.read(config, table, ["messages"], split)
    dataset.context.execution_options.preserve_order = True
    pack: Any = _pack_batch
    return dataset.map_batches(
        pack,
        batch_format="pyarrow",
        batch_size=CONVERSATIONS_PER_BATCH,
        fn_kwargs={
            "tokenizer": tokenizer,
            "block_tokens": config.training.block_tokens,
            "loss_on": config.training.loss_on,
        },
    )


def validation_blocks(
    config: Config, table: TableVersion, tokenizer: "PreTrainedTokenizerBase", limit: int
) -> dict[str, np.ndarray]:
    """At most `limit` packed blocks of held-out conversations, the same on every call.

    Raises:
        StageFailed: Nothing is held out.
    """
    training = config.training
    wanted = limit * training.block_tokens
    conversations = 4 * limit
    while True:
        rows = tables.read_local(config, table, ["messages"], "validation", conversations)
        packed = encode_all(rows, tokenizer, training.loss_on)
        # As many as would fill the blocks; packing puts the long ones first, so none are cut off after it.
        used = int(np.searchsorted(np.cumsum([len(part.ids) for part in packed]), wanted, side="right"))
        if used < len(packed) or len(rows) < conversations:
            break
        conversations *= 4
    if not packed:
        raise StageFailed(f"{table} holds nothing out for validation", "raise ingestion.validation_fraction")
    filled = fill(packed[: max(1, used)], training.block_tokens, pad_id(tokenizer))
    return {name: column[:limit] for name, column in filled.columns().items()}


def prepare(config: Config, table: TableVersion) -> "tuple[Packed, PreTrainedTokenizerBase]":
    """The packed training blocks and their tokenizer, made now unless they are on storage already.

    Raises:
        StageFailed: There are fewer blocks than one step needs.
    """
    storage = Storage(config.storage.uri)
    name = data_digest(config, table)
    packed = _find(storage, name)
    if packed is None:
        packed = _make(config, table, storage, name)
    training = config.training
    needed = training.num_workers * training.micro_batch_size
    if packed.blocks < needed:
        raise StageFailed(
            f"{table} fills {packed.blocks} blocks of {training.block_tokens} tokens, one step takes {needed} "
            f"(training.num_workers={training.num_workers} x training.micro_batch_size={training.micro_batch_size})",
            "ingest more conversations or lower one of these",
        )
    return packed, load_tokenizer(packed)


def data_digest(config: Config, table: TableVersion) -> str:
    """Names the packed blocks: same table version, tokenizer, packing and code."""
    training = config.training
    tokenizer: Any = training.vocab_size if models.is_preset(training.base_model) else _fingerprint(training.base_model)
    shape = [training.block_tokens, training.loss_on, training.validation_blocks]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in _CODE]
    return digest([as_json(table), tokenizer, shape, code])[:16]


def read(packed: Packed) -> "ray.data.Dataset":
    """The packed blocks as a dataset that is always in the same order.

    What fits into memory is put into the object store once, so that an epoch starts without starting tasks;
    more is streamed from storage in each epoch.
    """
    import ray.data

    storage = Storage(packed.uri)
    paths = [storage.path(file) for file in packed.files]
    if packed.bytes <= IN_MEMORY_BYTES:
        # Not from_arrow: it starts a task, and with it a process, for each table.
        dataset: ray.data.Dataset = ray.data.from_blocks(
            [pq.read_table(path, filesystem=storage.filesystem) for path in paths]
        )
    else:
        dataset = ray.data.read_parquet(paths, filesystem=storage.filesystem, override_num_blocks=len(paths))
    dataset.context.execution_options.preserve_order = True
    return dataset


def read_validation(packed: Packed) -> dict[str, np.ndarray]:
    """The held-out blocks."""
    content = io.BytesIO(Storage(packed.validation_uri).read("blocks.npz"))
    with np.load(content, allow_pickle=False) as columns:
        return {name: columns[name] for name in columns.files}


def in_order() -> "ray.data.ExecutionOptions":
    """Ray Data's options for a worker's share that is the same in every run."""
    import ray.data

    return ray.data.ExecutionOptions(preserve_order=True)


def shuffled(shard: "ray.data.DataIterator", batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """A worker's batches of one epoch, in an order that the seed decides."""
    return iter(
        shard.iter_batches(
            batch_size=batch_size,
            batch_format="numpy",
            drop_last=True,
            prefetch_batches=2,
            local_shuffle_buffer_size=SHUFFLE_BLOCKS,
            local_shuffle_seed=seed,
        )
    )


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that fills what is left of a block."""
    found: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def load_tokenizer(packed: Packed) -> "PreTrainedTokenizerBase":
    """The tokenizer the blocks were made with."""
    with local_folder(packed.tokenizer_uri) as folder:
        return models.load_tokenizer(folder)


def encode_all(rows: pa.Table, tokenizer: "PreTrainedTokenizerBase", loss_on: str) -> list[conversation.Encoded]:
    """The conversations of a table's rows as tokens; one without any is left out."""
    encoded = [conversation.encode(tokenizer, messages, loss_on) for messages in rows["messages"].to_pylist()]
    return [part for part in encoded if len(part.ids)]


def _pack_batch(rows: Any, tokenizer: Any, block_tokens: int, loss_on: str) -> dict[str, np.ndarray]:
    return fill(encode_all(rows, tokenizer, loss_on), block_tokens, pad_id(tokenizer)).columns()


def _find(storage: Storage, name: str) -> Packed | None:
    if not storage.exists("packed", name, MANIFEST):
        return None
    found = json.loads(storage.read("packed", name, MANIFEST))
    return Packed(
        uri=storage.uri("packed", name, found["folder"], "blocks"),
        tokenizer_uri=storage.uri("packed", name, found["folder"], "tokenizer"),
        validation_uri=storage.uri("packed", name, found["folder"], "validation"),
        files=tuple(found["files"]),
        blocks=found["blocks"],
        bytes=found["bytes"],
        digest=name,
    )


def _make(config: Config, table: TableVersion, storage: Storage, name: str) -> Packed:
    """Tokenise and pack; the manifest comes last and at once, so nobody sees half of it."""
    tokenizer = make_tokenizer(config, table)
    folder = uuid.uuid4().hex[:12]  # what a killed attempt left behind is never mixed in
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        storage.upload(Path(aside), "packed", name, folder, "tokenizer")
        held_out = validation_blocks(config, table, tokenizer, config.training.validation_blocks)
        np.savez(Path(aside) / "blocks.npz", allow_pickle=False, **held_out)
        storage.write((Path(aside) / "blocks.npz").read_bytes(), "packed", name, folder, "validation", "blocks.npz")
    target = storage.path("packed", name, folder, "blocks")
    blocks(config, table, tokenizer, "train").write_parquet(target, filesystem=storage.filesystem)
    files = [file for file in storage.list("packed", name, folder, "blocks") if file.endswith(".parquet")]
    counts = [pq.read_metadata(f"{target}/{file}", filesystem=storage.filesystem).num_rows for file in files]
    size = sum(counts) * config.training.block_tokens * len(Blocks.__dataclass_fields__) * 4
    manifest = {"folder": folder, "files": files, "blocks": sum(counts), "bytes": size, "table": as_json(table)}
    storage.write(json.dumps(manifest).encode(), "packed", name, MANIFEST)
    logger.info("packed %s into %d blocks", table, sum(counts))
    found = _find(storage, name)
    assert found is not None
    return found


def _base_tokenizer(base_model: str) -> "PreTrainedTokenizerBase":
    """A base model's tokenizer; one without a chat template gets ours, and its markers as tokens."""
    tokenizer = models.load_tokenizer(base_model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = conversation.CHAT_TEMPLATE
        markers = [f"<|{role}|>" for role in conversation.ROLES]
        tokenizer.add_special_tokens({"additional_special_tokens": markers, "eos_token": conversation.END})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fingerprint(base_model: str) -> Any:
    """What tells one base model from another: its files, or its hub id."""
    folder = Path(source(base_model))
    if not folder.is_dir():
        return base_model
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir())]
