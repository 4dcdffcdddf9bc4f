"""Training while disks fill up, nodes come and go, controllers and drivers die, and losses are no numbers."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.config import Config
from app.errors import RegistryError, StageFailed, StorageError
from app.registry import Registry
from app.storage import Storage
from app.training import checkpoint
from app.training.worker import Event
from app.versions import TableVersion
from tests.conftest import ROOT, RunningCluster
from tests.faults import Fault
from tests.training_runs import STEPS, finished, reports, run, starts, tiny

BAD_LOSSES = "ray_rayloop_training_bad_losses_total{"


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny(tmp_path_factory.mktemp("faults") / "store")


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    from app.ingestion.pipeline import ingest

    return ingest(config).version


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.fault("F9", seen="the error says that no space was left on the device")
def test_a_full_disk_ends_the_run_with_the_reason_and_the_checkpoint_before_is_whole(
    config: Config, table: TableVersion, tmp_path: Path, fault: Fault
) -> None:
    from app import model as models

    config = config.with_overrides({"training.max_failures": 0, "training.max_steps": 30})
    disk = tmp_path / "disk"
    with small_disk(disk, fault.random.randrange(2_300, 3_700)):  # there is room for one checkpoint
        with pytest.raises(StorageError, match="No space left on device"):
            run(config, table, "full", storage_path=str(disk))
        fault.happened()
        storage = Storage(str(disk))
        before = checkpoint.newest_whole(storage, "full")
        assert before is not None
        assert checkpoint.state(Path(before))["position"]["step"] == 10
        models.load(Path(before) / "model")
        assert [name for name in storage.list("full") if checkpoint.FOLDER.match(name)] == [Path(before).name]
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        heard = run(config, table, "full", storage_path=str(disk))
        fault.recovered()
    assert starts(heard) == [10]
    assert reports(heard)[30] < reports(heard)[20]


def controllers() -> list[int]:
    """Process ids of the controllers of training on this machine that belong to the suite's cluster."""
    from tests.integration.test_ingest_faults import children, raylets

    return [pid for raylet in raylets() for pid, title in children(raylet).items() if "TrainController" in title]


@pytest.mark.slow
@pytest.mark.fault("F12", seen="the controller gone from /proc, a second start from a checkpoint")
def test_run_whose_controller_is_killed_goes_on_from_its_checkpoint(
    config: Config, table: TableVersion, fault: Fault
) -> None:
    clean = reports(run(config, table, f"clean-{fault.seed}"))
    killed: list[int] = []
    after = fault.random.choice((10, 20, 30, 40))

    def kill(event: Event) -> None:
        if event["kind"] == "report" and event["step"] >= after and not killed:
            killed.extend(controllers())
            assert len(killed) == 1, killed
            os.kill(killed[0], signal.SIGKILL)
            fault.happened()
        elif event["kind"] == "start" and fault.has_happened and event["rank"] == 0:
            fault.recovered()

    heard = run(config, table, f"headless-{fault.seed}", kill)
    assert not Path(f"/proc/{killed[0]}").exists()
    first, second = starts(heard)
    assert first == 0
    assert after <= second < STEPS
    assert reports(heard)[STEPS] == pytest.approx(clean[STEPS], abs=1e-6)


