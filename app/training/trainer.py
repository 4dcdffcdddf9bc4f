"""Training as a whole: blocks, Ray Train workers, checkpoints, and in the end a registered model version.

    ray job submit --working-dir . -- python -m jobs.train --config jobs/configs/demo.yaml

A run's name follows from the table version, what it learns by (TrainingConfig.identity) and the code, and its
checkpoints lie under `checkpoints/<name>`: a job that is submitted again after any kind of end goes on from the newest
of them, also with another number of workers or in another ZeRO stage.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app import cluster, lineage, tables
from app.adapter import FOLDER as ADAPTER
from app.config import Config
from app.errors import StageFailed
from app.job import job_id
from app.lineage import Lineage
from app.registry import Registry, closing
from app.storage import Storage
from app.telemetry import Progress, progress
from app.training import adapters, checkpoint, data, preference_blocks, report
from app.training.base_model import pinned, source
from app.training.launch import check_base_model, check_cluster, run_training
from app.training.worker import Board, Event
from app.versions import ModelVersion, TableVersion, as_json, code_version, digest

__all__ = ["Trained", "run_name", "run_training", "train"]

logger = logging.getLogger(__name__)

PUBLISHED = "published.json"
"""Beside a run's checkpoints: the version that was registered."""


@dataclass(frozen=True)
class Trained:
    """What training gave."""

    version: ModelVersion
    figures: dict[str, Any]
    is_new: bool = True
    """Whether it was registered now, and not by an earlier job."""


def train(config: Config, table: TableVersion) -> Trained:
    """Train on a table version and register the model, going on from an earlier attempt's checkpoints. A run that has
    been registered is not registered again, whatever number of workers or ZeRO stage it is submitted with.

    Raises:
        ModelError: The base model cannot be loaded.
        RegistryError: The base model is a version that is not registered.
        ClusterError: The cluster cannot hold the workers, or another job trains the same run.
        StageFailed: The table is too small, or workers failed too often.
    """
    config, base = pinned(config)
    check_base_model(config)
    check_cluster(config.training)
    storage = Storage(config.storage.uri)
    name = run_name(config, table)
    with cluster.claimed(storage.uri("checkpoints", name), job_id(), Board) as board:
        return _published(config, storage, name) or _train(config, table, name, base, board)


def _train(config: Config, table: TableVersion, name: str, base: ModelVersion | None, board: Any) -> Trained:
    storage = Storage(config.storage.uri)
    place = storage.uri("checkpoints")
    with _recorded(config, table, name) as record:
        if _finished(storage, name, config) is None:
            run_training(config, table, storage_path=place, run_name=name, report=record.hear, board=board)
        uri = _finished(storage, name, config)
        if uri is None:
            raise StageFailed(
                f"the last checkpoint of run {name} under {storage.uri('checkpoints', name)} is damaged",
                "submit the job again: it goes on from the checkpoint before",
            )
        version, figures = _publish(config, table, uri, record, base)
    known = {"publish": config.training.publish, "model": as_json(version), "figures": figures}
    storage.write(json.dumps(known, default=float).encode(), "checkpoints", name, PUBLISHED)
    return Trained(version, figures)


def _published(config: Config, storage: Storage, name: str) -> Trained | None:
    """What an earlier job has made of the same run, if that can still be used."""
    if not storage.exists("checkpoints", name, PUBLISHED):
        return None
    known = json.loads(storage.read("checkpoints", name, PUBLISHED))
    version = ModelVersion(**known["model"])
    if known["publish"] != config.training.publish or not Registry(config).exists(version):
        return None
    return Trained(version, known["figures"], is_new=False)


def run_name(config: Config, table: TableVersion) -> str:
    """Names a run and its checkpoints: the same for the same table version, the same code, and settings that it
    learns by; not for those that only say how it is computed."""
    parts = [data.data_digest(config, table), config.training.identity(), code_version("training")]
    if config.training.objective == "dpo":
        parts.append(preference_blocks.pairs_digest(config))
    return f"{config.registry.model}-{digest(parts)[:16]}"


