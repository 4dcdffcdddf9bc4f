"""What a training run would read, compute and write; nothing is written to find out."""

from typing import Any

import numpy as np

from app import tables
from app.config import Config
from app.storage import Storage
from app.training import data
from app.training.base_model import pinned
from app.training.launch import check_base_model
from app.training.trainer import run_name
from app.versions import TableVersion

SAMPLED_CONVERSATIONS = 500


def plan(config: Config, table: TableVersion) -> dict[str, Any]:
    """The plan that `--dry-run` prints. Token counts are estimated from a sample of conversations.

    Raises:
        ModelError: The base model cannot be loaded.
        StageFailed: The table version has nothing to train on.
    """
    start_from = config.training.base_model
    config, _ = pinned(config)
    check_base_model(config)
    training = config.training
    storage = Storage(config.storage.uri)
    tokenizer = data.make_tokenizer(config, table)
    sample = tables.read_local(config, table, ["messages"], "train", SAMPLED_CONVERSATIONS)
    lengths = [len(part.ids) for part in data.encode_all(sample, tokenizer, training.loss_on)]
    rows = round(tables.rows(config, table) * (1 - config.ingestion.validation_fraction))
    table_tokens = round(float(np.mean(lengths)) * rows)
    step_tokens = training.blocks_per_step * training.block_tokens
    name = run_name(config, table)
    return {
        "read": {"table": str(table), "conversations": rows, "tokens": table_tokens},
        "start_from": start_from,
        "method": training.method,
        "workers": training.num_workers,
        "zero_stage": training.zero_stage,
        "steps": training.max_steps,
        "tokens": training.max_steps * step_tokens,
        "epochs": round(training.max_steps * step_tokens / max(1, table_tokens), 2),
        "write": {
            "blocks": storage.uri("packed", data.data_digest(config, table)),
            "checkpoints": storage.uri("checkpoints", name),
            "model": storage.uri("models", config.registry.model, "<run id>"),
        },
        "continues": storage.exists("checkpoints", name),
    }
