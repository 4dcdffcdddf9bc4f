"""What every measurement says of itself: hardware, commit, date, and where it is written."""

import datetime
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY_SHARE = 0.01
RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """Cores, memory and processor in a few words."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores of {model}, {memory_gb:.0f} GiB, no GPU"


def heading() -> str:
    """Date, commit and hardware."""
    return f"{today()}, commit {commit()}, {hardware()}"


def commit() -> str:
    """The commit, and whether the working tree differs from it."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip()


def today() -> str:
    """The date as file names have it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write(name: str, lines: list[str]) -> Path:
    """Print the lines and write them to the dated file of this name."""
    text = "\n".join(lines) + "\n"
    print(text)
    file = RESULTS / f"{today()}_{os.cpu_count()}cpu_{name}.md"
    file.write_text(text)
    print(f"written to {file}")
    return file


@dataclass(frozen=True)
class Run:
    """What one run of a measured program took, its processes together."""

    seconds: float
    """Of the first run with the start of the process, of a later one without."""
    cpu_s: float
    peak_bytes: int
    """Of memory, proportional set size: a page that processes share counts once. Of this run and those before it."""
    line: dict[str, Any]
    """What the program said at its end."""


def runs_of(
    command: Sequence[str], environment: Mapping[str, str], others: Iterable[int] = (), memory_throughout: bool = False
) -> list[Run]:
    """Run a program that prints a line of JSON with a key `run`, in seconds, at the end of each of its runs, and then
    waits for a line, so that its processes are still there to be looked at.

    Looking at memory makes the kernel walk every page, and processes wait meanwhile: it took 8 % of the machine from a
    program of twenty processes with a gigabyte of shared memory. So it is done twice a second in the first run only,
    and for a hundredth of the time afterwards.

    Args:
        command: The program.
        environment: All of its environment.
        others: Ids of processes that work for it, with their children, without being its children.
        memory_throughout: Look at memory twice a second in every run, whatever that costs.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    errors = Path(environment.get("TMPDIR", "/tmp"), f"measured-{os.getpid()}.txt")
    started_s = time.monotonic()
    with errors.open("wb") as stderr:
        program = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
    assert program.stdout is not None
    assert program.stdin is not None
    watch = _Watch({program.pid, *others})
    found: list[Run] = []
    for raw in program.stdout:
        if raw.startswith(b'{"run"'):
            cpu_s, peak_bytes = watch.lap()
            program.stdin.write(b"\n")
            program.stdin.flush()
            line = json.loads(raw)
            seconds = line["run"] if found else time.monotonic() - started_s
            found.append(Run(seconds, cpu_s, peak_bytes, line))
            watch.memory_share = 1.0 if memory_throughout else MEMORY_SHARE
    code = program.wait()
    watch.end()
    said = errors.read_text(errors="replace")[-2_000:]
    errors.unlink()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{said}")
    return found


class _Watch:
    """Looks at some processes and their descendants again and again: their CPU time and their memory."""

    def __init__(self, roots: Iterable[int], every_s: float = 0.5) -> None:
        self._roots, self._every_s = set(roots), every_s
        self._cpu = {pid: _cpu_s(pid) for pid in _descendants(self._roots)}
        self._before, self._peak_bytes = dict(self._cpu), 0
        self.memory_share = 1.0
        """Of the time, how much may be spent on looking at memory."""
        self._memory_again_s = 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def lap(self) -> tuple[float, int]:
        """CPU seconds since the last lap, and peak bytes so far."""
        self._look()
        with self._lock:
            spent = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu.items())
            self._before = dict(self._cpu)
            return spent, self._peak_bytes

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        pids = _descendants(self._roots)
        started_s = time.monotonic()
        size = 0
        if started_s >= self._memory_again_s:
            size = sum(_memory_bytes(pid) for pid in pids)
            self._memory_again_s = started_s + (time.monotonic() - started_s) / self.memory_share
        with self._lock:
            for pid in pids:
                # A process that has ended keeps what it had used when it was last seen.
                self._cpu[pid] = max(self._cpu.get(pid, 0.0), _cpu_s(pid))
            self._peak_bytes = max(self._peak_bytes, size)


def _descendants(roots: set[int]) -> set[int]:
    """The processes themselves, and theirs."""
    parents = {int(name): stat[1] for name in os.listdir("/proc") if name.isdigit() and (stat := _stat(int(name)))}
    found, new = set[int](), set(roots)
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if int(parent) in new} - found
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_s(pid: int) -> float:
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") if stat else 0.0


def _memory_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1_024 for line in lines if line.startswith("Pss:")), 0)
