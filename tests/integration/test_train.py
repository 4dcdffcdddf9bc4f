"""Training on the real cluster: every ZeRO stage, and every way a run can be cut short."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from app import lineage, tables
from app.config import Config
from app.errors import ClusterError, ModelError, StageFailed
from app.registry import Registry
from app.storage import Storage
from app.training import checkpoint
from app.training.worker import Event
from app.versions import ModelVersion, TableVersion
from tests.conftest import ROOT, RunningCluster

STEPS = 60
TINY = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 64,
    "training.micro_batch_size": 4,
    "training.max_steps": STEPS,
    "training.report_every_steps": 10,
    "training.validation_blocks": 16,
    "ingestion.sample.conversations": 400,
}


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config().with_overrides({**TINY, "storage.uri": str(tmp_path_factory.mktemp("train") / "store")})


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    from app.ingestion.pipeline import ingest

    return ingest(config).version


def run(config: Config, table: TableVersion, name: str, report: Any = None) -> list[Event]:
    """Train under a run name; returns everything the workers said."""
    from app.training.trainer import run_training

    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if report is not None:
            report(event)

    run_training(config, table, storage_path=Storage(config.storage.uri).uri("checkpoints"), run_name=name, report=hear)
    return heard


def reports(heard: list[Event]) -> dict[int, float]:
    return {event["step"]: event["validation_loss"] for event in heard if event["kind"] == "report"}


def starts(heard: list[Event]) -> list[int]:
    return [event["from_step"] for event in heard if event["kind"] == "start" and event["rank"] == 0]


def checkpoints(config: Config, name: str) -> list[Path]:
    folder = Path(Storage(config.storage.uri).path("checkpoints", name))
    return sorted(path for path in folder.iterdir() if checkpoint.FOLDER.match(path.name))


@pytest.fixture(scope="module")
def unbroken(config: Config, table: TableVersion) -> dict[int, float]:
    """Validation losses of a run that nothing happens to."""
    heard = run(config, table, "unbroken")
    assert starts(heard) == [0]
    losses = reports(heard)
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    assert losses[60] < losses[10] - 0.5
    return losses


def test_a_report_leaves_a_checkpoint_with_a_model_that_has_the_reported_loss(
    config: Config, table: TableVersion, unbroken: dict[int, float]
) -> None:
    import torch

    from app import model as models
    from app.training import data
    from app.training.packing import NOT_LEARNED

    kept = checkpoints(config, "unbroken")
    assert [checkpoint.state(path)["position"]["step"] for path in kept] == [50, 60]
    assert all(checkpoint.damaged(path) is None for path in kept)
    model, tokenizer = models.load(kept[-1] / "model")
    blocks = data.validation_blocks(config, table, tokenizer, config.training.validation_blocks)
    tensors = {name: torch.from_numpy(column).long() for name, column in blocks.items()}
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tensors["labels"][:, 1:].flatten(), ignore_index=NOT_LEARNED
    )
    assert float(loss) == pytest.approx(unbroken[STEPS], abs=1e-5)


def test_run_whose_worker_is_killed_goes_on_from_its_checkpoint_to_the_unbroken_loss(
    config: Config, table: TableVersion, unbroken: dict[int, float]
) -> None:
    pids: dict[int, int] = {}
    killed_at: list[int] = []

    def kill_after_the_first_checkpoint(event: Event) -> None:
        if event["kind"] == "start":
            pids[event["rank"]] = event["pid"]
        if event["kind"] == "report" and not killed_at:
            killed_at.append(event["step"])
            os.kill(pids[1], signal.SIGKILL)

    heard = run(config, table, "killed", kill_after_the_first_checkpoint)
    first, second = starts(heard)
    assert first == 0
    assert killed_at[0] <= second < STEPS
    after = [event["step"] for event in heard[heard_at(heard, second) :] if event["kind"] == "step"]
    assert after[0] == second + 1
    losses = reports(heard)
    assert losses[STEPS] == pytest.approx(unbroken[STEPS], abs=1e-6)


def heard_at(heard: list[Event], from_step: int) -> int:
    return max(
        index for index, event in enumerate(heard) if event["kind"] == "start" and event["from_step"] == from_step
    )


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    config: Config, table: TableVersion, unbroken: dict[int, float]
) -> None:
    import shutil

    name = "damaged"
    source = Path(Storage(config.storage.uri).path("checkpoints", "unbroken"))
    shutil.copytree(source, source.parent / name)
    _older, newest = checkpoints(config, name)
    shard = next((newest / "engine").rglob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    assert "optim_states.pt has changed" in (checkpoint.damaged(newest) or "")
    heard = run(config, table, name)
    assert starts(heard) == [50]
    assert reports(heard)[STEPS] == pytest.approx(unbroken[STEPS], abs=1e-6)


def every_stage(given: dict[str, Any]) -> None:
    """Train with each ZeRO stage in the same two workers, then go on from the middle checkpoint of each."""
    import ray.train

    from app.training import loop, worker

    config, blocks, tokenizer, folder = given["config"], given["blocks"], given["tokenizer"], Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()

    def batches(epoch: int) -> Any:
        order = np.random.default_rng(epoch).permutation(32).reshape(-1, 2, 4)
        return ({name: column[rows[rank]] for name, column in blocks.items()} for rows in order)

    for stage in range(4):
        training = config.with_overrides({"training.zero_stage": stage}).training
        losses: dict[int, float] = {}

        def report(metrics: dict[str, float], written: Path, stage: int = stage, losses: Any = losses) -> None:
            import shutil

            losses[int(metrics["step"])] = metrics["validation_loss"]
            shutil.copytree(written, folder / f"{stage}-{int(metrics['step'])}", dirs_exist_ok=True)

        hooks = loop.Hooks(report=report, step=lambda values: None)
        for resume in (None, folder / f"{stage}-10"):
            model = worker.start_model(training, tokenizer)
            loop.run(model, tokenizer, training, batches, blocks, hooks, resume)
            if rank == 0:
                name = f"losses-{stage}-{'resumed' if resume else 'whole'}.json"
                (folder / name).write_text(json.dumps(losses))


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 2e-3)])  # Muon iterates in bf16
def test_every_zero_stage_trains_two_workers_to_the_same_loss_and_resumes_exactly(
    config: Config, table: TableVersion, tmp_path: Path, optimizer: str, tolerance: float
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from app import model as models
    from app.training import data

    settings = {"training.optimizer": optimizer, "training.max_steps": 20, "training.report_every_steps": 10}
    shorter = config.with_overrides(settings)
    _, tokenizer = data.prepare(shorter, table)
    blocks = data.validation_blocks(shorter, table, tokenizer, 40)
    TorchTrainer(
        every_stage,
        train_loop_config={"config": shorter, "blocks": blocks, "tokenizer": tokenizer, "folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    whole = [json.loads((tmp_path / f"losses-{stage}-whole.json").read_text()) for stage in range(4)]
    resumed = [json.loads((tmp_path / f"losses-{stage}-resumed.json").read_text()) for stage in range(4)]
    for stage in range(4):
        assert whole[stage]["20"] == pytest.approx(whole[0]["20"], rel=tolerance)
        assert resumed[stage]["20"] == pytest.approx(whole[stage]["20"], abs=1e-6)
        models.load(tmp_path / f"{stage}-20" / "model")
    sharded = {file.name for file in (tmp_path / "3-20" / "engine").rglob("*.pt")}
    assert {name for name in sharded if name.startswith("zero_pp_rank_1")}, "stage 3 writes a share for each worker"


def submit(config_file: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.train", "--config", str(config_file)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_job_that_was_killed_goes_on_from_its_checkpoint_and_registers_the_model(
    config: Config, table: TableVersion, unbroken: dict[int, float], tmp_path: Path, how: signal.Signals
) -> None:
    # Another model name for each way, so that the runs do not share checkpoints.
    model = f"support-{how.name.lower()}"
    slower = config.with_overrides({"registry.model": model, "training.max_steps": 150})
    from app.training.trainer import run_name

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(slower.model_dump(mode="json")))
    folder = Path(Storage(config.storage.uri).path("checkpoints", run_name(slower, table)))
    job = submit(file)
    deadline_s = time.monotonic() + 240
    while not list(folder.glob("checkpoint_*/sha256-1")):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    job.send_signal(how)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == (143 if how is signal.SIGTERM else -9)
    if how is signal.SIGTERM:
        assert json.loads(output.splitlines()[-1])["error"].startswith("stopped by SIGTERM")
    reached = max(
        checkpoint.state(path)["position"]["step"]
        for path in checkpoints(slower, folder.name)
        if not checkpoint.damaged(path)
    )
    assert 0 < reached < 150, "it was stopped in the middle"

    output = submit(file).communicate(timeout=240)[0]
    line = json.loads(output.splitlines()[-1])
    assert line["status"] == "done", output
    assert "goes on from the checkpoint of step" in output
    version = ModelVersion(**line["outputs"]["model"])
    registry = Registry(slower)
    assert registry.exists(version)
    assert registry.version(None, "train") == version
    assert registry.tags(version)["rayloop.snapshot_id"] == str(table.snapshot_id)
    origin = lineage.read(version.uri)
    assert (origin.version, origin.snapshot_id, origin.run_id) == (
        version.version,
        table.snapshot_id,
        line["figures"]["run_id"],
    )
    assert sum(source["records"] for source in origin.sources) > 0
    assert {"validation_loss", "perplexity", "tokens_per_s", "tokens"} <= set(line["figures"])
    again = json.loads(submit(file).communicate(timeout=120)[0].splitlines()[-1])
    assert again["status"] == "up_to_date"
    assert again["outputs"] == line["outputs"]


def test_too_few_cpus_are_said_instead_of_waited_for(config: Config, table: TableVersion) -> None:
    greedy = config.with_overrides({"training.num_workers": 500})
    with pytest.raises(ClusterError, match=r"500 workers of 1 CPU each do not fit: the cluster has \d+ CPU"):
        run(greedy, table, "greedy")


def test_a_gpu_that_is_not_there_is_said_instead_of_waited_for(config: Config, table: TableVersion) -> None:
    with pytest.raises(ClusterError, match=r"the cluster has .* and 0 GPU"):
        run(config.with_overrides({"training.use_gpu": True}), table, "gpu")


def test_a_table_smaller_than_one_step_is_refused(config: Config, table: TableVersion) -> None:
    with pytest.raises(StageFailed, match=r"fills \d+ blocks of 64 tokens, one step takes 20000"):
        run(config.with_overrides({"training.micro_batch_size": 10_000}), table, "small")


def test_base_model_that_cannot_be_loaded_is_refused_before_workers_start(
    config: Config, table: TableVersion, tmp_path: Path
) -> None:
    from app.training.trainer import train

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for base_model, sentence in (
        ("preset:huge", "there is no preset 'huge': presets are tiny, small, base"),
        (str(tmp_path / "missing"), "there is no model folder '.*missing'"),
        (str(tmp_path), "holds no safetensors weights"),
    ):
        with pytest.raises(ModelError, match=sentence):
            train(config.with_overrides({"training.base_model": base_model}), table)


def test_dry_run_plans_and_writes_nothing(config: Config, table: TableVersion, store: str) -> None:
    from jobs.train import JOB

    before = sorted(Path(config.storage.uri).rglob("*"))
    planned = JOB.plan(config, JOB.inputs(config))
    assert planned["read"]["table"] == str(tables.latest(config))
    assert planned["steps"] == STEPS
    assert 0 < planned["epochs"] < 100
    assert sorted(Path(config.storage.uri).rglob("*")) == before
