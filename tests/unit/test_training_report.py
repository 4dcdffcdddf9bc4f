"""The page and the card that a training run leaves."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from app.config import Config
from app.lineage import Lineage
from app.training import report
from app.versions import TableVersion

TABLE = TableVersion("support.conversations", 42)
FIGURES: dict[str, Any] = {
    "validation_loss": 0.25, "perplexity": math.exp(0.25), "training_loss": 0.3, "tokens": 1_234_567.0, "steps": 300,
    "tokens_per_s": 9_000.0, "padding_fraction": 0.021, "starts": 2, "bad_losses": 1, "conversations": 20_000,
}  # fmt: skip
HISTORY = {
    "loss": [(step, 3.0 / step) for step in range(1, 301)],
    "validation_loss": [(100, 0.5), (200, 0.25), (300, 0.3)],
    "perplexity": [(100, 1.65), (200, 1.28), (300, 1.35)],
    "learning_rate": [(step, 1e-3) for step in range(1, 301)],
    "mfu": [(1, 0.1), (2, 0.4), (3, 0.5)],
    "memory_bytes": [(1, 1e9), (2, 2.5e9)],
    "workers": [(0, 2), (150, 1)],
}


def lineage(**changes: Any) -> Lineage:
    values: dict[str, Any] = {
        "model": "support", "version": None, "run_id": "run-1", "stage": "train", "table": "support.conversations",
        "snapshot_id": 42, "sources": [{"uri": "s3://talks/`rm`|x\n# Not a title", "records": 20_000}],
        "config_digest": "d", "code_version": "c", "job_id": "j", "parent": None, "created_at": "2026-11-24T10:00:00",
    }  # fmt: skip
    return Lineage(**{**values, **changes})


def test_a_page_shows_curves_and_the_lowest_checkpoint(tmp_path: Path) -> None:
    config = Config().with_overrides({"storage.uri": str(tmp_path), "registry.model": "<b>support</b>"})
    report.write(config, TABLE, "run-1", HISTORY, FIGURES)
    folder = tmp_path / "reports" / "train" / "run-1"
    page = (folder / "report.html").read_text()
    assert "<b>support</b>" not in page
    assert page.count("<svg") == 2  # loss and learning rate: of the others nothing was logged
    assert re.search(r"200</td>.*0\.250.*lowest", page)
    assert re.search(r"Starts.*0</td>.*2</td>.*150</td>.*1</td>", page, re.DOTALL)
    assert "2.50" in page
    assert "0.400" in page
    assert json.loads((folder / "report.json").read_text())["history"]["validation_loss"][1] == [200, 0.25]


def test_a_card_says_what_the_model_is_made_of() -> None:
    card = report.card(Config(), lineage(), FIGURES)
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "20,000 conversations" in body
    assert "random initial weights" in body
    assert "| training.learning_rate | `0.002` |" in body
    assert "`s3://talks/rm/x # Not a title`: 20,000 records" in body
    assert "\n# Not a title" not in body


def test_a_card_names_the_base_model_and_what_was_not_masked() -> None:
    config = Config().with_overrides({"training.base_model": "acme/base", "ingestion.privacy.mask": False})
    card = report.card(config, lineage(), FIGURES)
    assert "base_model: acme/base" in card
    assert "Personal data was not masked" in card
    assert "random weights" not in card
