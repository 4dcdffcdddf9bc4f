"""Short training runs on the suite's cluster, and what their workers say."""

from pathlib import Path
from typing import Any

from app.config import Config
from app.storage import Storage
from app.training import checkpoint
from app.training.worker import Event
from app.versions import TableVersion

STEPS = 60
TINY = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 64,
    "training.micro_batch_size": 4,
    "training.max_steps": STEPS,
    "training.report_every_steps": 10,
    "training.validation_blocks": 16,
    "ingestion.sample.conversations": 400,
}


def tiny(store: Path) -> Config:
    return Config().with_overrides({**TINY, "storage.uri": str(store)})


def run(
    config: Config, table: TableVersion, name: str, report: Any = None, storage_path: str | None = None
) -> list[Event]:
    """Train under a run name; returns everything the workers said."""
    from app.training.trainer import run_training

    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if report is not None:
            report(event)

    where = storage_path or Storage(config.storage.uri).uri("checkpoints")
    run_training(config, table, storage_path=where, run_name=name, report=hear)
    return heard


def reports(heard: list[Event]) -> dict[int, float]:
    """Validation losses by step."""
    return {event["step"]: event["validation_loss"] for event in heard if event["kind"] == "report"}


def starts(heard: list[Event]) -> list[int]:
    """The steps that the workers started from, each time."""
    return [event["from_step"] for event in heard if event["kind"] == "start" and event["rank"] == 0]


def steps(heard: list[Event], start: int = 0) -> list[int]:
    """The steps that were done from the given start of the workers on, in order."""
    places = [index for index, event in enumerate(heard) if event["kind"] == "start" and event["rank"] == 0]
    return [event["step"] for event in heard[places[start] :] if event["kind"] == "step"]


def checkpoints(config: Config, name: str) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first."""
    folder = Path(Storage(config.storage.uri).path("checkpoints", name))
    return sorted(path for path in folder.iterdir() if checkpoint.FOLDER.match(path.name))


def finished(config: Config, name: str) -> list[Path]:
    """Those of them that every worker has written its part of."""
    storage = Storage(config.storage.uri)
    if not storage.exists("checkpoints", name):
        return []
    found = checkpoints(config, name)
    return [path for path in found if checkpoint.is_finished(storage, "checkpoints", name, path.name)]
