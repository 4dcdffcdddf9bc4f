"""Compression as a whole: quantised, reloaded from disk, measured, and registered if it is within the budget.

    ray job submit --working-dir . -- python -m jobs.compress --config jobs/configs/demo.yaml

The work is one Ray task; the driver keeps the records. A model that is refused leaves a run in MLflow with its
figures, and nothing else.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import cluster, conversation, lineage, tables
from app.compression import gate
from app.compression.quantize import quantize
from app.config import Config
from app.errors import ModelError, StageFailed, StageRefused
from app.job import job_id
from app.lineage import Lineage
from app.registry import Registry
from app.storage import Storage, local_folder
from app.training import data
from app.versions import ModelVersion, TableVersion, code_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCKS_AT_ONCE = 8
PROMPTS = max(gate.BATCHES)


@dataclass(frozen=True)
class Compressed:
    """What compression gave."""

    version: ModelVersion
    figures: dict[str, Any]


def compress(config: Config, model: ModelVersion) -> Compressed:
    """Make a compressed version of a model version, and let the alias `candidate` stand for it.

    Raises:
        StageRefused: It is outside the budget; nothing was registered.
        ModelError: The version cannot be loaded, or is compressed already.
        ClusterError: No node has the memory for it.
    """
    registry = Registry(config)
    origin = registry.tags(model)
    if origin["rayloop.stage"] == "compress":
        raise ModelError(
            f"{model} is compressed already", f"compress version {origin['rayloop.parent']}, which it was made from"
        )
    table = TableVersion(origin["rayloop.table"], int(origin["rayloop.snapshot_id"]))
    settings = {f"compression.{key}": value for key, value in config.compression.model_dump(mode="json").items()}
    tags = {"rayloop.table": origin["rayloop.table"], "rayloop.snapshot_id": origin["rayloop.snapshot_id"]}
    tags |= {"rayloop.parent": model.version}
    run_id = registry.start_run("compress", {"model": str(model), **settings}, {**tags, "rayloop.job": job_id()})
    status = "FAILED"
    try:
        made = _lineage(config, model, table, run_id)
        # The parent in float32 and bfloat16, the int8 model, and activations.
        memory_bytes = 4 * gate.weights_bytes(model.uri) + 2**28
        task = cluster.submit(
            _work, config, model.uri, table, made, gpus=float(config.training.use_gpu), memory_bytes=memory_bytes
        )
        [(figures, missed)] = cluster.collect([task])
        registry.log_metrics(run_id, {key: float(value) for key, value in figures.items()})
        registry.set_tags(run_id, {"rayloop.gate": "refused" if missed else "passed"})
        status = "FINISHED"
        if missed:
            raise StageRefused(
                f"int8 of {model} is outside its budget: {'; '.join(missed)}",
                "serve the version as it is, or widen the budget in `compression`",
                figures,
            )
        return Compressed(_publish(config, registry, made, tags), {**figures, "run_id": run_id})
    finally:
        registry.end_run(run_id, status)


def _work(config: Config, uri: str, table: TableVersion, made: Lineage) -> tuple[dict[str, Any], list[str]]:
    """Quantise, measure and, if the budget is kept, upload; returns the figures and what missed the budget."""
    options: dict[str, Any] = {"device_map": {"": "cuda"}} if config.training.use_gpu else {}
    from app import model as models

    with local_folder(uri) as source, tempfile.TemporaryDirectory() as aside:
        target = Path(aside) / "model"
        models.check_folder(source)
        tokenizer = models.load_tokenizer(source)
        blocks = data.validation_blocks(config, table, tokenizer, config.compression.validation_blocks)
        prompts = _prompts(config, table, tokenizer)
        before = gate.measure(source, blocks, prompts, BLOCKS_AT_ONCE, **options)
        quantize(source, target, config.compression.llm_int8_threshold)
        after = gate.measure(target, blocks, prompts, BLOCKS_AT_ONCE, **options)
        missed = gate.misses(config.compression, before, after)
        if not missed:
            if (source / "intent").is_dir():
                shutil.copytree(source / "intent", target / "intent")
            lineage.write(target, made)
            Storage(config.storage.uri).upload(target, *_place(made))
        return gate.figures(before, after, accepted=not missed), missed


def _prompts(config: Config, table: TableVersion, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """First questions of held-out conversations, as token ids."""
    rows = tables.read_local(config, table, ["messages"], "validation", PROMPTS)["messages"].to_pylist()
    if not rows:
        raise StageFailed(f"{table} holds nothing out for validation", "raise ingestion.validation_fraction")
    return [conversation.prompt_ids(tokenizer, messages[:1]) for messages in rows]


def _publish(config: Config, registry: Registry, made: Lineage, tags: dict[str, str]) -> ModelVersion:
    storage = Storage(config.storage.uri)
    uri = storage.uri(*_place(made))
    version = registry.register(made.run_id, uri, {**tags, "rayloop.stage": "compress"})
    known = json.dumps(asdict(replace(made, version=version.version)), indent=2)
    storage.write(known.encode(), *_place(made), lineage.FILE)
    registry.set_alias("candidate", version)
    return version


def _place(made: Lineage) -> tuple[str, str, str]:
    return "models", made.model, made.run_id


def _lineage(config: Config, model: ModelVersion, table: TableVersion, run_id: str) -> Lineage:
    return Lineage(
        model=model.model,
        version=None,
        run_id=run_id,
        stage="compress",
        table=table.table,
        snapshot_id=table.snapshot_id,
        sources=lineage.read(model.uri).sources,
        config_digest=config.digest(),
        code_version=code_version("compression"),
        job_id=job_id(),
        parent=model.version,
        created_at=lineage.now(),
    )
