"""Every fault that the tests make, several times over: how often it was not survived, and how long recovery took.

    make servers
    python -m benchmarks.faults --runs 3
    RAYLOOP_FAULT_SEEDS=3 python -m pytest --junitxml=FILE; python -m benchmarks.faults --runs 3 --report FILE
    RAYLOOP_FAULT_SEEDS=3 python -m pytest tests/integration/test_serve_{faults,versions,crowds}.py --junitxml=FILE
    python -m benchmarks.faults --runs 3 --report FILE --name serving_faults

Runs the tests that carry the mark `fault` through pytest, once for each seed; see tests/faults.py. Writes
benchmarks/results/<date>_<hardware>_faults.md.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import measured

ROOT = Path(__file__).parent.parent


@dataclass
class Row:
    """A test over all of its seeds; where attacks are refused, over all of them too."""

    runs: int = 0
    failures: int = 0
    skipped: int = 0
    seen: str = ""
    recovery_s: list[float] = field(default_factory=list)

    def add(self, case: ElementTree.Element) -> None:
        """Count one run of it."""
        self.skipped += case.find("skipped") is not None
        self.runs += case.find("skipped") is None
        self.failures += case.find("failure") is not None or case.find("error") is not None
        self.seen = properties(case)["seen"]
        if seconds := properties(case).get("recovery_s"):
            self.recovery_s.append(float(seconds))

    def cells(self) -> str:
        """As the table shows it."""
        median, most = "", ""
        if self.recovery_s:
            median, most = f"{statistics.median(self.recovery_s):.1f}", f"{max(self.recovery_s):.1f}"
        runs = f"{self.runs} ({self.skipped} skipped)" if self.skipped else str(self.runs)
        return f"{runs} | {self.failures} | {median} | {most} | {self.seen}"


def properties(case: ElementTree.Element) -> dict[str, str]:
    """What a test told of itself."""
    return {entry.attrib["name"]: entry.attrib["value"] for entry in case.iter("property")}


def rows(*reports: Path) -> dict[tuple[str, str], Row]:
    """By fault and test, from pytest's reports."""
    found: dict[tuple[str, str], Row] = defaultdict(Row)
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        if fault := properties(case).get("fault"):
            name = re.sub(r"\[seed\d+\]|(?<=\[)seed\d+-", "", case.attrib["name"])
            if fault.startswith("S"):
                name = name.partition("[")[0]  # all the inputs that are refused are one row
            found[fault, name].add(case)
    return dict(sorted(found.items(), key=lambda item: (item[0][0][0], int(item[0][0][1:]))))


def words(name: str) -> str:
    """A test's name as a sentence, its parameters after it."""
    said, _, parameters = name.removesuffix("]").partition("[")
    return said.removeprefix("test_").replace("_", " ") + (f": {parameters}" if parameters else "")


def measure(runs: int) -> tuple[dict[tuple[str, str], Row], int]:
    """Run the tests with so many seeds; also pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "fault", f"--junitxml={report}"]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"RAYLOOP_FAULT_SEEDS": str(runs)}, check=False)
        return rows(report), ended.returncode


def main() -> None:
    """Run them, write the table, and end as pytest has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="seeds, from 0 on")
    parser.add_argument(
        "--report", type=Path, nargs="+", help="what runs of the suite, or of parts of it, wrote, instead of a run"
    )
    parser.add_argument("--name", default="faults", help="of the file with the table")
    given = parser.parse_args()
    runs = given.runs
    table, code = (rows(*given.report), 0) if given.report else measure(runs)
    lines = [
        "# Faults",
        "",
        measured.heading(),
        "",
        f"`python -m benchmarks.faults --runs {runs}`; seeds 0 to {runs - 1} say where and when a fault lands. "
        "Recovery is from the fault, or from the end of an outage, to the right result; for F5, how long the slowest "
        "writer had to go on trying. What is refused has nothing to recover from.",
        "",
        "| fault | test | runs | failures | recovery, median s | most s | seen to have happened |",
        "|---|---|---|---|---|---|---|",
    ]
    for (fault, name), row in table.items():
        lines.append(f"| {fault} | {words(name)} | {row.cells()} |")
    failures = sum(row.failures for row in table.values())
    lines += ["", f"{sum(row.runs for row in table.values())} runs of {len(table)} tests, {failures} failures."]
    measured.write(given.name, lines)
    sys.exit(code)


if __name__ == "__main__":
    main()
