"""What an evaluation found, as the HTML page that people read and the JSON that programs read."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from app.config import GateConfig
from app.evaluation import Classification, Question
from app.report import Card, Cards, Passages, Plot, Section, State, Table, Verdict, heatmap, histogram, render
from app.versions import ModelVersion, TableVersion
from app.versions import as_json as version_json

EXAMPLES = 12
WORST_INTENTS, CONFUSED_WITH = 10, 14
SHOWN_TURNS, SHOWN_CHARS = 3, 400

SPEAKERS = {"user": "Customer", "assistant": "Assistant", "system": "System"}

NAMES = {
    "perplexity": ("Perplexity", "of held-out replies; lower is better"),
    "token_f1": ("Token F1", "words shared with the reference reply"),
    "reply_intent_accuracy": ("Replies on topic", "judged to be about what was asked"),
    "reply_judge_accuracy": ("The judge itself", "accuracy on the reference replies"),
    "intent_accuracy": ("Intent accuracy", "of the intent model on held-out questions"),
    "intent_macro_precision": ("Intent precision", "mean over intents"),
    "intent_macro_recall": ("Intent recall", "mean over intents"),
    "intent_macro_f1": ("Intent F1", "mean over intents"),
}


@dataclass(frozen=True)
class Answer:
    """A question and what the model replied."""

    question: Question
    reply: str
    f1: float
    """Token F1 against the reference."""
    judged: str | None
    """The intent that the judge reads from the reply; none without a judge."""

    @property
    def about(self) -> bool | None:
        """Whether the reply is about the question's intent; none where that cannot be said."""
        if self.judged is None or self.question.intent is None:
            return None
        return self.judged == self.question.intent


@dataclass(frozen=True)
class Scorecard:
    """Everything an evaluation found."""

    version: ModelVersion
    table: TableVersion
    figures: dict[str, Any]
    absent: dict[str, str]
    """Figures that could not be taken, and why."""
    answers: list[Answer]
    intents: Classification | None


def as_json(card: Scorecard, missed: Sequence[str]) -> dict[str, Any]:
    """Everything, the answers in full; a number that is not finite is written as text."""
    return {
        "model": version_json(card.version),
        "table": version_json(card.table),
        "passed": not missed,
        "missed": list(missed),
        "figures": {name: _finite(value) for name, value in card.figures.items()},
        "absent": card.absent,
        "intents": [asdict(label) for label in card.intents.labels] if card.intents else [],
        "confusion": card.intents.confusion.tolist() if card.intents else [],
        "answers": [
            {
                "key": answer.question.key,
                "context": list(answer.question.context),
                "reference": answer.question.reference,
                "reply": answer.reply,
                "token_f1": answer.f1,
                "intent": answer.question.intent,
                "judged": answer.judged,
            }
            for answer in card.answers
        ],
    }


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def page(card: Scorecard, gate: GateConfig, missed: Sequence[str]) -> str:
    """The report as one HTML page."""
    if missed:
        verdict = Verdict(f"Refused: {'; '.join(missed)}. The champion stays what it was.", "bad")
    else:
        verdict = Verdict("Passed every threshold of the gate: this version is the champion.", "good")
    sections = [_summary(card, gate), *_intents(card), _replies(card), _examples(card)]
    subtitle = f"Held-out conversations of {card.table}"
    return render(f"Evaluation of {card.version}", sections, subtitle, verdict)


def _summary(card: Scorecard, gate: GateConfig) -> Section:
    thresholds = {
        name.split("_", 1)[1]: (name[:3], value) for name, value in gate.model_dump().items() if value is not None
    }
    cards = [_card(name, card, thresholds.get(name)) for name in NAMES if name in card.figures]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in card.absent.items():
        reasons[reason].append(NAMES[name][0] if name in NAMES else name)
    note = "; ".join(f"{', '.join(names)}: absent, because {reason}" for reason, names in reasons.items())
    return Section("Figures", [Cards(cards)], note)


