"""Near-duplicates on texts with planted pairs: speed, and precision and recall against the exact similarity.

    python -m benchmarks.near_duplicates --texts 100000 --repetitions 3

Texts are of 60 to 140 words. One in ten has a copy in which words were replaced until the Jaccard similarity of their
word 3-grams is one drawn evenly from 0.6 to 0.95; what is to be found are the pairs of at least 0.8. Each tool runs in
an environment of its own under .rayloop/peers, on one core, in a fresh process, in turns. Writes
benchmarks/results/<date>_<hardware>_near_duplicates.md.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measured

THRESHOLD = 0.8
LEAST, MOST = 0.6, 0.95
PEERS = {
    "datasketch": ["datasketch==2.0.0"],
    "datatrove": ["datatrove==0.10.0", "xxhash<4", "regex", "orjson", "tokenizers"],
}
"""xxhash 4 takes no strings any more, which datatrove 0.10.0 gives it."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"][:31]
ROOT = Path(__file__).parent.parent
STATE = Path(os.environ.get("RAYLOOP_STATE", ROOT / ".rayloop"))


def corpus(texts: int, seed: int = 7) -> tuple[list[str], dict[tuple[int, int], float]]:
    """Texts, and the exact similarity of each planted pair."""
    draw = random.Random(seed)
    # Of letters alone: datatrove takes all numbers for one.
    vocabulary = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]
    frequency = [1 / (number + 20) for number in range(len(vocabulary))]
    made: list[str] = []
    planted: dict[tuple[int, int], float] = {}
    while len(made) < texts:
        words = draw.choices(vocabulary, frequency, k=draw.randint(60, 140))
        made.append(" ".join(words))
        if len(made) < texts and draw.random() < 1 / 9:
            other, exact = _nearly(words, draw.uniform(LEAST, MOST), vocabulary, draw)
            planted[len(made) - 1, len(made)] = exact
            made.append(" ".join(other))
    return made, planted


def _nearly(words: list[str], target: float, vocabulary: list[str], draw: random.Random) -> tuple[list[str], float]:
    """The words with as many replaced as make the similarity no less than `target`, and that similarity."""
    changed, exact = list(words), 1.0
    for place in draw.sample(range(len(words)), len(words)):
        before, changed[place] = changed[place], draw.choice(vocabulary)
        found = jaccard(words, changed)
        if found < target:
            changed[place] = before
            break
        exact = found
    return changed, exact


def jaccard(first: list[str], second: list[str]) -> float:
    """Of the sets of word 3-grams."""
    here, there = (set(zip(words, words[1:], words[2:], strict=False)) for words in (first, second))
    return len(here & there) / len(here | there)


def environment(name: str) -> str:
    """The Python of a peer's own environment, made at the first run."""
    python = STATE / "peers" / f"{name}_minhash" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
    return str(python)


def run(name: str, file: Path, out: Path) -> dict[str, Any]:
    """One run of one tool in a fresh process."""
    python = environment(name) if name in PEERS else sys.executable
    command = [python, "-W", "ignore", "-m", "benchmarks.peers.near_duplicates", name, str(file), str(out)]
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS")} | {"POLARS_MAX_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **one_thread}, stderr=subprocess.DEVNULL)
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def judged(pairs: list[list[int]], planted: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    """Precision, recall and F1 of pairs."""
    found = {(left, right) for left, right in pairs}
    right = {pair for pair, exact in planted.items() if exact >= THRESHOLD}
    hits = len(found & right)
    return hits / max(1, len(found)), hits / len(right), 2 * hits / max(1, len(found) + len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    texts, planted = corpus(arguments.texts)
    names = ("ours", *PEERS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "corpus.txt"
        file.write_text("\n".join(texts))
        for _ in range(arguments.repetitions):
            for name in names:
                runs[name].append(run(name, file, Path(folder) / "out.json"))
                print(name, f"{runs[name][-1]['seconds']:.1f} s", flush=True)
        megabytes = file.stat().st_size / 1e6
    base_cpu_s = median(entry["cpu_s"] for entry in runs["ours"])
    lines = [
        "# Near-duplicates",
        "",
        measured.heading(),
        "",
        f"`python -m benchmarks.near_duplicates --texts {arguments.texts} --repetitions {arguments.repetitions}`: "
        f"{arguments.texts:,} texts of 60 to 140 words ({megabytes:.0f} MB), {len(planted):,} of them with a planted "
        f"near copy of similarity {LEAST} to {MOST}, evenly; to be found: the "
        f"{sum(exact >= THRESHOLD for exact in planted.values()):,} pairs of at least {THRESHOLD}.",
        "",
        "| tool | seconds, median (range) | CPU s | texts/s | CPU of ours | precision | recall | F1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        seconds = [entry["seconds"] for entry in runs[name]]
        cpu_s = median(entry["cpu_s"] for entry in runs[name])
        precision, recall, f1 = judged(runs[name][0]["pairs"], planted)
        lines.append(
            f"| {name} | {median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f}) | {cpu_s:.1f} | "
            f"{arguments.texts / median(seconds):,.0f} | {cpu_s / base_cpu_s:.1f}x | {precision:.3f} | {recall:.3f} | "
            f"{f1:.3f} |"
        )
    lines += [
        "",
        "Targets: at least 10x of datasketch and datatrove, F1 at least 0.95. One process and one core each; ours are "
        "the kernels as a task runs them, without Ray. datasketch: 128 permutations, candidates from 0.7 on, verified; "
        "datatrove: 3-grams, its own 14 buckets of 8 hashes, words split at spaces, which is its fastest, pairs that "
        "share a bucket, which it does not verify. Signatures of ours are of 128 bytes, the others' of 1,024 and 896.",
    ]
    measured.write("near_duplicates", lines)


if __name__ == "__main__":
    main()
