"""Evaluation as a whole: a model version answers held-out questions, and its figures decide what becomes of it.

    ray job submit --working-dir . -- python -m jobs.evaluate --config jobs/configs/demo.yaml

Ray tasks load the model and answer; the driver meanwhile judges the intent model and trains the one that judges
replies. A version that reaches every threshold of `evaluation.gate` becomes the `champion`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app import cluster, scorecard, tables
from app.config import Config, GateConfig
from app.errors import RegistryError, StageFailed, StageRefused
from app.evaluation import Classification, Question, classification, questions, token_f1
from app.intent import MAX_CONVERSATIONS, MAX_EXAMPLES, IntentModel, labelled
from app.job import job_id
from app.registry import Registry
from app.scorecard import Answer, Scorecard
from app.storage import Storage, local_folder
from app.versions import ModelVersion, TableVersion

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Blocks = Callable[[Config, TableVersion, "PreTrainedTokenizerBase", int], "Mapping[str, np.ndarray]"]
"""Makes held-out blocks; app.training.data.validation_blocks is one."""

BATCHES_PER_TASK = 8
"""Loading the model takes as long as answering a few batches, so a task answers several."""
BLOCKS_AT_ONCE = 8


@dataclass(frozen=True)
class Judged:
    """What evaluation found; the version has become the champion."""

    figures: dict[str, Any]
    report: str
    """URI of report.html; report.json lies beside it."""


def judge(config: Config, version: ModelVersion, blocks: Blocks) -> Judged:
    """Measure a version on the held-out split of the table version it was trained on, report, and apply the gate.

    Raises:
        StageRefused: A threshold is missed; the champion stays what it was.
        ModelError: The version cannot be loaded.
        StageFailed: Nothing is held out.
    """
    registry = Registry(config)
    table = trained_on(registry, version)
    settings = {f"evaluation.{key}": value for key, value in config.evaluation.model_dump(mode="json").items()}
    tags = {"rayloop.model": version.model, "rayloop.model_version": version.version, "rayloop.job": job_id()}
    tags |= {"rayloop.table": table.table, "rayloop.snapshot_id": str(table.snapshot_id)}
    run_id = registry.start_run("evaluate", {"model": str(version), **settings}, tags)
    status = "FAILED"
    try:
        card = examine(config, version, table, blocks)
        missed = misses(config.evaluation.gate, card.figures, card.absent)
        report = _write(config, run_id, card, missed)
        figures = card.figures | ({"absent": card.absent} if card.absent else {})
        registry.log_metrics(run_id, {key: float(value) for key, value in card.figures.items()})
        registry.set_tags(run_id, {"rayloop.report": report, "rayloop.gate": "refused" if missed else "passed"})
        status = "FINISHED"
        if missed:
            raise StageRefused(
                f"{version} misses its gate: {'; '.join(missed)}",
                f"see {report}; train longer or on more, or change `evaluation.gate`",
                figures,
            )
        registry.set_alias("champion", version)
        return Judged(figures, report)
    finally:
        registry.end_run(run_id, status)


def trained_on(registry: Registry, version: ModelVersion) -> TableVersion:
    """The table version that a model version learned from.

    Raises:
        RegistryError: It does not say.
    """
    tags = registry.tags(version)
    if "rayloop.table" not in tags or "rayloop.snapshot_id" not in tags:
        raise RegistryError(f"{version} does not say what it was trained on", "give one that jobs.train has made")
    return TableVersion(tags["rayloop.table"], int(tags["rayloop.snapshot_id"]))


def misses(gate: GateConfig, figures: Mapping[str, Any], absent: Mapping[str, str]) -> list[str]:
    """What a gate's thresholds are not reached by, a clause each; empty if it is passed."""
    found = []
    for name, threshold in gate.model_dump().items():
        side, figure = name.split("_", 1)
        if threshold is None:
            continue
        if figure not in figures:
            found.append(f"{figure} is asked for and absent: {absent[figure]}")
            continue
        reached = figures[figure] <= threshold if side == "max" else figures[figure] >= threshold
        if not reached:
            found.append(f"{figure} is {figures[figure]:.4g}, evaluation.gate.{name} is {threshold:.4g}")
    return found


def examine(config: Config, version: ModelVersion, table: TableVersion, blocks: Blocks) -> Scorecard:
    """Everything that is measured of a version."""
    held = tables.read_local(config, table, ["messages", "content_hash"], "validation", MAX_CONVERSATIONS).to_pylist()
    asked = list(questions(held))
    if not asked:
        raise StageFailed(
            f"{table} holds no question with a reply out for validation", "raise ingestion.validation_fraction"
        )
    chosen = sample(asked, config.evaluation.replies)
    tasks = _start(config, version, table, chosen, blocks)
    intents, no_intents = judge_intents(version, held)
    judge_model, judge_accuracy, no_judge = train_judge(config, table, asked)
    parts = cluster.collect(tasks)
    replies = [reply for part, _ in parts for reply in part]
    verdicts = judge_model.predict(replies) if judge_model else [(None, None)] * len(replies)
    answers = [
        Answer(question, reply, token_f1(reply, question.reference), verdict)
        for question, reply, (verdict, _) in zip(chosen, replies, verdicts, strict=True)
    ]
    figures, missing = _figures(answers, parts[0][1], intents, judge_accuracy)
    no_judge = no_judge or "none of the chosen questions carries an intent"
    absent = {name: no_intents if name.startswith("intent_") else no_judge for name in missing}
    return Scorecard(version, table, figures, absent, answers, intents)


