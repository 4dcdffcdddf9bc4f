"""The product: `ingest` into an Iceberg table, for task A its rows tokenized and packed as training does; on Ray.

`python -m benchmarks.peers.product A|B INPUT TOKENIZER OUTPUT`, with RAY_ADDRESS of a running head. EVERYTHING=1:
near-duplicates, anomalies and drift as well.
"""

import os
from typing import TYPE_CHECKING, Any

from app.config import Config
from benchmarks.peers.protocol import BLOCK_TOKENS, Counts, Request, main

if TYPE_CHECKING:
    from app.ingestion.finalisation import Outcome


def settings(request: Request) -> Config:
    """What both tasks have in common, and what differs."""
    everything = bool(os.environ.get("EVERYTHING"))
    folder = str(request.files[0].parent)
    return Config.model_validate(
        {
            "storage": {"uri": str(request.output / "store")},
            "ingestion": {
                "sources": [{"uri": folder, "format": "jsonl"}],
                "validation_fraction": 0.0,
                "privacy": {"mask": request.masks},
                "near_duplicates": {"detect": everything},
                "anomalies": {"detect": everything},
                "drift": {"detect": everything},
                "imputation": {"languages": []},
            },
            "training": {"block_tokens": BLOCK_TOKENS},
        }
    )


def work(request: Request) -> Counts:
    """Ingest, and for task A pack."""
    import time

    from app import model
    from app.ingestion.pipeline import ingest
    from app.storage import Storage
    from app.training import data

    config = settings(request)
    started_s = time.monotonic()
    done = ingest(config)
    figures: dict[str, Any] = {"ingest_s": time.monotonic() - started_s}
    if request.task == "A":
        tokenizer = model.load_tokenizer(str(request.tokenizer.parent))
        storage = Storage(str(request.output))
        blocks = data.blocks(config, done.version, tokenizer, "train")
        data.write(blocks, storage.path("result"), storage.filesystem)
    figures |= {"near_duplicates": done.outcome.near_duplicates, "spilled_bytes": spilled_bytes()}
    return Counts(done.outcome.kept, copies_in(done.outcome), figures)


def copies_in(outcome: "Outcome") -> int:
    """Copies of another conversation's text; the product sets aside those that have another label."""
    return outcome.duplicates + outcome.quarantined["contradictory_label"]


def spilled_bytes() -> int:
    """What Ray has moved from its object stores to disk since it was started."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


if __name__ == "__main__":
    import ray

    ray.init(log_to_driver=False)
    main(work)
