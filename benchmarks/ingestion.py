"""Ingestion against what users run today, on the same bytes, with outputs compared.

    python -m benchmarks.ingestion --gb 0.1 --gb 1 --repetitions 5
    python -m benchmarks.ingestion --gb 0.1 --task B --workload shop --only rayloop,bare,polars
    python -m benchmarks.ingestion --memory

A   read, validate, normalise, mask personal data, drop exact copies, tokenize, pack, write Parquet
B   read, validate, normalise, drop exact copies, write Parquet

Each tool runs in an environment of its own under .rayloop/peers, made at the first run, and in a fresh process each
time, twice in it: cold, with the start of the process, and warm. The product has a Ray head of its own, started
before and stopped after each of its processes, so that the others have the machine for themselves; the start of the
head, a service, is not counted. Every measurement is kept in .rayloop/bench-data/measurements.jsonl; `--table` makes
the table of this commit's. Writes benchmarks/results/<date>_<hardware>_ingestion.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.storage import resolve
from benchmarks import measured, workloads
from benchmarks.workloads import Workload

HOME = Path(__file__).parent.parent
STATE = Path(resolve(".rayloop"))
MEASUREMENTS = workloads.FOLDER / "measurements.jsonl"
COMMON = ("numpy==2.4.6", "phonenumbers==9.0.43", "pydantic==2.14.3", "PyYAML==6.0.3", "orjson==3.13.0")
TOKENIZERS = "tokenizers==0.23.3"
PEERS: dict[str, tuple[str, ...] | None] = {
    "rayloop": None,
    "bare": None,
    "pyspark": ("pyspark==4.3.0", "pyarrow==25.0.1", "pandas==3.1.1", TOKENIZERS),
    "datatrove": ("datatrove[io]==0.10.0", "pyarrow==26.0.1", "regex", "xxhash==4.1.0", TOKENIZERS),
    "polars": ("polars==2.1.0", "pyarrow==25.0.1", TOKENIZERS),
    "datasets": ("datasets==5.2.0", "pyarrow==26.0.1", TOKENIZERS),
}
"""What is installed for each; none: the product's own environment."""
EVERYTHING = "rayloop, everything on"
VOCABULARY = 4_096
TARGETS = {
    ("A", "pyspark"): 2.0,
    ("A", "datatrove"): 2.0,
    ("A", "bare"): 0.95,
    ("B", "polars"): 0.6,
    ("B", "pyspark"): 2.0,
}
"""How many times as fast as a peer the product is to be; against the bare kernels 0.8 below 1 GB."""

