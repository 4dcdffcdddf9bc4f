"""What was accepted before, as far as an ingest needs it: keys, signatures, statistics, the intent model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app import cluster, tables
from app.config import Config
from app.drift import Sketch
from app.errors import RegistryError, TableFilesGone
from app.ingestion.anomalies import FEATURES, Baseline, features
from app.ingestion.decision import held_keys
from app.ingestion.imputation import Imputer
from app.ingestion.staging import BlockName, Staging, hash_below
from app.intent import IntentModel
from app.storage import local_folder
from app.versions import TableVersion

if TYPE_CHECKING:
    from pyiceberg.io.pyarrow import ArrowScan
    from pyiceberg.table import FileScanTask, Table

LEAST_SAMPLE = 100
"""Fewer conversations say too little of what is usual."""
FILES_A_TASK = 32
REFIT_GROWTH = 1.2
"""Statistics are fitted anew once there are so many times more conversations."""


class History:
    """What the tables hold, kept between micro-batches: every data file is read once.

    Args:
        config: Names the tables.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys: list[tuple[list[str], Any]] = []
        self._fitted_rows = 0
        self._baseline: Baseline | None = None
        self._sketch = Sketch()
        self._imputer: Imputer | None = None

    def keys(self, table: "Table") -> list[Any]:
        """References to tables of `HELD` with a `minhash` column: of all that the table holds, as it was opened.

        Reading one raises `TableFilesGone` if maintenance has removed a file meanwhile; a new `History` is needed then.
        """
        files = _data_files(table)
        self._keys = [(group, keys) for group, keys in self._keys if files.keys() >= set(group)]
        new = sorted(files.keys() - {file for group, _ in self._keys for file in group})
        for start in range(0, len(new), FILES_A_TASK):
            group = new[start : start + FILES_A_TASK]
            tasks = [files[file] for file in group]
            self._keys.append((group, cluster.submit(_keys_of, _keys_scan(table), tasks)))
        return [keys for _, keys in self._keys]

    def baseline(
        self, table: "Table", staging: Staging, shares: Sequence[Sequence[BlockName]]
    ) -> Baseline | None:  # fmt: skip
        """What is usual: of the accepted history, and where there is little of it, of this batch itself.

        None where anomalies are not looked for, or nothing can be said yet.
        """
        settings = self._config.ingestion.anomalies
        if not settings.detect:
            return None
        self._fit(table)
        if self._baseline is not None:
            return self._baseline
        sample = _of_batch(staging, shares, settings.history)
        return self._baseline_of(sample) if len(sample) >= LEAST_SAMPLE else None

    def sketch(self, table: "Table") -> Sketch:
        """Of the accepted history; empty if there is none."""
        self._fit(table)
        return self._sketch

    def imputer(self) -> Imputer:
        """What fills in missing values; intents by the intent model that the configuration names."""
        if self._imputer is None:
            self._imputer = Imputer(self._config.ingestion.imputation, _intent_model(self._config))
        return self._imputer

    def _baseline_of(self, found: np.ndarray) -> Baseline:
        settings = self._config.ingestion.anomalies
        return Baseline.fit(found, settings.threshold / settings.forest_threshold)

    def _fit(self, table: "Table") -> None:
        snapshot = table.current_snapshot()
        if snapshot is None:
            return
        version = TableVersion(self._config.ingestion.table, snapshot.snapshot_id)
        count = tables.rows(self._config, version)
        if count < max(1, REFIT_GROWTH * self._fitted_rows):
            return
        columns = ["messages", "intent", "language", "channel"]
        rows = tables.read_local(self._config, version, columns, limit=self._config.ingestion.anomalies.history)
        if rows.num_rows >= LEAST_SAMPLE:
            self._baseline = self._baseline_of(features(rows["messages"].combine_chunks()))
        self._sketch = Sketch.of(rows)
        self._fitted_rows = count


def _data_files(table: "Table") -> "dict[str, FileScanTask]":
    """How the table's data files are read, by path."""
    if table.current_snapshot() is None:
        return {}
    return {task.file.file_path: task for task in table.scan().plan_files()}


def _keys_scan(table: "Table") -> "ArrowScan":
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.io.pyarrow import ArrowScan

    columns = table.schema().select("content_hash", "conversation_id", "intent", "minhash")
    return ArrowScan(table.metadata, table.io, columns, AlwaysTrue())


def _keys_of(scan: "ArrowScan", tasks: "Sequence[FileScanTask]") -> pa.Table:
    """The keys and signatures of some data files; rows that a delete file takes away are left out."""
    try:
        rows = scan.to_table(tasks)
    except FileNotFoundError as error:
        raise _gone(error) from None
    return held_keys(rows).append_column("minhash", rows["minhash"])


def _gone(error: FileNotFoundError) -> TableFilesGone:
    return TableFilesGone(
        f"files of the table were removed while an ingest compared with them ({error}); nothing was added",
        "run the job again; if it says so again, no maintenance has removed them and the file is lost: restore it, or "
        "roll back to a version without it",
    )


def held_refusals(table: "Table") -> np.ndarray:
    """The first 64 bits of the hashes of all refusals that the quarantine table holds, sorted.

    Raises:
        TableFilesGone: Another job has removed a file of it since it was opened.
    """
    if table.current_snapshot() is None:
        return np.empty(0, np.uint64)
    try:
        hashes = table.scan(selected_fields=("refusal_hash",)).to_arrow()["refusal_hash"].to_pylist()
    except FileNotFoundError as error:
        raise _gone(error) from None
    return np.sort(np.array([int(value[:16], 16) for value in hashes], np.uint64))


def _of_batch(staging: Staging, shares: Sequence[Sequence[BlockName]], limit: int) -> np.ndarray:
    """Features of about `limit` staged conversations: those whose hashes come first, however they were shared out."""
    total = sum(block.rows for share in shares for block in share)
    below = hash_below(limit / max(1, total))
    found = cluster.collect([cluster.submit(_with_hash_below, staging, share, below) for share in shares])
    rows = sorted(row for part in found for row in part)
    return np.array([row for _, row in rows], np.float32).reshape(len(rows), len(FEATURES))


def _with_hash_below(staging: Staging, blocks: Sequence[BlockName], below: str) -> list[tuple[str, list[float]]]:
    found = []
    for block in blocks:
        rows = staging.read(block, ["content_hash", "features"])
        chosen = rows.filter(pc.less_equal(pc.utf8_slice_codeunits(rows["content_hash"], 0, 8), below))
        found += list(zip(chosen["content_hash"].to_pylist(), chosen["features"].to_pylist(), strict=True))
    return found


def _intent_model(config: Config) -> IntentModel | None:
    name = config.ingestion.imputation.intent_model
    if name is None:
        return None
    from app.registry import Registry

    known = Registry(config)
    version = known.alias("champion") if name == "champion" else known.version(name)
    if version is None:
        raise RegistryError("there is no champion yet", "set ingestion.imputation.intent_model after the first path")
    with local_folder(version.uri) as folder:
        return IntentModel.load(folder / "intent")
