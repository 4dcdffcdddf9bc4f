"""What a training run would read, compute, need and write; nothing is written to find out."""

import math
from typing import Any

import numpy as np
import ray

from app import tables
from app.config import Config
from app.settings.training import TrainingConfig
from app.storage import Storage
from app.training import checkpoint, data, memory, probe
from app.training.base_model import pinned
from app.training.launch import check_base_model, check_cluster
from app.training.loop import on_so_many_workers
from app.training.trainer import run_name
from app.training.worker import start_model
from app.versions import TableVersion

SAMPLED_CONVERSATIONS = 500


def plan(config: Config, table: TableVersion) -> dict[str, Any]:
    """The plan that `--dry-run` prints.

    Token counts are estimated from a sample of conversations, memory by formula, and the time from a few steps on the
    workers (`training.probe_steps`), if what they need of memory is there.

    Raises:
        ClusterError: No node will ever have room for the workers.
        ModelError: The base model cannot be loaded.
        StageFailed: The table version has nothing to train on.
    """
    start_from = config.training.base_model
    config, _ = pinned(config)
    check_base_model(config)
    training = config.training
    if ray.is_initialized():
        check_cluster(training)
    storage = Storage(config.storage.uri)
    tokenizer = data.make_tokenizer(config, table)
    sample = tables.read_local(config, table, ["messages"], "train", SAMPLED_CONVERSATIONS)
    lengths = [len(part.ids) for part in data.encode_all(sample, tokenizer, training.loss_on)]
    rows = round(tables.rows(config, table) * (1 - config.ingestion.validation_fraction))
    table_tokens = round(float(np.mean(lengths)) * rows)
    name = run_name(config, table)
    begun = checkpoint.begun(storage, f"checkpoints/{name}")
    if begun is not None:  # whose steps keep their blocks, on however many workers
        groups = training.max_workers // training.workers_per_batch
        training = on_so_many_workers(training, begun["blocks_per_step"], groups)
    from_step = begun["position"]["step"] if begun else 0
    step_tokens = training.blocks_per_step * training.block_tokens
    # How many tokens preference pairs have is known once they are packed.
    of_table = training.objective == "sft"
    return {
        "read": {"table": str(table), "conversations": rows, "tokens": table_tokens},
        "start_from": start_from,
        "method": training.method,
        "workers": training.num_workers,
        "zero_stage": training.zero_stage,
        "steps": training.max_steps,
        "tokens": training.max_steps * step_tokens,
        "epochs": round(training.max_steps * step_tokens / max(1, table_tokens), 2) if of_table else "not known",
        **_needs(training, tokenizer, training.max_steps - from_step),
        "write": {
            "blocks": storage.uri("packed", data.data_digest(config, table)),
            "checkpoints": storage.uri("checkpoints", name),
            "model": storage.uri("models", config.registry.model, "<run id>"),
        },
        "continues": begun is not None,
        "from_step": from_step,
    }


def _needs(training: TrainingConfig, tokenizer: Any, steps: int) -> dict[str, Any]:
    """Memory of a worker, whether it is there, and the time that so many steps and their validations take."""
    needed = memory.predict(start_model(training, tokenizer), training)
    found: dict[str, Any] = {"memory_bytes": needed.to_json()}
    if training.probe_steps == 0:
        return found | {"fits": "not looked: training.probe_steps is 0"}
    if not ray.is_initialized():
        return found | {"fits": "not looked: no Ray cluster is running here"}
    try:
        with probe.Workers(training) as workers:
            found["available_bytes"] = workers.available_bytes()
            on_top = 0 if training.use_gpu else needed.checkpoint
            found["fits"] = needed.peak + on_top <= found["available_bytes"]
            if not found["fits"]:
                return found | {"time": "not measured: the workers do not fit into memory"}
            if training.objective == "dpo":
                return found | {"time": "not measured: the probe knows no preference pairs"}
            speed = workers.speed(tokenizer, training.probe_steps)
    except TimeoutError as error:
        return found | {"fits": f"not looked: {error}"}
    found["memory_bytes"]["probe"] = speed.memory_bytes
    return found | {"time": _time(training, speed, steps)}


def _time(training: TrainingConfig, speed: probe.Speed, steps: int) -> dict[str, float]:
    """Seconds of a run that nothing interrupts, and what they are made of."""
    rounds = math.ceil(
        training.validation_blocks * training.workers_per_batch / training.micro_batch_size / training.max_workers
    )
    steps_s = steps * speed.step_s
    validations_s = math.ceil(steps / training.report_every_steps) * rounds * speed.validation_s
    return {
        "start_s": round(speed.start_s, 1),
        "step_s": round(speed.step_s, 4),
        "steps_s": round(steps_s, 1),
        "validations_s": round(validations_s, 1),
        "total_s": round(speed.start_s + steps_s + validations_s, 1),
    }