@pytest.mark.slow
@pytest.mark.fault("F12", seen="the driver ended by SIGKILL, in the middle")
def test_run_of_two_workers_in_stage_1_goes_on_with_one_worker_in_stage_3(
    config: Config, table: TableVersion, tmp_path: Path, fault: Fault
) -> None:
    from app.training.trainer import run_name

    longer = config.with_overrides(
        {
            "training.max_steps": 120,
            "training.zero_stage": 1,
            "training.keep_checkpoints": 9,
            "training.seed": fault.seed,  # or the next one would find this one's run
        }
    )
    fewer = longer.with_overrides({"training.num_workers": 1, "training.zero_stage": 3})
    name = run_name(longer, table)
    assert run_name(fewer, table) == name
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(longer.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.train", "--config", str(file)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wanted = fault.random.randrange(1, 4)
    deadline_s = time.monotonic() + 240
    while len(finished(longer, name)) < wanted:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    fault.happened()
    heard = run(fewer, table, name)
    fault.recovered()
    resumed = reports(heard)
    [first] = starts(heard)
    assert 10 <= first < 120
    unbroken = reports(run(longer, table, f"unbroken-{fault.seed}"))
    print(f"\nstep  unbroken  2 workers, stage 1 to step {first}, then 1 worker, stage 3")
    for step, loss in resumed.items():
        print(f"{step:4}  {unbroken[step]:.6f}  {loss:.6f}")
        assert loss == pytest.approx(unbroken[step], abs=2e-4)


ELASTIC = """
import json, os, subprocess, sys, time
import ray
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ray._private.node import Node
from ray.cluster_utils import Cluster
from app.ingestion.pipeline import ingest
from tests.training_runs import reports, run, tiny

store, seed, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
ports = {"dashboard_agent_listen_port": 53711, "metrics_export_port": 53712}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **ports})
second = {"num_cpus": 1, "dashboard_agent_listen_port": 53713, "metrics_export_port": 53714}
node = cluster.add_node(**second)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
# They set signal handlers, which only the main thread may.
Node._register_shutdown_hooks = lambda self: None
# A node dies with the thread that started it, and the one that hears of events ends with its run.
hands = ThreadPoolExecutor(1)
config = tiny(store).with_overrides({
    "training.num_workers": [1, 2], "training.resize_interval_s": 3, "training.micro_batch_size": 16,
    "training.max_steps": 390, "training.report_every_steps": 30, "training.block_tokens": 128,
})
table = ingest(config).version
seen = {"sizes": [], "nodes": [], "gone_at": None, "back_at": None, "told_at": None}
workers = set()

def hear(event):
    global node
    if event["kind"] == "start":
        if event["rank"] == 0:
            workers.clear()
            seen["sizes"].append([event["from_step"], event["workers"]])
            seen["nodes"].append(sum(n["Alive"] for n in ray.nodes()))
            if seen["gone_at"] and "shrunk_s" not in seen:
                seen["shrunk_s"] = time.monotonic() - seen["gone_s"]
    if event["kind"] == "step" and how == "preempt" and seen["told_at"] is None and event["step"] >= 40 + seed:
        seen["told_at"], seen["told_s"] = event["step"], time.monotonic()
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "12"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *notice], check=True)
    gone = event["kind"] == "step" and event["step"] >= 70 + 7 * seed
    if gone and seen["gone_at"] is None and (how == "remove" or time.monotonic() - seen["told_s"] > 12):
        seen["gone_at"], seen["gone_s"] = event["step"], time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
    shrunk = len(seen["sizes"]) > 1 and event["kind"] == "report" and event["step"] > seen["sizes"][1][0]
    if how == "remove" and shrunk and seen["back_at"] is None:
        seen["back_at"] = event["step"]
        node = hands.submit(cluster.add_node, **second).result()

heard = run(config, table, "elastic", hear)
if how == "remove":
    clean = reports(run(config.with_overrides({"training.num_workers": 2}), table, "clean"))
else:
    clean = {}
print(json.dumps([seen, reports(heard), clean]))
ray.shutdown()
cluster.shutdown()
"""


def on_nodes_that_come_and_go(store: Path, seed: int, how: str) -> Any:
    """An elastic run on two nodes of one CPU each, in a process of its own."""
    command = [sys.executable, "-c", ELASTIC, str(store), str(seed), how]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    said = [line for line in ended.stderr.splitlines() if "(raylet)" not in line]
    assert ended.returncode == 0, "\n".join(said[-60:])
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("[{")))