def sample(asked: Sequence[Question], most: int) -> list[Question]:
    """At most `most` questions, the same ones for the same table version, whatever their order."""
    return sorted(asked, key=lambda question: hashlib.sha256(question.key.encode()).digest())[:most]


def judge_intents(version: ModelVersion, held: Sequence[Mapping[str, Any]]) -> tuple[Classification | None, str]:
    """How the version's intent model fares on held-out messages; None and why, if there is nothing to say."""
    texts, labels = labelled(conversation["messages"] for conversation in held)
    if not texts:
        return None, "the held-out messages carry no intents"
    with local_folder(version.uri) as folder:
        if not (folder / "intent").is_dir():
            return None, "the model version has no intent model"
        model = IntentModel.load(folder / "intent")
    return classification([label for label, _ in model.predict(texts)], labels), ""


def train_judge(
    config: Config, table: TableVersion, held: Sequence[Question]
) -> tuple[IntentModel | None, float | None, str]:
    """A model that tells from a reply what was asked, learned from the train split's replies.

    Returns:
        The model, its accuracy on the held-out references, and why there is none if there is none.
    """
    rows = tables.read_local(config, table, ["messages", "content_hash"], "train", MAX_CONVERSATIONS).to_pylist()
    known = [(question.reference, question.intent) for question in questions(rows) if question.intent][:MAX_EXAMPLES]
    tested = [question for question in held if question.intent]
    if len({intent for _, intent in known}) < 2 or not tested:
        return None, None, "the questions carry no intents"
    model = IntentModel.fit([text for text, _ in known], [intent for _, intent in known], config.training.seed)
    predicted = model.predict([question.reference for question in tested])
    right = [label == question.intent for (label, _), question in zip(predicted, tested, strict=True)]
    return model, sum(right) / len(right), ""


def _start(
    config: Config, version: ModelVersion, table: TableVersion, chosen: Sequence[Question], blocks: Blocks
) -> list[Any]:
    """A task for every few batches of questions; the first also measures perplexity."""
    size = config.evaluation.batch_size * BATCHES_PER_TASK
    shares = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    gpus = float(config.training.use_gpu)
    return [
        cluster.submit(_answer, config, version.uri, table, share, blocks if number == 0 else None, gpus=gpus)
        for number, share in enumerate(shares)
    ]


def _answer(
    config: Config, uri: str, table: TableVersion, asked: Sequence[Question], blocks: Blocks | None
) -> tuple[list[str], float]:
    """The model's replies, and its perplexity on held-out blocks if they are asked for."""
    from app import evaluation
    from app import model as models

    settings = config.evaluation
    options: dict[str, Any] = {"device_map": {"": "cuda"}} if config.training.use_gpu else {}
    with local_folder(uri) as folder:
        model, tokenizer = models.load(folder, **options)
    perplexity = math.nan
    if blocks is not None:
        held = blocks(config, table, tokenizer, settings.validation_blocks)
        perplexity = evaluation.perplexity(model, held, BLOCKS_AT_ONCE)
    contexts = [question.context for question in asked]
    replies = evaluation.generate_replies(model, tokenizer, contexts, settings.max_reply_tokens, settings.batch_size)
    return replies, perplexity


def _figures(
    answers: Sequence[Answer], perplexity: float, intents: Classification | None, judge_accuracy: float | None
) -> tuple[dict[str, Any], list[str]]:
    """The figures, and the names of those that there is nothing to compute from."""
    about = [answer.about for answer in answers if answer.about is not None]
    found: dict[str, Any] = {
        "perplexity": perplexity,
        "token_f1": sum(answer.f1 for answer in answers) / len(answers),
        "replies": len(answers),
        "intent_accuracy": intents and intents.accuracy,
        "intent_macro_precision": intents and intents.macro_precision,
        "intent_macro_recall": intents and intents.macro_recall,
        "intent_macro_f1": intents and intents.macro_f1,
        "reply_intent_accuracy": sum(about) / len(about) if about else None,
        "reply_judge_accuracy": judge_accuracy,
    }
    figures = {name: value for name, value in found.items() if value is not None}
    return figures, [name for name in found if name not in figures]


def _write(config: Config, run_id: str, card: Scorecard, missed: Sequence[str]) -> str:
    storage = Storage(config.storage.uri)
    place = ("reports", "evaluate", run_id)
    content = scorecard.as_json(card, missed) | {"run_id": run_id, "job": job_id()}
    storage.write(json.dumps(content, indent=2, allow_nan=False).encode(), *place, "report.json")
    return storage.write(scorecard.page(card, config.evaluation.gate, missed).encode(), *place, "report.html")
