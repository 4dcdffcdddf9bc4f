"""From a table version to packed blocks of tokens.

Blocks are made once for a table version, tokenizer and block length, and kept as Parquet under
`packed/<digest>/`: epochs, trials, workers that come back and resubmitted jobs all read the same blocks, and nothing
is tokenised twice. Each node lays them out once as arrays on its disk, from which its workers take any block at any
time: so the order of a run is one endless sequence that follows from the seed alone, whatever the number of workers.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from app import cluster, conversation, tables, tokenization
from app import model as models
from app.config import Config
from app.errors import ModelError, StageFailed, StorageError
from app.storage import PACKED_MANIFEST, UNUSED_S, Storage, local_folder, node_cache
from app.training import packing
from app.training.base_model import is_remote, source
from app.training.packing import Blocks, fill
from app.versions import TableVersion, as_json, digest

if TYPE_CHECKING:
    import ray.data
    from transformers import PreTrainedTokenizerBase

    from app.datasource import WrittenFile

logger = logging.getLogger(__name__)

TOKENIZER_CONVERSATIONS = 10_000
"""Conversations the BPE merges are learned from: more no longer changed the tokens per message."""
MANIFEST = PACKED_MANIFEST
_CODE = tuple(Path(file) for file in (__file__, packing.__file__, conversation.__file__, tokenization.__file__))
PARQUET = {"compression": "lz4", "use_dictionary": False}
"""How packed blocks are written: 33 ms for 12 MB where pyarrow's defaults take 51 ms, and read back faster."""
BLOCK_BYTES = 16 << 20
"""Of packed blocks, or of conversations, that a packing task works on at a time."""
LARGE_BYTES = 16 << 20
"""Of a file whose digest takes long enough to be remembered."""
ROW_GROUP_BLOCKS = 4_096
"""Blocks in memory at a time while a node lays them out."""


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
    import ray.data

    from app.datasource import start_at_once

    start_at_once()
    dataset = tables.read(config, table, ["messages"], split)
    # Between reading, packing and writing Ray Data gathers blocks of this size, and joins them.
    dataset.context.target_max_block_size = BLOCK_BYTES
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources(cpu=cluster.cpus())
    pack: Any = _pack_batch
    return dataset.map_batches(
        pack,
        batch_format="pyarrow",
        batch_size=None,  # as read: with a number of rows, reading and packing are different tasks and take turns
        fn_kwargs={
            "tokenizer": tokenizer,
            "block_tokens": config.training.block_tokens,
            "loss_on": config.training.loss_on,
        },
    )


def write(dataset: "ray.data.Dataset", folder: str, filesystem: FileSystem) -> "tuple[WrittenFile, ...]":
    """Write packed blocks as Parquet files below a folder; returns the files in the order of the blocks."""
    from app.datasource import ParquetFiles

    sink = ParquetFiles(folder, filesystem, **PARQUET)
    dataset.write_datasink(sink)
    return sink.files


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
    packed = find(storage, name)
    if packed is None:
        packed = _make(config, table, storage, name)
    training = config.training
    needed = min(training.blocks_per_step, training.max_workers * training.micro_batch_size)
    if packed.blocks < needed:
        raise StageFailed(
            f"{table} fills {packed.blocks} blocks of {training.block_tokens} tokens, one step takes {needed} "
            f"(training.num_workers={training.max_workers} x training.micro_batch_size={training.micro_batch_size}, or "
            "training.global_batch_size)",
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


class Sequence:
    """All blocks once, then all of them again in another order, and so on without end.

    Place `p` is the same block in every process, so one number says how far a run has come: none is seen twice or
    left out in an epoch, by however many workers, and whichever of them come and go.
    """

    def __init__(self, columns: dict[str, np.ndarray], seed: int) -> None:
        self._columns, self._seed = columns, seed
        self.blocks = len(next(iter(columns.values())))
        """In one epoch."""
        self._orders: dict[int, np.ndarray] = {}

    def take(self, start: int, count: int) -> dict[str, np.ndarray]:
        """The blocks at the places from `start` on, by column."""
        places = np.arange(start, start + count)
        epochs, within = np.divmod(places, self.blocks)
        rows = np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, within, strict=True)])
        return {name: column[rows] for name, column in self._columns.items()}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.blocks)
        return self._orders[epoch]


def read(packed: Packed, seed: int) -> Sequence:
    """The packed blocks in the order that a seed decides, from this node's disk."""
    return Sequence(mapped(packed), seed)


