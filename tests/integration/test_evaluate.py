"""Evaluation on a real cluster: figures, the report, the gate, and data without intents."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import evaluation, tables
from app import model as models
from app.config import Config
from app.errors import ModelError, StageRefused
from app.ingestion.pipeline import ingest
from app.judgement import judge, sample
from app.registry import Registry
from app.storage import Storage
from app.training.data import validation_blocks
from app.versions import ModelVersion, TableVersion, as_json
from jobs.evaluate import JOB
from tests.conftest import ROOT, RunningCluster
from tests.trained import SETTINGS, register, train_quickly


@pytest.fixture(scope="module")
def config(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config().with_overrides({**SETTINGS, "storage.uri": str(tmp_path_factory.mktemp("evaluate") / "store")})


@pytest.fixture(scope="module")
def table(config: Config) -> TableVersion:
    return ingest(config).version


@pytest.fixture(scope="module")
def trained(config: Config, table: TableVersion, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return train_quickly(config, table, tmp_path_factory.mktemp("trained"), steps=150)


def run(config: Config, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.evaluate", "--config", str(file), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.fixture(scope="module")
def passed(config: Config, trained: ModelVersion, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last line of a job that passed its gate."""
    lenient = ("--set", "evaluation.gate.max_perplexity=1000", "--set", "evaluation.gate.min_intent_accuracy=0.5")
    code, line, errors = run(config, tmp_path_factory.mktemp("job"), *lenient)
    assert (code, line["status"]) == (0, "done"), errors
    assert line["inputs"] == {"model": as_json(trained)}
    return line


def test_a_version_that_passes_is_the_champion(config: Config, trained: ModelVersion, passed: dict[str, Any]) -> None:
    assert passed["outputs"]["champion"] is True
    assert passed["outputs"]["model"] == as_json(trained)
    assert Registry(config).alias("champion") == trained


