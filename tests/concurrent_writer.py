"""One of several processes that append to the same table at the same moments.

    python -m tests.concurrent_writer URI CATALOG FOLDER NUMBER WRITERS ROUNDS SEED

In each round every writer opens the table, stages rows of its own, waits in FOLDER for the others, and appends a moment
later that follows from SEED. Whoever is refused opens the table anew and appends the same file. The last line printed
says how often that was, and for how long at most a writer had to go on trying.
"""

import json
import random
import sys
import time
from pathlib import Path

from app import tables
from app.config import Config
from app.conversation import SCHEMA
from app.errors import TableChanged
from tests.table_rows import rows, stage

ROWS = 20
WAIT_S = 60.0
MOMENT_S = 0.05


def numbers(writer: int, round_: int) -> range:
    """The conversations that a writer adds in a round: nobody else's."""
    start = (writer * 100 + round_) * ROWS
    return range(start, start + ROWS)


def meet(folder: Path, name: str, writer: int, writers: int) -> None:
    """Wait until all writers are here."""
    (folder / f"{name}-{writer}").touch()
    deadline_s = time.monotonic() + WAIT_S
    while len(list(folder.glob(f"{name}-*"))) < writers:
        assert time.monotonic() < deadline_s, f"the others did not come to {name}"
        time.sleep(0.002)


def main() -> None:
    """Write, and say how it went."""
    uri, catalog_uri, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    writer, writers, rounds, seed = (int(argument) for argument in sys.argv[4:])
    chance = random.Random(seed * writers + writer)
    config = Config().with_overrides({"storage.uri": uri, "storage.catalog_uri": catalog_uri or None})
    refused, longest_s, snapshots = 0, 0.0, []
    meet(folder, "begin", writer, writers)
    for round_ in range(rounds):
        # In the first round the table is not there: all of them make it.
        table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
        file = stage(table, rows(numbers(writer, round_)), f"round-{round_}-of-{writer}")
        meet(folder, f"round-{round_}", writer, writers)
        time.sleep(chance.uniform(0, MOMENT_S))
        first_refused_s: float | None = None
        while True:
            try:
                snapshots.append(tables.append(table, [file], {"rayloop.writer": str(writer)}))
                break
            except TableChanged:
                refused += 1
                first_refused_s = first_refused_s or time.monotonic()
                table = tables.open_table(config.storage, config.ingestion.table, SCHEMA)
        longest_s = max(longest_s, time.monotonic() - first_refused_s if first_refused_s else 0.0)
        meet(folder, f"after-{round_}", writer, writers)
    print(json.dumps({"refused": refused, "longest_s": longest_s, "snapshots": snapshots}))


if __name__ == "__main__":
    main()