def mapped(packed: Packed) -> dict[str, np.ndarray]:
    """The packed blocks by column, each (blocks, block_tokens) int32, as maps of files on this node's disk.

    Workers of a node share them; the first one to ask lays them out.
    """
    name = hashlib.sha256(packed.uri.encode()).hexdigest()[:16]
    folder = node_cache() / f"blocks-{name}"
    with _alone(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _clean(folder.parent)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            partial.mkdir()
            try:
                _lay_out(packed, partial)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise StorageError(
                    f"cannot lay out {packed.uri} under {folder.parent} ({error})", "make room there"
                ) from error
            os.replace(partial, folder)
        os.utime(folder)
    return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(folder.glob("*.npy"))}


def _clean(folder: Path) -> None:
    """Remove blocks that no worker has asked for in a long time. One that still maps them keeps them."""
    for laid_out in folder.glob("blocks-*/"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if time.time() - laid_out.stat().st_mtime > UNUSED_S:
                shutil.rmtree(laid_out, ignore_errors=True)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """No other process is in such a block with the same file."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lay_out(packed: Packed, folder: Path) -> None:
    storage = Storage(packed.uri)
    columns: dict[str, np.ndarray] = {}
    row = 0
    for file in packed.files:
        with storage.filesystem.open_input_file(storage.path(file)) as source:
            for batch in pq.ParquetFile(source).iter_batches(ROW_GROUP_BLOCKS):
                for name, values in zip(batch.schema.names, batch.columns, strict=True):
                    matrix = _matrix(values)
                    if name not in columns:
                        shape = (packed.blocks, matrix.shape[1])
                        columns[name] = _map_of(folder / f"{name}.npy", matrix.dtype, shape)
                    columns[name][row : row + len(matrix)] = matrix
                row += len(batch)
    assert row == packed.blocks, f"{packed.uri} holds {row} blocks, its manifest says {packed.blocks}"


def _map_of(file: Path, dtype: Any, shape: tuple[int, int]) -> np.ndarray:
    """A new array in a file whose room on the disk is there: writing to one without it would end the process."""
    made = np.lib.format.open_memmap(file, "w+", dtype, shape)
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return made


def _matrix(column: Any) -> np.ndarray:
    """(rows, block_tokens) of a column of Ray Data's tensors, whether or not their type is registered."""
    lists = column.storage if isinstance(column, pa.ExtensionArray) else column
    values: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1)


def read_validation(packed: Packed) -> dict[str, np.ndarray]:
    """The held-out blocks."""
    content = io.BytesIO(Storage(packed.validation_uri).read("blocks.npz"))
    with np.load(content, allow_pickle=False) as columns:
        return {name: columns[name] for name in columns.files}


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
    encoded = conversation.encode_many(tokenizer, rows["messages"].combine_chunks(), loss_on)
    return [part for part in encoded if len(part.ids)]


def _pack_batch(rows: Any, tokenizer: Any, block_tokens: int, loss_on: str) -> dict[str, np.ndarray]:
    return fill(encode_all(rows, tokenizer, loss_on), block_tokens, pad_id(tokenizer)).columns()


def find(storage: Storage, name: str) -> Packed | None:
    """The packed blocks of a digest (see `data_digest`), none if they were not made yet."""
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
    files = write(
        blocks(config, table, tokenizer, "train"), storage.path("packed", name, folder, "blocks"), storage.filesystem
    )
    count = sum(file.rows for file in files)
    manifest = {
        "folder": folder,
        "files": [file.name for file in files],
        "blocks": count,
        "bytes": count * config.training.block_tokens * len(Blocks.__dataclass_fields__) * 4,
        "table": as_json(table),
    }
    storage.write(json.dumps(manifest).encode(), "packed", name, MANIFEST)
    logger.info("packed %s into %d blocks", table, count)
    found = find(storage, name)
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
    """What tells one base model from another: the content of the files in its folder, on a store their times; or its
    hub id. Folders within it are others', such as the checkpoints that it was trained with.

    Raises:
        ModelError: A file cannot be read.
        StorageError: The store does not answer.
    """
    if is_remote(base_model):
        root = Storage(base_model)
        infos = [info for info in root.files() if "/" not in info.path.removeprefix(root.root_path).lstrip("/")]
        return sorted([info.path, info.size, info.mtime_ns] for info in infos)
    folder = Path(source(base_model))
    if not folder.is_dir():
        return base_model
    try:
        return [[file.name, _content_digest(file)] for file in sorted(folder.iterdir()) if file.is_file()]
    except OSError as error:
        raise ModelError(f"cannot read base model {base_model} ({error})", "check its permissions") from error


def _content_digest(file: Path) -> str:
    """SHA-256; of a large file it is kept on this node, since every trial asks."""
    about = file.stat()
    if about.st_size < LARGE_BYTES:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    known = node_cache() / f"digest-{digest([str(file.resolve()), about.st_size, about.st_mtime_ns])}"
    if not known.exists():
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        aside = known.with_name(f"{known.name}.{uuid.uuid4().hex}")
        aside.write_text(found)
        aside.replace(known)
    return known.read_text()
