"""One training run of one tool; the last line it prints is JSON with what it took and what it learned.

    python -m benchmarks.peers.training prepare FOLDER              # the table, packed and padded blocks, conversations
    python -m benchmarks.peers.training ray FOLDER '{settings}'     # our loop under Ray Train
    torchrun --nproc-per-node 2 -m benchmarks.peers.training trainer FOLDER '{settings}'      # transformers' Trainer
    torchrun --nproc-per-node 2 -m benchmarks.peers.training accelerate FOLDER '{settings}'   # a loop with accelerate
    torchrun --nproc-per-node 2 -m benchmarks.peers.training memory FOLDER '{settings}'       # bytes a parameter

The peers get padded batches of the product's own tokens, cut at the length of a block as the product cuts them, AdamW
with the product's groups and schedule, and as many tokens a step. Trainer: bf16, its own sampling by length, its
torch.compile by setting. accelerate: bf16, conversations of like length together in the same way.
"""

import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from app.config import Config, load
from app.storage import Storage

WARM_STEPS = 10
"""Steps at the start that are left out of rates."""
NAME = "bench"


def configuration(folder: Path, settings: dict[str, Any]) -> Config:
    """What the product trains with."""
    return load(folder / "config.yaml").with_overrides(settings)


def prepare(folder: Path) -> None:
    """Ingest and pack with Ray, and keep the conversations' tokens and padded blocks beside."""
    from app import tables
    from app.ingestion.pipeline import ingest
    from app.training import data
    from app.training.packing import NOT_LEARNED

    config = configuration(folder, {})
    _start_ray()
    table = ingest(config).version
    packed, tokenizer = data.prepare(config, table)
    rows = tables.read_local(config, table, ["messages"], "train", 1_000_000)
    size = config.training.block_tokens
    pieces = []
    for part in data.encode_all(rows, tokenizer, config.training.loss_on):
        for start in range(0, len(part.ids), size):
            ids, learned = part.ids[start : start + size], part.learned[start : start + size].copy()
            learned[0] = False
            pieces.append((ids, np.where(learned, ids, NOT_LEARNED)))
    np.savez(
        folder / "conversations.npz",
        ids=np.concatenate([ids for ids, _ in pieces]),
        labels=np.concatenate([labels for _, labels in pieces]),
        lengths=[len(ids) for ids, _ in pieces],
    )
    padded = _padded(pieces, size, data.pad_id(tokenizer))
    _write_blocks(Storage(config.storage.uri), packed, padded)
    real = sum(len(ids) for ids, _ in pieces)
    _say(
        packed=packed.digest, blocks=packed.blocks, conversations=len(pieces), tokens=real,
        padding=1 - real / (size * len(pieces)), packed_padding=1 - real / (size * packed.blocks),
    )  # fmt: skip


def _padded(pieces: list[tuple[np.ndarray, np.ndarray]], size: int, pad: int) -> dict[str, np.ndarray]:
    columns = {name: np.full((len(pieces), size), fill, np.int32) for name, fill in _FILL.items()}
    columns["input_ids"][:] = pad
    for row, (ids, labels) in enumerate(pieces):
        columns["input_ids"][row, : len(ids)] = ids
        columns["labels"][row, : len(ids)] = labels
        columns["position_ids"][row, : len(ids)] = np.arange(len(ids))
    return columns


_FILL = {"input_ids": 0, "position_ids": 0, "labels": -100}