COLUMNS = (
    "tool", "n", "MB/s cold", "MB/s warm", "CPU s a GB", "peak GB", "ours / it, cold", "ours / it, warm", "target",
    "output",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One run."""

    name: str
    workload: str
    gigabytes: float
    task: str
    warm: bool
    input_bytes: int
    seconds: float
    cpu_s: float
    peak_bytes: int
    kept: int
    duplicates: int
    tokens: int
    output_bytes: int
    figures: dict[str, Any]
    settings: dict[str, Any]
    commit: str
    load: float
    """The machine's load average before the process: about 2 where it is our own last run's alone."""

    @property
    def mb_per_s(self) -> float:
        """Of input."""
        return self.input_bytes / 1e6 / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        """Of input."""
        return self.cpu_s / (self.input_bytes / 1e9)


def environment_of(name: str) -> str:
    """The Python of a peer; its environment is made now if it is not there."""
    packages = PEERS[name]
    if packages is None:
        return sys.executable
    folder = STATE / "peers" / name
    mark = folder / "installed"
    wanted = "\n".join(sorted({*packages, *COMMON}))
    if not mark.exists() or mark.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", *wanted.split()], check=True)
        mark.write_text(wanted)
    return str(folder / "bin" / "python")


def tokenizer_of(workload: Workload) -> Path:
    """A tokenizer trained as the product trains it, on some of the workload; made once, outside of any timing."""
    from app.conversation import train_tokenizer
    from app.ingestion.quality import Refusal, parse

    folder = workloads.FOLDER / f"{workload.folder.name}.tokenizer"
    if not (folder / "tokenizer.json").exists():
        texts: list[str] = []
        for line in (workload.folder / "part-0000.jsonl").read_bytes().splitlines()[:10_000]:
            try:
                messages = parse(line).get("messages") or []
            except Refusal:
                continue
            texts += [message["content"] for message in messages if message.get("content")]
        train_tokenizer(texts, VOCABULARY).save_pretrained(str(folder))
    return folder / "tokenizer.json"


@contextmanager
def head(object_store_bytes: int | None = None) -> Iterator[dict[str, str]]:
    """A Ray head of the benchmark's own; the environment that finds it."""
    state = STATE / "bench-ingestion"
    environment = os.environ | {
        "RAYLOOP_STATE": str(state),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if object_store_bytes:
        environment["RAYLOOP_OBJECT_STORE_BYTES"] = str(object_store_bytes)
    script = str(HOME / "cluster" / "local.sh")
    subprocess.run([script, "start"], env=environment, check=True, stdout=subprocess.DEVNULL)
    try:
        lines = (state / "cluster.env").read_text().splitlines()
        pairs = (line.removeprefix("export ").partition("=") for line in lines)
        yield environment | {name: value for name, _, value in pairs}
    finally:
        subprocess.run([script, "stop"], env=environment, check=True, stdout=subprocess.DEVNULL)


def of_the_head() -> list[int]:
    """Ids of the head's processes: they carry its mark in their environment, see cluster/local.sh."""
    found = []
    state = str(STATE / "bench-ingestion")
    checksum = subprocess.run(["cksum"], input=state, capture_output=True, text=True, check=True).stdout.split()[0]
    mark = f"RAYLOOP_CLUSTER=/tmp/rayloop-{checksum}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def measure(
    name: str, workload: Workload, task: str, object_store_bytes: int | None = None, memory_throughout: bool = False
) -> list[Measurement]:
    """A fresh process, and two runs in it; kept in `MEASUREMENTS`."""
    is_ours = name.startswith("rayloop")
    script = "product" if is_ours else name
    python = environment_of("rayloop" if is_ours else name)
    output = STATE / f"bench-out-{os.getpid()}"
    load = os.getloadavg()[0]
    command = [python, "-W", "ignore", "-m", f"benchmarks.peers.{script}", task, str(workload.folder)]
    command += [str(tokenizer_of(workload)), str(output)]
    environment = os.environ | {"PYTHONPATH": str(HOME), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if is_ours:
        environment |= {"EVERYTHING": "1"} if name == EVERYTHING else {}
        with head(object_store_bytes) as found:
            environment |= {key: found[key] for key in found.keys() - {"PATH"}}
            runs = measured.runs_of(command, environment, of_the_head(), memory_throughout)
    else:
        runs = measured.runs_of(command, environment, memory_throughout=memory_throughout)
    tokens, output_bytes = looked_at(output / "result", task)
    shutil.rmtree(output)
    made = [
        Measurement(
            name, workload.name, workload.gigabytes, task, bool(number), workload.bytes, run.seconds, run.cpu_s,
            run.peak_bytes, run.line["kept"], run.line["duplicates"], tokens, output_bytes, run.line["figures"] or {},
            {"object_store_bytes": object_store_bytes}, measured.commit(), load,
        )
        for number, run in enumerate(runs)
    ]  # fmt: skip
    with MEASUREMENTS.open("a") as file:
        for entry in made:
            file.write(json.dumps(asdict(entry)) + "\n")
            print(
                f"{entry.name:24} {entry.workload} {entry.gigabytes:g} GB {entry.task} "
                f"{'warm' if entry.warm else 'cold'} {entry.seconds:7.1f} s {entry.mb_per_s:6.1f} MB/s "
                f"{entry.cpu_s_per_gb:6.0f} CPU s/GB {entry.peak_bytes / 1e9:5.2f} GB, kept {entry.kept}, "
                f"copies {entry.duplicates}, tokens {entry.tokens} {entry.figures or ''}",
                flush=True,
            )
    return made


def looked_at(folder: Path, task: str) -> tuple[int, int]:
    """Tokens in the Parquet files that the last run left, and the bytes of these."""
    import numpy as np
    import pyarrow.parquet as pq

    from app.training.packing import tokens_in

    files = sorted(folder.rglob("*.parquet"))
    tokens = 0
    for file in files if task == "A" else []:
        for batch in pq.ParquetFile(file).iter_batches(4_096, columns=["position_ids"]):
            column = batch.column(0)
            column = getattr(column, "storage", column)
            tokens += tokens_in(np.asarray(column.flatten()))
    return tokens, sum(file.stat().st_size for file in files)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:,.3g}"
    return f"{middle:,.3g} ({min(values):,.3g}-{max(values):,.3g})"


def table(found: Sequence[Measurement]) -> list[str]:
    """A table for each workload, size and task."""
    text = []
    for key in sorted({(entry.task, entry.workload, entry.gigabytes) for entry in found}):
        task, workload, gigabytes = key
        group = [entry for entry in found if (entry.task, entry.workload, entry.gigabytes) == key]
        ours = [entry for entry in group if entry.name == "rayloop"]
        text += ["", f"### {task}, {workload}, {gigabytes:g} GB", ""]
        text += [
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        for name in [*PEERS, EVERYTHING]:
            mine = [entry for entry in group if entry.name == name]
            if mine:
                text.append(_row(name, mine, ours, task, gigabytes))
    return text


def _row(name: str, mine: Sequence[Measurement], ours: Sequence[Measurement], task: str, gigabytes: float) -> str:
    cold, warm = ([entry for entry in mine if entry.warm == flag] for flag in (False, True))
    target = TARGETS.get((task, name))
    if target and name == "bare" and gigabytes < 1:
        target = 0.8
    cells = [
        name,
        str(len(warm)),
        spread([entry.mb_per_s for entry in cold]),
        spread([entry.mb_per_s for entry in warm]),
        spread([entry.cpu_s_per_gb for entry in warm]),
        spread([entry.peak_bytes / 1e9 for entry in warm]),
        *(_ratio(mine, ours, flag) for flag in (False, True)),
        f">= {target:g}" if target else "",
        _agreement(mine[-1], ours[-1] if ours else mine[-1]),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(mine: Sequence[Measurement], ours: Sequence[Measurement], warm: bool) -> str:
    speeds = [[entry.mb_per_s for entry in group if entry.warm == warm] for group in (ours, mine)]
    return f"{statistics.median(speeds[0]) / statistics.median(speeds[1]):.2f}" if all(speeds) else ""


def _agreement(mine: Measurement, ours: Measurement) -> str:
    """The quality column: what is kept, copies and tokens, and by how much they are not ours."""
    parts = [("kept", mine.kept, ours.kept), ("copies", mine.duplicates, ours.duplicates)]
    if mine.task == "A":
        parts.append(("tokens", mine.tokens, ours.tokens))
    told = [f"{what} {value:,}" + (f" ({value - other:+,})" if value != other else "") for what, value, other in parts]
    return ", ".join(told)


def memory(workload: str) -> list[str]:
    """Flat memory, nothing spilled, cost in proportion to the input."""
    sizes = (0.1, 0.5, 1.0, 5.0)
    found = {}
    for size in sizes:
        given = workloads.workload(workload, size)
        found[size] = measure("rayloop", given, "A", memory_throughout=True)[-1]
    whole = workloads.workload(workload, 1.0)
    small = measure("rayloop", whole, "A", object_store_bytes=whole.bytes // 4, memory_throughout=True)[-1]
    return memory_table(found, small)


def memory_table(found: dict[float, Measurement], small: Measurement) -> list[str]:
    """What `memory` measured, beside the targets."""
    import numpy as np

    sizes = sorted(found)
    exponent = np.polyfit(np.log(sizes), np.log([found[size].cpu_s for size in sizes]), 1)[0]
    seconds = np.polyfit(np.log(sizes), np.log([found[size].seconds for size in sizes]), 1)[0]
    ratio = found[5.0].peak_bytes / found[0.5].peak_bytes
    rows = [
        f"| {size:g} GB | {found[size].seconds:.1f} | {found[size].mb_per_s:.1f} | {found[size].cpu_s_per_gb:.0f} "
        f"| {found[size].peak_bytes / 1e9:.2f} | {found[size].figures['spilled_bytes']:,} |"
        for size in sizes
    ]
    return [
        "", "### Memory and cost (rayloop, task A, warm)", "",
        "| input | seconds | MB/s | CPU s a GB | peak GB | spilled bytes |", "|---|---|---|---|---|---|", *rows,
        f"| 1 GB, object store {small.settings['object_store_bytes'] / 1e6:.0f} MB | {small.seconds:.1f} "
        f"| {small.mb_per_s:.1f} | {small.cpu_s_per_gb:.0f} | {small.peak_bytes / 1e9:.2f} "
        f"| {small.figures['spilled_bytes']:,} |",
        "",
        f"- Peak at 5 GB / at 0.5 GB: {ratio:.2f}, target at most 1.3.",
        f"- Object store a quarter of the input: {small.figures['spilled_bytes']:,} bytes spilled, target 0; speed "
        f"{small.mb_per_s / found[1.0].mb_per_s:.2f} of that with 1 GB, target at least 0.9.",
        f"- Cost exponent over 0.1-5 GB: {exponent:.3f} of CPU seconds, {seconds:.3f} of seconds, target at most 1.05.",
    ]  # fmt: skip


def kept_measurements() -> list[Measurement]:
    """Those of this commit, for a table; those with another object store are none of its rows."""
    lines = MEASUREMENTS.read_text().splitlines() if MEASUREMENTS.exists() else []
    every = (Measurement(**json.loads(line)) for line in lines)
    return [entry for entry in every if entry.commit == measured.commit() and not any(entry.settings.values())]


def main() -> None:
    """Measure and write the dated file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, action="append", help="size of the input; more than one may be given")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workload", action="append", choices=("sgd", "shop"))
    parser.add_argument("--task", action="append", choices=("A", "B"))
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of tools, by comma")
    parser.add_argument("--everything", action="store_true", help="also the product with everything on, task A")
    parser.add_argument("--memory", action="store_true", help="memory and cost at 0.1 to 5 GB, nothing else")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of this commit's measurements")
    options = parser.parse_args()
    names = options.only or list(PEERS)
    if unknown := set(names) - {*PEERS, EVERYTHING}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is not known, choose from {', '.join(PEERS)}")
    chosen = options.workload or workloads.available()
    command = f"`python -m benchmarks.ingestion {' '.join(sys.argv[1:])}`"
    if options.memory:
        measured.write(
            "ingestion_memory", ["# Memory of ingestion", "", measured.heading(), "", command, *memory(chosen[0])]
        )
        return
    found = kept_measurements() if options.table else []
    given = [] if options.table else [workloads.workload(name, size) for size in options.gb or [0.1] for name in chosen]
    for repetition in range(options.repetitions):
        for workload in given:
            for task in options.task or ("A", "B"):
                wanted = [*names, EVERYTHING] if options.everything and task == "A" else names
                for name in wanted[repetition % len(wanted) :] + wanted[: repetition % len(wanted)]:
                    found += measure(name, workload, task)
    measured.write("ingestion", ["# Ingestion", "", measured.heading(), "", command, "", *about(found), *table(found)])


def about(found: Sequence[Measurement]) -> list[str]:
    """What the tables say, in words."""
    sizes = sorted({(entry.workload, entry.gigabytes) for entry in found})
    planted = ", ".join(
        f"{name} {size:g} GB {made.records:,} records with {made.planted_copies:,} planted copies"
        for name, size in sizes
        if (made := workloads.workload(name, size))
    )
    pins = "; ".join(f"{name}: {', '.join(packages)}" for name, packages in PEERS.items() if packages)
    return [
        f"Input: {planted}. Repetitions are interleaved; cells are the median and the range.", "",
        "Cold: a fresh process from its start to its first result. Warm: the same work again in it. Peak: proportional "
        "set size of all processes of both runs, with all of Ray; looked at twice a second in the cold run, for a "
        "hundredth of the time in the warm one, since looking costs speed. In task A the product also writes the "
        "Iceberg table of clean conversations and reads it back, and so do the bare kernels, which lack only Ray and "
        "the commit; the other tools do not.", "",
        f"Load average of the {os.cpu_count()} cores before the runs: {spread([entry.load for entry in found])}. "
        "Far above their number, or unlike from tool to tool, it means that others used the machine, and rates tell "
        "nothing.", "",
        f"Versions: {pins}.", "",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
