"""Ingestion while workers and nodes are killed: the rows are those of a run that nobody disturbed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from app import tables
from app.config import Config
from app.ingestion.batch import _decided as decided
from app.ingestion.examination import Examiner, examine
from app.ingestion.pipeline import Ingested, ingest
from tests.conftest import ROOT, RunningCluster
from tests.faults import Fault

pytestmark = pytest.mark.usefixtures("cluster")

RECORDS = 12_000


def shop(store: str) -> Config:
    return Config().with_overrides({"storage.uri": store, "ingestion.sample.conversations": RECORDS})


def kept(config: Config) -> list[tuple[str, int]]:
    rows = tables.read_local(config, tables.latest(config), ["content_hash", "position"]).to_pylist()
    return [(row["content_hash"], row["position"]) for row in rows]


def refused(config: Config) -> list[tuple[str, int]]:
    rows = tables.open_table(config.storage, config.ingestion.quarantine_table).scan().to_arrow().to_pylist()
    return sorted((row["reason"], row["position"]) for row in rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: RunningCluster) -> tuple[Any, Any, Ingested]:
    config = shop(str(tmp_path_factory.mktemp("undisturbed") / "store"))
    result = ingest(config)
    return kept(config), refused(config), result


def children(process_id: int) -> dict[int, str]:
    """Process ids and command lines of the processes that one has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process_id:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return found


def state(process_id: int) -> str:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def halted(title: str, parent: int, sightings: int, chance: random.Random) -> Iterator[int]:
    """A child process that stands still in the middle of its work until the block ends.

    Args:
        title: What it works on.
        parent: A raylet.
        sightings: How often at most it is seen at work before; how often indeed, and which one it is, is left to
            chance.
    """
    left = chance.randrange(sightings)
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        at_work = [number for number, command in children(parent).items() if command.startswith(f"ray::{title}")]
        if at_work and left == 0:
            process_id = chance.choice(sorted(at_work))
            os.kill(process_id, signal.SIGSTOP)
            try:
                while state(process_id) != "T":
                    time.sleep(0.001)
                if process_id in (now := children(parent)) and now[process_id].startswith(f"ray::{title}"):
                    yield process_id
                    return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGCONT)
        left -= bool(at_work and left)
        time.sleep(0.01)
    raise AssertionError(f"no process worked on {title}")


def raylets() -> list[int]:
    """Those of the suite's cluster, the head's first."""
    mark = os.environ["RAY_ADDRESS"].rpartition(":")[2]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[0].endswith(b"/raylet") and any(part.endswith(b":" + mark.encode()) for part in command):
            found.append(int(folder.name))
    return sorted(found)


class Killing(threading.Thread):
    """Kills a worker in the middle of its work, or the raylet that it belongs to."""

    def __init__(self, at_work: AbstractContextManager[int], raylet: int | None = None) -> None:
        super().__init__(daemon=True)
        self._at_work, self._raylet = at_work, raylet
        self.killed: int | None = None
        self.at_s = 0.0
        self.failed: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._at_work as worker:
                self.killed = self._raylet or worker
                os.kill(self.killed, signal.SIGKILL)
                self.at_s = time.monotonic()
        except BaseException as error:
            self.failed = error

    def seconds_ago(self) -> float:
        """Since when it is dead."""
        self.join()
        assert self.failed is None, self.failed
        return time.monotonic() - self.at_s


def decided_at_leisure(keys: list[Any], held: list[Any], refuse_repeated_ids: bool) -> pa.Table:
    """The decision, by a worker that does not answer at once: so few records are decided faster than it is found."""
    verdicts = decided(keys, held, refuse_repeated_ids)
    time.sleep(2.0)
    return verdicts