def _write_blocks(storage: Storage, packed: Any, columns: dict[str, np.ndarray]) -> None:
    """Blocks of one conversation each, under the digest `padded`, with the tokenizer and held-out blocks of others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from app.training import data

    target = Path(storage.path("packed", "padded"))
    (target / "blocks").mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(1).permutation(len(columns["labels"]))
    lists = {name: pa.array(list(column[drawn]), pa.large_list(pa.int32())) for name, column in columns.items()}
    pq.write_table(pa.table(lists), target / "blocks" / "0.parquet")
    for part, uri in (("tokenizer", packed.tokenizer_uri), ("validation", packed.validation_uri)):
        (target / part).unlink(missing_ok=True)
        (target / part).symlink_to(storage.path(*uri.removeprefix(storage.root_uri).strip("/").split("/")))
    count = len(drawn)
    manifest = {"folder": ".", "files": ["0.parquet"], "blocks": count, "bytes": int(columns["labels"].nbytes) * 3}
    (target / data.MANIFEST).write_text(json.dumps(manifest))


def ray(folder: Path, settings: dict[str, Any]) -> None:
    """Our loop under Ray Train, on a local cluster of its own; its start is not counted."""
    from app import tables
    from app.training.trainer import run_training

    config = configuration(folder, settings)
    _start_ray()
    heard: list[dict[str, Any]] = []
    started_s = time.monotonic()
    name = f"ray-{os.getpid()}"
    uri = Storage(config.storage.uri).uri("checkpoints")
    run_training(config, tables.version(config), storage_path=uri, run_name=name, report=heard.append)
    _say(**of_events(heard), seconds=time.monotonic() - started_s)


def of_events(heard: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a run of our loop, from what worker 0 said."""
    steps = [event["step_s"] for event in heard if event["kind"] == "step"]
    last = [event for event in heard if event["kind"] == "report"][-1]
    return {
        "step_s": median(steps[WARM_STEPS:]),
        "steps_s": sum(steps),
        "tokens_per_s": last["tokens"] / len(steps) / (sum(steps[WARM_STEPS:]) / len(steps[WARM_STEPS:])),
        "tokens": last["tokens"],
        "validation_loss": last["validation_loss"],
        "stall": last["data_stall_fraction"],
    }


def trainer(folder: Path, settings: dict[str, Any]) -> None:
    """transformers' Trainer at its best settings."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, model, batches, collate = _peer(folder, settings)
    training = config.training
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    class Counting(Trainer):  # type: ignore[misc]
        def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
            found = super().get_batch_samples(*arguments, **options)
            seen.append(sum(int(batch["attention_mask"].sum()) for batch in found[0]))
            return found

    seen: list[int] = []
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=settings["peer.batch"],
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=training.gradient_clipping,
        warmup_steps=round(training.warmup_fraction * training.max_steps),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate_fraction},
        bf16=True,
        use_cpu=not training.use_gpu,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        torch_compile=settings.get("peer.compile", False),
        optim="adamw_torch_fused",
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=training.seed,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    Counting(model=model, args=arguments, train_dataset=batches, data_collator=collate, callbacks=[Clock()]).train()
    _finish(folder, config, model, times, seen)


def accelerate(folder: Path, settings: dict[str, Any]) -> None:
    """A loop of one's own with accelerate."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from app.training.deepspeed_config import ADAM_BETAS, learning_rate

    config, model, pieces, collate = _peer(folder, settings)
    training, batch = config.training, settings["peer.batch"]
    helper = Accelerator(mixed_precision="bf16", cpu=not training.use_gpu)
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1]},
        {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    adam: Any = partial(torch.optim.AdamW, betas=ADAM_BETAS, weight_decay=training.weight_decay, fused=True)
    draw = torch.Generator().manual_seed(training.seed)
    sampler = LengthGroupedSampler(batch * 2, lengths=[piece["length"] for piece in pieces], generator=draw)
    loader = DataLoader(pieces, batch_size=batch, sampler=sampler, collate_fn=collate, drop_last=True)
    wrapped, optimizer, loader = helper.prepare(model, adam(groups, lr=training.learning_rate), loader)
    times: list[float] = []
    seen: list[int] = []
    while len(times) < training.max_steps:
        for inputs in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(times), training)
            loss = wrapped(**inputs, use_cache=False).loss
            helper.backward(loss)
            helper.clip_grad_norm_(wrapped.parameters(), training.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(int(inputs["attention_mask"].sum()))
            times.append(time.monotonic())
            if len(times) == training.max_steps:
                break
    _finish(folder, config, model, times, seen)


def _peer(folder: Path, settings: dict[str, Any]) -> tuple[Config, Any, list[dict[str, Any]], Any]:
    """Configuration, model, conversations and how they become a batch."""
    import torch

    from app.training import data
    from app.training.worker import start_model

    torch.set_num_threads(1)
    ours = {name: value for name, value in settings.items() if not name.startswith("peer.")}
    config = configuration(folder, ours)
    packed = data.find(Storage(config.storage.uri), settings["peer.packed"])
    assert packed is not None
    tokenizer = data.load_tokenizer(packed)
    model = start_model(config.training, tokenizer)
    with np.load(folder / "conversations.npz") as kept:
        ends = np.cumsum(kept["lengths"])[:-1]
        parts = zip(np.split(kept["ids"], ends), np.split(kept["labels"], ends), strict=True)
        pieces = [{"input_ids": ids, "labels": labels, "length": len(ids)} for ids, labels in parts]
    pad = data.pad_id(tokenizer)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        size = max(piece["length"] for piece in batch)
        columns = {name: torch.full((len(batch), size), fill) for name, fill in (("input_ids", pad), ("labels", -100))}
        columns["attention_mask"] = torch.zeros(len(batch), size, dtype=torch.long)
        for row, piece in enumerate(batch):
            for name in ("input_ids", "labels"):
                columns[name][row, : piece["length"]] = torch.from_numpy(piece[name])
            columns["attention_mask"][row, : piece["length"]] = 1
        return columns

    return config, model, pieces, collate


def _finish(folder: Path, config: Config, model: Any, times: list[float], seen: list[int]) -> None:
    """What a peer took, and its model's loss on the held-out blocks."""
    import torch
    import torch.distributed as dist

    from app.training import data
    from app.training.packing import NOT_LEARNED

    packed = data.find(Storage(config.storage.uri), "padded")
    assert packed is not None
    held_out = {name: torch.from_numpy(column).long() for name, column in data.read_validation(packed).items()}
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(held_out["labels"])):
            inputs = {name: held_out[name][row : row + 1].to(model.device) for name in ("input_ids", "position_ids")}
            logits = model(**inputs, use_cache=False).logits[0, :-1].float().cpu()
            targets = held_out["labels"][row, 1:]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != NOT_LEARNED).sum())
    sums = torch.tensor([sum(seen[: len(times)]), sum(seen[WARM_STEPS : len(times)])])
    dist.all_reduce(sums)
    if dist.get_rank() == 0:
        took_s = times[-1] - times[WARM_STEPS - 1]
        steps = np.diff(times[WARM_STEPS - 1 :])
        _say(
            step_s=float(np.median(steps)), tokens_per_s=int(sums[1]) / took_s, tokens=int(sums[0]),
            validation_loss=total / count,
        )  # fmt: skip
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # accelerate's objects were seen to wait for ever for a group that is gone


