"""Training on the real cluster: every ZeRO stage, and every way a run can be cut short."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from app import lineage, tables
from app.cluster import claimed
from app.config import Config
from app.errors import ClusterError, ModelError, StageFailed
from app.registry import Registry
from app.storage import Storage
from app.training import checkpoint, launch
from app.training.worker import Board, Event
from app.versions import ModelVersion, TableVersion
from tests.conftest import ROOT, RunningCluster
from tests.faults import Fault
from tests.training_runs import STEPS, checkpoints, finished, reports, run, starts, steps, tiny


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny(tmp_path_factory.mktemp("train") / "store")


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    from app.ingestion.pipeline import ingest

    return ingest(config).version


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
    # Those with the lowest loss, which falls to the end.
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


@pytest.mark.fault("F10", seen="the worker gone from /proc, a second start from a checkpoint")
@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_run_whose_worker_is_killed_goes_on_from_its_checkpoint_to_the_unbroken_loss(
    config: Config,
    table: TableVersion,
    unbroken: dict[int, float],
    stage: int,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "POLL_S", 0.05)  # the run must not be over before its steps are heard of
    pids: dict[int, int] = {}
    earliest, victim = fault.random.randrange(11, STEPS - 10), fault.random.randrange(2)
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event["kind"] == "start":
            pids[event["rank"]] = event["pid"]
        if event["kind"] == "report":
            killed.append(pids[victim]) if not killed else None
        if event["kind"] == "step" and event["step"] >= earliest and killed and not fault.has_happened:
            os.kill(killed[0], signal.SIGKILL)
            fault.happened()
            killed.append(event["step"])
        elif (
            event["kind"] == "step" and fault.has_happened and event["step"] == killed[1] and pids[victim] != killed[0]
        ):
            fault.recovered()  # where it was before

    heard = run(config.with_overrides({"training.zero_stage": stage}), table, f"killed-{stage}-{fault.seed}", kill)
    first, second = starts(heard)
    assert first == 0
    assert 10 <= second < STEPS
    assert steps(heard, 1) == list(range(second + 1, STEPS + 1))
    assert not Path(f"/proc/{killed[0]}").exists(), "it is still there"
    assert reports(heard)[STEPS] == pytest.approx(unbroken[STEPS], abs=1e-6 if stage == 2 else 1e-4)


def truncate(content: bytes, place: int) -> bytes:
    return content[:place]


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.fault("F13", seen="the file's digest is another one; the warning names it")
@pytest.mark.parametrize("spoil", [flip, pytest.param(truncate, marks=pytest.mark.slow)])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    config: Config,
    table: TableVersion,
    unbroken: dict[int, float],
    spoil: Any,
    fault: Fault,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"{spoil.__name__}-{fault.seed}"
    source = Path(Storage(config.storage.uri).path("checkpoints", "unbroken"))
    shutil.copytree(source, source.parent / name)
    _older, newest = checkpoints(config, name)
    held = [path for path in sorted(newest.rglob("*")) if path.is_file() and not path.name.startswith("sha256")]
    victim = fault.random.choice(held)
    content = victim.read_bytes()
    victim.write_bytes(spoil(content, fault.random.randrange(len(content))))
    fault.happened()
    assert checkpoint.newest_whole(Storage(config.storage.uri), f"checkpoints/{name}")
    assert f"{newest} is passed over: " in caplog.text
    heard = run(config, table, name)
    fault.recovered()
    assert starts(heard) == [50]
    assert reports(heard)[STEPS] == pytest.approx(unbroken[STEPS], abs=1e-6)


def test_a_checkpoint_whose_digests_were_lost_is_passed_over(
    config: Config, table: TableVersion, unbroken: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut may leave files of no bytes behind: the pieces, and with them what would have told."""
    source = Path(Storage(config.storage.uri).path("checkpoints", "unbroken"))
    shutil.copytree(source, source.parent / "emptied")
    older, newest = checkpoints(config, "emptied")
    for name in ("sha256-1", "state/pieces-00001.safetensors"):
        (newest / name).write_bytes(b"")
    found = checkpoint.newest_whole(Storage(config.storage.uri), "checkpoints/emptied")
    assert found is not None
    assert found.endswith(older.name)
    assert "sha256-1 has lost lines" in caplog.text


@pytest.mark.parametrize("record", ["of one that is gone", pytest.param("cut short", marks=pytest.mark.slow)])
def test_ray_trains_own_record_of_checkpoints_may_be_wrong(
    config: Config, table: TableVersion, unbroken: dict[int, float], caplog: pytest.LogCaptureFixture, record: str
) -> None:
    """With such a one its controller does not start (Ray 2.60)."""
    name = record.replace(" ", "-")
    source = Path(Storage(config.storage.uri).path("checkpoints", "unbroken"))
    shutil.copytree(source, source.parent / name)
    older, newest = checkpoints(config, name)
    kept = source.parent / name / launch.SNAPSHOT
    assert newest.name in kept.read_text()
    (newest / "state.json").unlink()
    if record == "cut short":
        kept.write_text(kept.read_text()[:100])
    heard = run(config, table, name)
    assert f"{kept} is set aside: " in caplog.text
    assert starts(heard) == [50]
    assert reports(heard)[STEPS] == pytest.approx(unbroken[STEPS], abs=1e-6)
    assert checkpoints(config, name)[0].name == older.name
    assert not newest.exists()


