"""Conversations to measure ingestion with, written once under .rayloop/bench-data: same name and size, same bytes.

sgd    the train part of Schema-Guided Dialogue (../shared/data/sgd), again and again: from the second time on each
       conversation has another id and, but for one in ten, which stays an exact copy, three invented words in front
shop   the embedded shop, with its planted defects: 5 %, of which a tenth are exact copies
"""

import gzip
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

from app.storage import resolve

FOLDER = Path(resolve(".rayloop/bench-data"))
SGD = Path(resolve("../shared/data/sgd/train.jsonl.gz"))
COPIES = 10
"""One in so many repeated conversations is an exact copy."""
SHOP_RECORD_BYTES = 765
FILE_BYTES = 32 << 20
LEAST_FILES = 8
_SYLLABLES = ("ba", "ko", "lim", "ne", "pur", "sa", "ti", "vo", "wen", "zu", "dra", "fel", "gan", "hos", "jir", "mek")


@dataclass(frozen=True)
class Workload:
    """JSONL files."""

    name: str
    gigabytes: float
    """As asked for."""
    bytes: int
    records: int
    planted_copies: int
    """Records written as exact copies; the sources hold some of their own."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return FOLDER / f"{self.name}-{self.gigabytes:g}"


def available() -> list[str]:
    """Names of what can be written here."""
    return ["sgd", "shop"] if SGD.exists() else ["shop"]


def workload(name: str, gigabytes: float) -> Workload:
    """The files of a workload; written now if they are not there."""
    wanted = Workload(name, gigabytes, 0, 0, 0)
    about = wanted.folder.with_name(f"{wanted.folder.name}.about.json")  # what is in the folder is input
    if not about.exists():
        wanted.folder.mkdir(parents=True, exist_ok=True)
        size = int(gigabytes * 1e9)
        number = max(LEAST_FILES, -(-size // FILE_BYTES))
        with multiprocessing.Pool(2) as pool:
            write = partial(_write, name, wanted.folder, size // number)
            written = pool.map(write, range(number), chunksize=1)
        total, records, copies = (sum(column) for column in zip(*written, strict=True))
        made = Workload(name, gigabytes, total, records, copies)
        about.write_text(json.dumps(asdict(made)))
    return Workload(**json.loads(about.read_text()))


def _write(name: str, folder: Path, size: int, part: int) -> tuple[int, int, int]:
    """One file: bytes, records and planted copies in it."""
    lines = _sgd(part * size, (part + 1) * size) if name == "sgd" else _shop(part, size)
    total = records = copies = 0
    with (folder / f"part-{part:04d}.jsonl").open("wb") as file:
        for line, copy in lines:
            file.write(line + b"\n")
            total, records, copies = total + len(line) + 1, records + 1, copies + copy
    return total, records, copies


def _shop(part: int, size: int) -> Iterator[tuple[bytes, bool]]:
    from app.ingestion import sample

    records = size // SHOP_RECORD_BYTES
    for position in range(part * records, (part + 1) * records):
        planted = sample.defect(7, position, 0.05)
        yield sample.line(7, position, 0.05), planted is not None and planted.kind == "exact_duplicate"


def _sgd(start: int, stop: int) -> Iterator[tuple[bytes, bool]]:
    """The lines that begin in a stretch of the endless repetition."""
    originals = gzip.decompress(SGD.read_bytes()).splitlines()
    at = 0
    for repetition in count():
        for number, original in enumerate(originals):
            if at >= stop:
                return
            copy = bool(repetition) and number % COPIES == 0
            # Lengths are known without making the line: a part begins where the one before it ends.
            at += len(original) + 1
            if at > start:
                yield (_again(original, repetition, number, copy) if repetition else original), copy


def _again(line: bytes, repetition: int, number: int, copy: bool) -> bytes:
    line = line.replace(b'"conversation_id": "', b'"conversation_id": "r%d-' % repetition, 1)
    if copy:
        return line
    return line.replace(b'"content": "', b'"content": "%s ' % _words(repetition * 1_000_003 + number).encode(), 1)


def _words(number: int) -> str:
    """Three words that no other number has."""
    words = []
    for _ in range(3):
        syllables = []
        for _ in range(3):
            number, place = divmod(number, len(_SYLLABLES))
            syllables.append(_SYLLABLES[place])
        words.append("".join(syllables))
    return " ".join(words).capitalize()