@pytest.mark.slow
@pytest.mark.fault("F11", seen="Ray counted one node; a start with one worker, and later one with two")
def test_elastic_run_shrinks_with_its_nodes_and_grows_again_and_no_block_is_lost(tmp_path: Path, fault: Fault) -> None:
    seen, found, clean = on_nodes_that_come_and_go(tmp_path / "store", fault.seed, "remove")
    fault.happened(seen["shrunk_s"])
    fault.recovered()
    print(seen)
    assert [workers for _, workers in seen["sizes"]][:3] == [2, 1, 2]
    assert seen["nodes"][1] == 1
    # As many blocks in each step, and the same ones: the loss is that of a run whose nodes stay.
    assert found["390"] == pytest.approx(clean["390"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.fault("F11", seen="a checkpoint at a step where none was due, before the node went")
def test_a_notice_of_preemption_leads_to_a_checkpoint_at_once(tmp_path: Path, fault: Fault) -> None:
    seen, found, _ = on_nodes_that_come_and_go(tmp_path / "store", fault.seed, "preempt")
    fault.happened()
    print(seen)
    out_of_turn = [int(step) for step in found if int(step) % 30]
    assert len(out_of_turn) == 1
    assert seen["told_at"] < out_of_turn[0]
    assert seen["sizes"][1][0] >= out_of_turn[0]
    assert seen["sizes"][1][1] == 1


def poisoned(given: dict[str, Any]) -> None:
    """Train in each ZeRO stage while a weight of worker 1 is spoilt for one step, twice; note what came of it."""
    import ray.train
    import torch
    import torch.distributed as dist

    from app.training import data, loop, pieces, worker

    config, blocks, tokenizer, folder = given["config"], given["blocks"], given["tokenizer"], Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()
    start_engine = loop.start_engine

    def train(stage: int, optimizer: str) -> list[Any]:
        training = config.with_overrides({"training.zero_stage": stage, "training.optimizer": optimizer}).training
        engines: list[Any] = []
        sequence = data.Sequence(blocks, seed=5)
        bad: list[dict[str, Any]] = []
        unchanged: list[bool] = []
        before: dict[str, Any] = {}

        def take(place: int, count: int) -> Any:
            """Before the forward pass of a step: what is spoilt is so in memory, as by a faulty chip."""
            step = place // (2 * count) + 1
            if before:
                held, sound = before.pop("spoilt")
                held.copy_(sound)
                after, _ = pieces.collect(engines[0])
                unchanged.append(all(torch.equal(before[name], after[name]) for name in before))
                before.clear()
            if step in (12, 14):
                weight = next(engines[0].module.parameters())
                held = (weight if weight.numel() else weight.ds_tensor).data  # stage 3 has a share of it, or all
                before.update(pieces.collect(engines[0])[0], spoilt=(held, held.clone()))
                if rank == 1:
                    held.mul_(float("nan") if step == 12 else 1e3)
            return sequence.take(place, count)

        def started(*arguments: Any) -> Any:
            engines.append(start_engine(*arguments))
            return engines[0]

        loop.start_engine = started
        hooks = loop.Hooks(lambda metrics, part: None, lambda values: None, bad.append)
        loop.run(worker.start_model(training, tokenizer), tokenizer, training, take, blocks, hooks, checkpoints=False)
        everywhere: list[Any] = [None, None]
        dist.all_gather_object(everywhere, unchanged)
        return [stage, optimizer, bad, everywhere]

    found = [train(stage, optimizer) for stage, optimizer in given["engines"]]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.fault("F14", seen="the loop told of a loss that is no number, and of one that jumped")
def test_a_bad_step_changes_nothing_on_any_worker(
    config: Config, table: TableVersion, tmp_path: Path, fault: Fault
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from app.training import data

    shorter = config.with_overrides({"training.max_steps": 16, "training.bad_loss_factor": 2.0})
    _, tokenizer = data.prepare(shorter, table)
    blocks = data.validation_blocks(shorter, table, tokenizer, 40)
    engines = [(stage, optimizer) for stage in range(4) for optimizer in ("adamw", "muon")]
    given = {"config": shorter, "blocks": blocks, "tokenizer": tokenizer, "folder": str(tmp_path), "engines": engines}
    TorchTrainer(
        poisoned,
        train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(engines)
    for stage, optimizer, bad, unchanged in found:
        assert [(event["step"], event["action"]) for event in bad] == [(12, "skip"), (14, "skip")], (stage, optimizer)
        assert math.isnan(bad[0]["loss"])
        assert bad[1]["loss"] > 2
        assert unchanged == [[True, True], [True, True]], (stage, optimizer)
    fault.happened()


def roll_back(given: dict[str, Any]) -> None:
    """Spoil a weight for good at a step, so that only an earlier checkpoint can help."""
    import shutil

    import ray.train
    import torch.distributed as dist

    from app.training import data, loop, worker

    training, tokenizer, folder = given["training"], given["tokenizer"], Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()
    sequence = data.Sequence(given["blocks"], seed=5)
    model = worker.start_model(training, tokenizer)
    places: list[int] = []
    bad: list[dict[str, Any]] = []
    steps: list[int] = []

    def take(place: int, count: int) -> Any:
        step = place // (2 * count) + 1
        if step == given["step"] and rank == 1 and not any(place == earlier for earlier in places):
            next(model.parameters()).data.fill_(float("nan"))
        places.append(place)
        return sequence.take(place, count)

    def report(metrics: dict[str, float], part: Any) -> None:
        own = folder / f"own-{rank}"
        part.write(own)
        shutil.copytree(own, folder / "kept", dirs_exist_ok=True)
        shutil.rmtree(own)
        dist.barrier()

    @contextmanager
    def newest() -> Iterator[Path | None]:
        yield folder / "kept"

    hooks = loop.Hooks(report, lambda values: steps.append(int(values["step"])), bad.append, newest)
    loop.run(model, tokenizer, training, take, given["blocks"], hooks)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps([places, steps, bad]))


@pytest.mark.slow
@pytest.mark.fault("F14", seen="the loop told of a loss that is no number")
def test_a_spoilt_weight_is_cured_by_the_last_checkpoint(
    config: Config, table: TableVersion, tmp_path: Path, fault: Fault
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from app.training import data

    step = fault.random.randrange(12, 20)
    shorter = config.with_overrides({"training.max_steps": 20, "training.on_bad_loss": "roll_back"})
    _, tokenizer = data.prepare(shorter, table)
    blocks = data.validation_blocks(shorter, table, tokenizer, 40)
    given = {"training": shorter.training, "blocks": blocks, "tokenizer": tokenizer, "folder": str(tmp_path)}
    TorchTrainer(
        roll_back,
        train_loop_config={**given, "step": step},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    places, steps, bad = json.loads((tmp_path / "found.json").read_text())
    assert [(event["step"], event["action"]) for event in bad] == [(step, "roll_back")]
    assert math.isnan(bad[0]["loss"])
    fault.happened()
    assert steps == [*range(1, step), *range(11, 21)]
    assert places.count(8 * (step - 1)) == 1, "the blocks of the bad step are left out"
    assert places[-1] == 8 * 20
    assert checkpoint.state(tmp_path / "kept")["position"]["step"] == 20


@pytest.mark.slow
@pytest.mark.fault("F14", seen="the loss was no number from the second step on; the metric counted it")
def test_a_diverging_run_ends_with_the_reason_and_nothing_is_registered(
    config: Config, table: TableVersion, cluster: RunningCluster, fault: Fault
) -> None:
    from app.training.trainer import run_name, train

    wild = config.with_overrides(
        {
            "registry.model": f"wild-{fault.seed}",
            "training.learning_rate": 1e25,  # after the first update no product of two weights is a number any more
            "training.warmup_fraction": 0.0,
            "training.max_steps": 10_000,
            "training.report_every_steps": 10_000,
            "training.max_bad_losses": 1_200,
        }
    )
    ended = threading.Event()
    counted: set[float] = set()

    def watch() -> None:
        while not ended.wait(0.5):
            lines = httpx.get(cluster.metrics_url).text.splitlines()
            counted.update(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(BAD_LOSSES))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(StageFailed, match=r"the loss at step 1202 is nan, after 1200 bad ones"):
            train(wild, table)
    finally:
        ended.set()
        watching.join()
    fault.happened()
    assert max(counted) > 0
    with pytest.raises(RegistryError):
        Registry(wild).version(None, "train")
    assert finished(wild, run_name(wild, table)) == []