@pytest.mark.fault("F1", seen="stopped while it worked, killed, gone from /proc")
@pytest.mark.parametrize(
    ("title", "sightings"),
    [("MapBatches", 30), ("finalise", 20), (decided_at_leisure.__name__, 20)],
    ids=["examination", "finalisation", "decision"],
)
def test_killing_a_worker_changes_no_row(
    title: str,
    sightings: int,
    store: str,
    undisturbed: tuple[Any, Any, Ingested],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr("app.ingestion.batch._decided", decided_at_leisure)
    config = shop(store)
    killing = Killing(halted(title, raylets()[0], sightings, fault.random))
    result = ingest(config)
    fault.happened(killing.seconds_ago())
    fault.recovered()
    assert not Path(f"/proc/{killing.killed}").exists(), "it is still there"
    assert (kept(config), refused(config)) == undisturbed[:2]
    assert result.figures == undisturbed[2].figures
    assert len(tables.open_table(config.storage, config.ingestion.table).snapshots()) == 1


def dying(batch: pa.Table, examiner: Examiner, turn: int) -> pa.Table:
    """Examine a block; the worker whose turn it is dies before it can say so."""
    keys = examine(batch, examiner)
    for number in range(turn + 1):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(examiner.staging.storage.path(f"turn-{number}"), os.O_CREAT | os.O_EXCL))
            if number == turn:
                os.kill(os.getpid(), signal.SIGKILL)
            break
    return keys


@pytest.mark.fault("F1", seen="the block's worker killed itself; the metric of retries went up")
def test_a_block_that_is_examined_again_is_counted(
    store: str,
    cluster: RunningCluster,
    undisturbed: tuple[Any, Any, Ingested],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    before = retries(cluster)
    turn = fault.random.randrange(3)
    monkeypatch.setattr("app.ingestion.batch.examine", partial(dying, turn=turn))
    config = shop(store)
    ingest(config)
    fault.happened(time.time() - Path(store, f"turn-{turn}").stat().st_mtime)
    fault.recovered()
    assert (kept(config), refused(config)) == undisturbed[:2]
    deadline_s = time.monotonic() + 90  # Ray exports every 10 s
    while retries(cluster) == before:
        assert time.monotonic() < deadline_s, "no retry was counted"
        time.sleep(0.5)


def retries(cluster: RunningCluster) -> float:
    lines = httpx.get(cluster.metrics_url, timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("ray_rayloop_ingest_retries_total{"))


TWO_NODES = """
import json, random, sys, time
import ray
from ray.cluster_utils import Cluster
from app.ingestion.pipeline import ingest
from tests.integration.test_ingest_faults import Killing, halted, kept, refused, shop

store, seed = sys.argv[1], sys.argv[2]
ports = {"dashboard_agent_listen_port": 53701, "metrics_export_port": 53702}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **ports})
ports = {"dashboard_agent_listen_port": 53703, "metrics_export_port": 53704}
second = cluster.add_node(num_cpus=2, **ports)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
raylet = second.all_processes["raylet"][0].process.pid
if seed:
    killing = Killing(halted("MapBatches", raylet, 40, random.Random(int(seed))), raylet)
config = shop(store)
started_s = time.monotonic()
result = ingest(config)
seconds = time.monotonic() - started_s
recovery_s = killing.seconds_ago() if seed else None
alive = sum(node["Alive"] for node in ray.nodes())
print(json.dumps([alive, seconds, recovery_s, kept(config), refused(config), result.figures]))
"""


def on_two_nodes(store: Path, seed: int | None = None) -> Any:
    """An ingest on a cluster of two nodes, in a process of its own; with a seed, one of them is killed."""
    command = [sys.executable, "-c", TWO_NODES, str(store), "" if seed is None else str(seed)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3_000:]
    return json.loads(ended.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a run whose nodes both stay."""
    alive, *rest = on_two_nodes(tmp_path_factory.mktemp("whole") / "store")
    assert alive == 2
    return rest


@pytest.mark.slow
@pytest.mark.fault("F2", seen="a worker of the node halted at its work, its raylet killed; Ray counts one node")
def test_killing_a_node_changes_no_row(tmp_path: Path, whole: Any, fault: Fault) -> None:
    whole_s, _, *expected = whole
    alive, killed_s, recovery_s, *found = on_two_nodes(tmp_path / "store", fault.seed)
    assert alive == 1
    fault.happened(recovery_s)
    fault.recovered()
    assert found == expected
    assert killed_s <= 3 * whole_s