class _Record:
    """A run as MLflow and the job's log show it."""

    def __init__(self, config: Config, table: TableVersion, name: str, bar: Progress) -> None:
        self.registry = Registry(config)
        self.starts = self.bad_losses = 0
        self._bar = bar
        # MLflow takes seconds to import and to open its store: meanwhile the blocks are made.
        self._opening = ThreadPoolExecutor(1).submit(self._open, config, table, name)

    @property
    def run_id(self) -> str:
        """The MLflow run; the first call waits until it is there."""
        return self._opening.result()

    def hear(self, event: Event) -> None:
        """Show one of the workers' events."""
        values = {key: value for key, value in event.items() if key not in ("kind", "step")}
        if event["kind"] == "step":
            self._bar.update(event["step"], f"loss {event['loss']:.3f}, {event['tokens_per_s']:,.0f} tokens/s")
            if event["step"] % 10 == 0:
                self.registry.log_metrics(self.run_id, values, event["step"])
        elif event["kind"] == "report":
            self.registry.log_metrics(self.run_id, values, event["step"])
            logger.info("step %d", event["step"], extra={"fields": values})
        elif event["kind"] == "bad_loss":
            self.bad_losses += 1
            self.registry.log_metrics(self.run_id, {"bad_losses": self.bad_losses}, event["step"])
            logger.warning("bad loss at step %d", event["step"], extra={"fields": values})
        elif event["kind"] == "start" and event["rank"] == 0:
            self.starts += 1
            self.registry.log_metrics(self.run_id, {"workers": event["workers"]}, event["from_step"])
            if event["from_step"]:
                print(f"train: goes on from the checkpoint of step {event['from_step']}", flush=True)
        else:
            self._bar.update(self._bar.done, self._bar.note or "(workers are starting)")

    def _open(self, config: Config, table: TableVersion, name: str) -> str:
        found = self.registry.unfinished_run(name)
        if found is not None:
            return found
        tags = {"rayloop.run": name, "rayloop.table": table.table, "rayloop.snapshot_id": str(table.snapshot_id)}
        params = {f"training.{key}": value for key, value in config.training.model_dump(mode="json").items()}
        return self.registry.start_run("train", {"table": str(table), **params}, {**tags, "rayloop.job": job_id()})


@contextmanager
def _recorded(config: Config, table: TableVersion, name: str) -> Iterator[_Record]:
    """A record whose MLflow run is closed as what became of it."""
    with progress("train", config.training.max_steps, "steps") as bar:
        record = _Record(config, table, name, bar)
        with closing(lambda status: record.registry.end_run(record.run_id, status)):
            yield record


def _finished(storage: Storage, name: str, config: Config) -> str | None:
    """The URI of the checkpoint to publish, None while there is none of the last step."""
    run = f"checkpoints/{name}"
    uri = checkpoint.newest_whole(storage, run)
    with checkpoint.fetched(uri) as folder:
        if folder is None or checkpoint.state(folder)["position"]["step"] < config.training.max_steps:
            return None
    return checkpoint.best_whole(storage, run) if config.training.publish == "best" else uri