def test_figures_are_those_of_the_model_on_the_held_out_split(
    config: Config, table: TableVersion, trained: ModelVersion, passed: dict[str, Any]
) -> None:
    figures = passed["figures"]
    assert "absent" not in figures
    model, tokenizer = models.load(trained.uri)
    held = validation_blocks(config, table, tokenizer, config.evaluation.validation_blocks)
    assert figures["perplexity"] == pytest.approx(evaluation.perplexity(model, held, 4), rel=1e-4)
    rows = tables.read_local(config, table, ["messages", "content_hash"], "validation").to_pylist()
    chosen = sample(list(evaluation.questions(rows)), config.evaluation.replies)
    contexts = [question.context for question in chosen]
    replies = evaluation.generate_replies(model, tokenizer, contexts, config.evaluation.max_reply_tokens, 32)
    scores = [evaluation.token_f1(reply, question.reference) for reply, question in zip(replies, chosen, strict=True)]
    assert figures["token_f1"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    assert figures["replies"] == len(chosen) == config.evaluation.replies
    assert figures["intent_accuracy"] > 0.8
    assert figures["reply_judge_accuracy"] > 0.8
    assert 0.0 <= figures["reply_intent_accuracy"] <= 1.0
    assert {"intent_macro_precision", "intent_macro_recall", "intent_macro_f1"} <= set(figures)


def test_the_report_lies_under_the_run_that_links_to_it(config: Config, passed: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    from app.registry import tracking_uri

    page = Path(passed["outputs"]["report"])
    run_id = page.parent.name
    assert page.parent.parent == Path(Storage(config.storage.uri).path("reports", "evaluate"))
    content = json.loads((page.parent / "report.json").read_text())
    assert content["figures"] == passed["figures"]
    assert content["run_id"] == run_id
    assert len(content["answers"]) == config.evaluation.replies
    html = page.read_text()
    assert "http:" not in html
    assert "https:" not in html
    assert "<svg" in html
    logged = MlflowClient(tracking_uri=tracking_uri(config)).get_run(run_id)
    assert logged.data.tags["rayloop.report"] == str(page)
    assert logged.data.metrics["perplexity"] == pytest.approx(passed["figures"]["perplexity"])
    assert logged.info.status == "FINISHED"


def test_the_same_job_again_is_up_to_date_until_its_report_is_gone(
    config: Config, passed: dict[str, Any], tmp_path: Path
) -> None:
    same = config.with_overrides(
        {"evaluation.gate.max_perplexity": 1_000.0, "evaluation.gate.min_intent_accuracy": 0.5}
    )
    inputs = JOB.inputs(same)
    receipt = JOB.receipt(same, inputs)
    assert receipt is not None
    assert receipt["outputs"] == passed["outputs"]
    page = Path(passed["outputs"]["report"])
    aside = page.rename(tmp_path / "aside.html")
    assert JOB.receipt(same, inputs) is None
    aside.rename(page)


def test_a_missed_threshold_is_named_and_leaves_the_champion_alone(
    config: Config, table: TableVersion, trained: ModelVersion, passed: dict[str, Any]
) -> None:
    strict = config.with_overrides({"evaluation.gate.max_perplexity": 1.0, "evaluation.gate.min_token_f1": 1.0})
    challenger = register(config, table, Path(trained.uri))
    with pytest.raises(StageRefused) as refusal:
        judge(strict, challenger, validation_blocks)
    value = passed["figures"]["perplexity"]
    assert f"{challenger} misses its gate: perplexity is {value:.4g}, evaluation.gate.max_perplexity is 1;" in str(
        refusal.value
    )
    assert "evaluation.gate.min_token_f1 is 1" in str(refusal.value)
    # The same weights give the same figures, to the last digit.
    assert refusal.value.figures == passed["figures"]
    assert Registry(config).alias("champion") == trained
    report = next(part for part in refusal.value.remedy.split() if part.endswith("report.html;")).rstrip(";")
    assert "Refused: perplexity" in Path(report).read_text()


def test_a_damaged_model_folder_is_said_in_one_sentence(
    config: Config, table: TableVersion, trained: ModelVersion, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(trained.uri, folder)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00nonsense")
    other = config.with_overrides({"registry.model": "damaged"})
    version = register(other, table, folder)
    code, line, errors = run(other, tmp_path)
    assert (code, line["status"], line["outputs"]) == (1, "failed", {})
    assert line["error"].startswith(f"{version.uri}/model.safetensors is damaged (")
    assert "Traceback" not in errors
    shutil.copytree(trained.uri, folder, dirs_exist_ok=True)
    (folder / "intent" / "intent.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the intent model in .* cannot be loaded"):
        judge(other, register(other, table, folder), validation_blocks)


def test_data_without_intents_gives_reasons_instead_of_figures(config: Config, tmp_path: Path) -> None:
    rows = [
        {
            "conversation_id": f"c{number}",
            "messages": [
                {"role": "user", "content": f"Where is order {number}?"},
                {"role": "assistant", "content": f"Order {number} is on its way."},
            ],
        }
        for number in range(300)
    ]
    source = tmp_path / "plain.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = config.with_overrides(
        {
            "storage.uri": str(tmp_path / "store"),
            "ingestion.sources": [{"uri": str(source), "format": "jsonl"}],
            "evaluation.replies": 5,
        }
    )
    table = ingest(plain).version
    version = train_quickly(plain, table, tmp_path / "model", steps=5)
    judged = judge(plain, version, validation_blocks)
    assert {"perplexity", "token_f1", "replies", "absent"} == set(judged.figures)
    assert judged.figures["absent"]["intent_accuracy"] == "the held-out messages carry no intents"
    assert judged.figures["absent"]["reply_intent_accuracy"] == "the questions carry no intents"
    assert "absent, because the held-out messages carry no intents" in Path(judged.report).read_text()
    asked = plain.with_overrides({"evaluation.gate.min_reply_intent_accuracy": 0.1})
    with pytest.raises(StageRefused, match="reply_intent_accuracy is asked for and absent: the questions carry no"):
        judge(asked, version, validation_blocks)


def test_dry_run_plans_and_writes_nothing(config: Config, trained: ModelVersion) -> None:
    before = sorted(Path(config.storage.uri).rglob("*"))
    planned = JOB.plan(config, JOB.inputs(config))
    assert planned["answer"]["questions_at_most"] == config.evaluation.replies
    assert sorted(Path(config.storage.uri).rglob("*")) == before