def memory(folder: Path, settings: dict[str, Any]) -> None:
    """Bytes of tensors that this worker holds between two steps, and before its update, for each parameter."""
    import torch
    import torch.distributed as dist

    from app.training import data
    from app.training.engine import start_engine
    from app.training.loop import Computed, Stream
    from app.training.worker import start_model

    torch.set_num_threads(1)
    dist.init_process_group("nccl" if settings.get("training.use_gpu") else "gloo")
    for stage in range(4):
        config = configuration(folder, {**settings, "training.zero_stage": stage})
        training = config.training
        packed = data.find(Storage(config.storage.uri), "padded")
        assert packed is not None
        model = start_model(training, data.load_tokenizer(packed))
        parameters = sum(weight.numel() for weight in model.parameters())
        before = tensor_bytes()
        held = before - sum(weight.untyped_storage().nbytes() for weight in model.parameters())
        engine = start_engine(model, training)
        computed = Computed(engine, training)
        take = data.read(packed, training.seed).take
        stream = Stream(take, training, 0)
        at_update: list[int] = []

        def good(loss: float, seen: list[int] = at_update) -> bool:
            seen.append(tensor_bytes())
            return True

        for _ in range(3):
            computed.step(stream, training.gradient_accumulation_steps, good)
        if dist.get_rank() == 0:
            held_bytes = (at_update[-1] - held) / parameters
            print("MEMORY " + json.dumps({"stage": stage, "parameters": parameters, "bytes": held_bytes}), flush=True)
        del engine, computed, model, stream
        gc.collect()
    dist.destroy_process_group()


def tensor_bytes() -> int:
    """Of all storages that a tensor of this process refers to, its gradient's included."""
    import torch

    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _start_ray() -> None:
    import ray as cluster

    cluster.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def _say(**figures: Any) -> None:
    print("FIGURES " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    verb, where = sys.argv[1], Path(sys.argv[2])
    given = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    {"prepare": lambda *_: prepare(where), "ray": ray, "trainer": trainer, "accelerate": accelerate, "memory": memory}[
        verb
    ](where, given)