def _card(name: str, card: Scorecard, threshold: tuple[str, float] | None) -> Card:
    title, note = NAMES[name]
    value, state = card.figures[name], "plain"
    if threshold is not None:
        side, limit = threshold
        state = "good" if (value <= limit if side == "max" else value >= limit) else "bad"
        note += f"; the gate asks for {'at most' if side == 'max' else 'at least'} {limit:.4g}"
    return Card(title, float(value), note, _state(state))


def _state(name: str) -> State:
    return "good" if name == "good" else "bad" if name == "bad" else "plain"


def _intents(card: Scorecard) -> list[Section]:
    if card.intents is None:
        return []
    answered: Mapping[str | None, list[Answer]] = _by_intent(card.answers)
    rows: list[list[Any]] = []
    for label in card.intents.labels:
        mine = answered.get(label.label, [])
        about = [answer.about for answer in mine if answer.about is not None]
        known = [label.label, label.support, label.precision, label.recall, label.f1]
        rows.append([*known, len(mine), _mean([answer.f1 for answer in mine]), _mean(about)])
    rows.sort(key=lambda row: (row[4], 1.0 if row[7] is None else row[7], row[0]))
    columns = ("Intent", "Messages", "Precision", "Recall", "F1", "Replies", "Token F1", "On topic")
    table = Table(columns, rows, shares=("F1", "Token F1", "On topic"))
    plots = _confusion(card.intents)
    note = "The small intent model on held-out messages, and the replies to questions of each intent; worst first."
    sections = [Section("By intent", [table], note)]
    if plots:
        sections.append(Section("What the worst intents are taken for", plots))
    return sections


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _by_intent(answers: Sequence[Answer]) -> dict[str | None, list[Answer]]:
    found: dict[str | None, list[Answer]] = defaultdict(list)
    for answer in answers:
        found[answer.question.intent].append(answer)
    return found


def _confusion(intents: Classification) -> list[Plot]:
    """The worst intents as rows; as columns, whatever they are taken for most often."""
    worst = intents.worst(WORST_INTENTS)
    if not worst:
        return []
    taken = intents.confusion[worst].sum(axis=0)
    columns = sorted(np.argsort(-taken, kind="stable")[:CONFUSED_WITH].tolist())
    columns = [column for column in columns if taken[column]]
    names = [label.label for label in intents.labels]
    counts = intents.confusion[np.ix_(worst, columns)]
    caption = "Rows: the true intent. Columns: what the intent model says. Each row is shaded by its own total."
    return [heatmap(counts, [names[row] for row in worst], [names[column] for column in columns], caption)]


def _replies(card: Scorecard) -> Section:
    scores = [answer.f1 for answer in card.answers]
    exact = sum(score == 1.0 for score in scores)
    caption = f"{len(scores)} replies; {exact} use exactly the words of their reference."
    note = "A reply may be right in other words: a question has several good replies, and the reference is one of them."
    return Section("Token F1 of the replies", [histogram(scores, caption, "token F1")], note)


def _examples(card: Scorecard) -> Section:
    """Half of them the worst, half of them as the sample has them."""
    worst = sorted(card.answers, key=lambda answer: (answer.about is not False, answer.f1))[: EXAMPLES // 2]
    usual = [answer for answer in card.answers if answer not in worst][: EXAMPLES - len(worst)]
    notes, items = [], []
    for kind, answer in [*(("worst", answer) for answer in worst), *(("sample", answer) for answer in usual)]:
        topic = {True: "on topic", False: f"off topic: sounds like {answer.judged}", None: ""}[answer.about]
        parts = (kind, answer.question.intent or "", f"token F1 {answer.f1:.2f}", topic)
        notes.append(" · ".join(part for part in parts if part))
        turns = answer.question.context[-SHOWN_TURNS:]
        told = [(SPEAKERS[turn["role"]], turn["content"]) for turn in turns]
        told += [("Reference", answer.question.reference), ("Reply", answer.reply or "(nothing)")]
        items.append([(name, text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…") for name, text in told])
    return Section("Questions, references and replies", [Passages(items, notes)])