HOLD = """
import sys, time, ray
from app import cluster
ray.init(address=sys.argv[1], log_to_driver=False)
with cluster.claimed(sys.argv[2], "the-first-job"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_one_jobs_at_a_time_until_that_job_ends_in_whatever_way(
    config: Config, table: TableVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.training.trainer import run_name, train

    other_settings = config.with_overrides({"training.seed": 99})
    name = run_name(other_settings, table)
    held = Storage(config.storage.uri).uri("checkpoints", name)
    command = [sys.executable, "-W", "ignore", "-c", HOLD, ray.get_runtime_context().gcs_address, held]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr("app.cluster.CLAIM_S", 2.0)
        with pytest.raises(ClusterError, match=f"job the-first-job works on {held}"):
            train(other_settings, table)
        assert Registry(config).unfinished_run(name) is None, "nothing was begun that the first job would find"
    finally:
        other.kill()
        other.wait()
    monkeypatch.undo()
    for job in ("the-second", "the-third"):
        with claimed(held, job):
            pass


def test_an_event_that_cannot_be_recorded_costs_no_other(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[int] = []

    def report(event: Event) -> None:
        if event["kind"] == "step":
            if event["step"] == 2:
                raise OSError("the store is away")
            heard.append(event["step"])

    with claimed("events", "a-job", Board) as board, launch._listening(board, report):
        for step in range(1, 5):
            ray.get(board.post.remote({"kind": "step", "step": step}))
    assert heard == [1, 3, 4]
    assert "the store is away" in caplog.text


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_without_ray_give_the_losses_of_ray_train_and_go_on_from_its_checkpoints(
    config: Config, table: TableVersion, unbroken: dict[int, float], tmp_path: Path, launcher: str
) -> None:
    """torchrun trains from the start; deepspeed goes on from the checkpoint that Ray Train left at step 50."""
    file, events = tmp_path / "config.yaml", tmp_path / "events.jsonl"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    if launcher == "deepspeed":
        import shutil

        older, _ = checkpoints(config, "unbroken")
        shutil.copytree(older, older.parent.parent / launcher / older.name)
    command = [sys.executable, *LAUNCHERS[launcher], *(["-m"] if launcher == "torchrun" else [])]
    command += ["app.training.standalone", "--config", str(file), "--name", launcher, "--events", str(events)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # deepspeed looks for python and ninja there
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path, "RAY_ADDRESS": "there:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    heard = [json.loads(line) for line in events.read_text().splitlines()]
    assert starts(heard) == [50 if launcher == "deepspeed" else 0]
    losses = reports(heard)
    assert losses == pytest.approx({step: unbroken[step] for step in losses}, abs=1e-6)
    assert STEPS in losses
    line = next(json.loads(text) for text in done.stdout.splitlines() if '"status": "done"' in text)
    assert line["figures"]["validation_loss"] == losses[STEPS]
    kept = checkpoints(config, launcher)
    assert [checkpoint.state(path)["position"]["step"] for path in kept] == [50, 60]
    theirs = checkpoints(config, "unbroken")[-1]
    written = [{str(file.relative_to(path)) for file in path.rglob("*")} for path in (kept[-1], theirs)]
    assert written[0] == {name for name in written[1] if not name.startswith(".")}
    assert checkpoint.damaged(kept[-1]) is None
    if launcher == "torchrun":
        command += ["--set", "training.learning_rate=0.5"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "run torchrun has begun with learning_rate=0.002, got 0.5: give this run another --name" in done.stderr


def every_stage(given: dict[str, Any]) -> None:
    """Train with each ZeRO stage in the same two workers, then go on from its middle checkpoint in each of two."""
    import ray.train
    import torch.distributed as dist

    from app.training import data, loop, worker

    config, blocks, tokenizer, folder = given["config"], given["blocks"], given["tokenizer"], Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()
    take = data.Sequence(blocks, seed=5).take

    def run(name: str, stage: int, resume: Path | None = None) -> None:
        losses: dict[int, float] = {}

        def report(metrics: dict[str, float], part: Any) -> None:
            losses[int(metrics["step"])] = metrics["validation_loss"]
            own = folder / f"{name}-{rank}"
            part.write(own)
            shutil.copytree(own, folder / name / str(int(metrics["step"])), dirs_exist_ok=True)
            shutil.rmtree(own)
            dist.barrier()

        training = config.with_overrides({"training.zero_stage": stage}).training
        hooks = loop.Hooks(report=report, step=lambda values: None)
        loop.run(worker.start_model(training, tokenizer), tokenizer, training, take, blocks, hooks, resume)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))

    for stage in range(4):
        run(f"whole-{stage}", stage)
    for stage in range(4):
        for other in (stage, (stage + 1) % 4):
            run(f"resumed-{stage}-{other}", other, folder / f"whole-{stage}" / "10")


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 2e-3)])  # Muon iterates in bf16
def test_every_zero_stage_trains_two_workers_to_the_same_loss_and_goes_on_from_its_own_and_anothers_checkpoint(
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

    def loss(name: str) -> float:
        return float(json.loads((tmp_path / f"{name}.json").read_text())["20"])

    for stage in range(4):
        whole, other = loss(f"whole-{stage}"), (stage + 1) % 4
        assert whole == pytest.approx(loss("whole-0"), rel=tolerance)
        assert loss(f"resumed-{stage}-{stage}") == pytest.approx(whole, abs=1e-6)
        assert loss(f"resumed-{stage}-{other}") == pytest.approx(whole, rel=tolerance)
        models.load(tmp_path / f"whole-{stage}" / "20" / "model")


def submit(config_file: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.train", "--config", str(config_file)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.fault("F12", seen="the driver ended by the signal, in the middle")
@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_job_that_was_killed_goes_on_from_its_checkpoint_and_registers_the_model(
    config: Config, table: TableVersion, unbroken: dict[int, float], tmp_path: Path, how: signal.Signals, fault: Fault
) -> None:
    # Another model name for each way, so that the runs do not share checkpoints.
    model = f"support-{how.name.lower()}-{fault.seed}"
    slower = config.with_overrides({"registry.model": model, "training.max_steps": 150})
    from app.training.planning import plan
    from app.training.trainer import run_name

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(slower.model_dump(mode="json")))
    folder = Path(Storage(config.storage.uri).path("checkpoints", run_name(slower, table)))
    job = submit(file)
    deadline_s = time.monotonic() + 240
    while not finished(slower, folder.name):
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
    fault.happened()
    fewer = {"training.num_workers": 1, "training.zero_stage": 3}
    planned = plan(slower.with_overrides({**fewer, "training.probe_steps": 0}), table)
    assert (planned["continues"], planned["from_step"]) == (True, reached)
    assert planned["tokens"] == 150 * slower.training.blocks_per_step * slower.training.block_tokens
    begun = Registry(slower).unfinished_run(folder.name)
    output = submit(file).communicate(timeout=240)[0]
    line = json.loads(output.splitlines()[-1])
    assert line["status"] == "done", output
    fault.recovered()
    assert "goes on from the checkpoint of step" in output
    assert line["figures"]["run_id"] == begun
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
    others = [f"{key}={value}" for key, value in fewer.items()]
    again = json.loads(submit(file, *others).communicate(timeout=120)[0].splitlines()[-1])
    assert (again["status"], again["outputs"]) == ("up_to_date", line["outputs"]), "it is the same run"


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


def test_a_plan_says_that_workers_do_not_fit_into_memory(config: Config, table: TableVersion) -> None:
    from app.training.planning import plan

    planned = plan(config.with_overrides({"training.micro_batch_size": 2_000_000}), table)
    assert planned["fits"] is False
    assert planned["memory_bytes"]["peak"] > planned["available_bytes"]
    assert planned["time"] == "not measured: the workers do not fit into memory"


def test_a_plan_of_one_step_has_a_time_and_one_whose_steps_fail_has_the_reason(
    config: Config, table: TableVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.training import probe
    from app.training.planning import plan

    assert plan(config.with_overrides({"training.probe_steps": 1}), table)["time"]["step_s"] > 0
    monkeypatch.setattr(probe._Worker, "address", lambda self: "127.0.0.1:nowhere")
    with pytest.raises(StageFailed, match=r"the steps of the probe failed \(ValueError: .*nowhere"):
        plan(config, table)


def test_dry_run_plans_and_writes_nothing(config: Config, table: TableVersion, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = sorted(Path(config.storage.uri).rglob("*"))
    command = [sys.executable, "-m", "jobs.train", "--config", str(file), "--dry-run"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240).stdout
    planned = json.loads(output.splitlines()[-1])["figures"]["plan"]
    assert planned["read"]["table"] == str(tables.latest(config))
    assert planned["steps"] == STEPS
    assert 0 < planned["epochs"] < 100
    assert planned["fits"] is True
    # Libraries are nearly all that so small a model needs.
    assert planned["memory_bytes"]["peak"] == pytest.approx(planned["memory_bytes"]["probe"], rel=0.3)
    assert (
        planned["time"]["total_s"]
        >= planned["time"]["steps_s"]
        == pytest.approx(STEPS * planned["time"]["step_s"], rel=0.05)
    )
    assert sorted(Path(config.storage.uri).rglob("*")) == before