def _publish(
    config: Config, table: TableVersion, checkpoint_uri: str, record: _Record, base: ModelVersion | None
) -> tuple[ModelVersion, dict[str, Any]]:
    """Complete the model folder, prove that it loads, upload and register it."""
    storage = Storage(config.storage.uri)
    place = ("models", config.registry.model, record.run_id)
    made = _lineage(config, table, record.run_id, base)
    with checkpoint.fetched(checkpoint_uri) as folder, tempfile.TemporaryDirectory() as aside:
        assert folder is not None
        state = checkpoint.state(folder)
        metrics = state["metrics"]
        model_folder = Path(aside) / "model"
        figures = _figures(metrics, record.run_id)
        if config.training.method == "lora":
            figures |= _merge(config, table, folder / ADAPTER, model_folder, metrics["perplexity"])
        else:
            shutil.copytree(folder / "model", model_folder)
        figures |= {
            **_fit_intent(config, table, model_folder),
            "padding_fraction": 1 - metrics["tokens"] / (state["position"]["blocks"] * config.training.block_tokens),
            "starts": record.starts,
            "bad_losses": record.bad_losses,
        }
        lineage.write(model_folder, made)
        about = {**figures, "conversations": tables.rows(config, table)}
        (model_folder / report.CARD).write_text(report.card(config, made, about), encoding="utf-8")
        _load_test(model_folder)
        uri = storage.upload(model_folder, *place)
    tags = {
        "rayloop.stage": "train",
        "rayloop.table": table.table,
        "rayloop.snapshot_id": str(table.snapshot_id),
        "rayloop.validation_loss": f"{metrics['validation_loss']:.6f}",
    }
    if base is not None:
        tags["rayloop.base_model"] = f"{base.model}/{base.version}"
    version = record.registry.register(record.run_id, uri, tags)
    known = json.dumps(asdict(replace(made, version=version.version)), indent=2)
    storage.write(known.encode(), *place, lineage.FILE)
    report.write(config, table, record.run_id, record.registry.history(record.run_id, report.METRICS), figures)
    return version, figures


def _merge(config: Config, table: TableVersion, adapter: Path, model_folder: Path, wanted: float) -> dict[str, Any]:
    """Make the model folder of a run that trained adapters; its figures: bytes, and the merged model's perplexity.

    Raises:
        StageFailed: That is not the adapted model's, `wanted`.
    """
    from app import evaluation
    from app import model as models

    training = config.training
    adapters.merge(training, source(training.base_model), adapter, model_folder)
    model, tokenizer = models.load(model_folder)
    blocks = data.validation_blocks(config, table, tokenizer, training.validation_blocks)
    perplexity = evaluation.perplexity(model, blocks, training.micro_batch_size)
    # Written so that one that is not a number fails too.
    if not abs(perplexity - wanted) <= checkpoint.SCORE_TOLERANCE * wanted:
        raise StageFailed(
            f"the merged model has perplexity {perplexity:.4g} on held-out blocks, and {wanted:.4g} with its adapters "
            "apart",
            "train with training.precision=fp32",
        )
    adapters.keep(adapter, model_folder, training.base_model)
    return {
        "merged_perplexity": perplexity,
        "adapter_bytes": models.weights_bytes(model_folder / ADAPTER),
        "model_bytes": models.weights_bytes(model_folder),
    }


def _figures(metrics: dict[str, float], run_id: str) -> dict[str, Any]:
    names: tuple[str, ...] = ("validation_loss", "perplexity", "training_loss", "tokens_per_s", "tokens")
    names += tuple(name for name in ("reward_margin", "reward_accuracy") if name in metrics)
    return {**{name: metrics[name] for name in names}, "steps": metrics["step"], "run_id": run_id}


def _fit_intent(config: Config, table: TableVersion, model_folder: Path) -> dict[str, Any]:
    from app.intent import fit_on_table

    intent_model, figures = fit_on_table(config, table)
    if intent_model is not None:  # nothing in the table is labelled
        intent_model.save(model_folder / "intent")
    return {f"intent_{name.removeprefix('intent_')}": value for name, value in figures.items()}


def _load_test(model_folder: Path) -> None:
    """Load the folder as serving will, and compute one token with it."""
    import torch

    from app import model as models

    model, tokenizer = models.load(model_folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[data.pad_id(tokenizer)]])).logits
    if not bool(torch.isfinite(logits).all()):
        raise StageFailed(
            "the trained model's output is not finite", "lower training.learning_rate, or use training.precision=fp32"
        )


def _lineage(config: Config, table: TableVersion, run_id: str, base: ModelVersion | None) -> Lineage:
    return Lineage(
        model=config.registry.model,
        version=None,
        run_id=run_id,
        stage="train",
        table=table.table,
        snapshot_id=table.snapshot_id,
        sources=lineage.sources_of(config, table),
        config_digest=config.digest(),
        code_version=code_version("training"),
        job_id=job_id(),
        parent=f"{base.model}/{base.version}" if base else None,
        created_at=lineage.now(),
    )
