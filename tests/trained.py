"""A registered model version made in seconds: real tokenizer, blocks and intent model, a short loop in plain torch."""

import json
from pathlib import Path

import numpy as np
import torch

from app import conversation, intent, lineage, tables
from app import model as models
from app.config import Config
from app.lineage import Lineage
from app.registry import Registry
from app.storage import Storage
from app.training.data import make_tokenizer
from app.training.packing import fill
from app.versions import ModelVersion, TableVersion

SETTINGS = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 128,
    "ingestion.sample.conversations": 400,
    "compression.validation_blocks": 16,
    "evaluation.validation_blocks": 16,
    "evaluation.replies": 20,
    "evaluation.max_reply_tokens": 24,
}


def train_quickly(config: Config, table: TableVersion, folder: Path, steps: int = 60) -> ModelVersion:
    """Train `preset:tiny` for some steps and register it the way jobs.train does."""
    tokenizer = make_tokenizer(config, table)
    rows = tables.read_local(config, table, ["messages"], "train", 200)["messages"].to_pylist()
    encoded = [conversation.encode(tokenizer, messages, "assistant") for messages in rows]
    blocks = fill(encoded, config.training.block_tokens, pad_id=0).columns()
    model = models.new_model(config.training.base_model, tokenizer, config.training.block_tokens, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    draw = np.random.default_rng(1)
    for _ in range(steps):
        rows_drawn = draw.integers(0, len(blocks["labels"]), 8)
        batch = {name: torch.from_numpy(column[rows_drawn]).long() for name, column in blocks.items()}
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models.save(model, tokenizer, folder)
    intent_model, _ = intent.fit_on_table(config, table)
    if intent_model is not None:
        intent_model.save(folder / "intent")
    return register(config, table, folder)


def register(config: Config, table: TableVersion, folder: Path) -> ModelVersion:
    """Make a model folder a version of stage train."""
    registry = Registry(config)
    run_id = registry.start_run("train", {}, {})
    sources = json.loads(tables.summary(config, table)["rayloop.sources"])
    name = config.registry.model
    made = Lineage(
        name, None, run_id, "train", table.table, table.snapshot_id, sources, "", "", "local", None, lineage.now()
    )
    lineage.write(folder, made)
    uri = Storage(config.storage.uri).upload(folder, "models", name, run_id)
    tags = {"rayloop.table": table.table, "rayloop.snapshot_id": str(table.snapshot_id)}
    version = registry.register(run_id, uri, {"rayloop.stage": "train", **tags})
    registry.end_run(run_id)
    return version
