"""The report of an ingest: what came in, what each operator did with it, what the version is made of.

reports/ingest/<snapshot id>/report.html and report.json; where nothing became a version, below refused-<key>/ or
nothing-new-<key>/
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.config import Config
from app.drift import BINS_A_DOUBLING, Drift, Sketch, new_word_share, psi
from app.errors import RayloopError
from app.ingestion import report
from app.ingestion.checks import rule_of
from app.ingestion.finalisation import Outcome
from app.ingestion.parts import Part
from app.ingestion.rates import rate_anomalies, start_of
from app.report import Bars, Block, Card, Cards, Passages, Section, Table, Verdict, lines, render
from app.storage import Storage

MOST_ROWS = 20
WHOLE_SET = ("contradictory_label", "duplicate_conversation_id", "near_duplicate")


def write(
    config: Config, parts: Sequence[Part], outcome: Outcome, drift: Sequence[Drift], before: Sketch, name: str,
    error: RayloopError | None,
) -> None:  # fmt: skip
    """Write the report's page and its figures.

    Args:
        config: What the ingest was asked to do.
        parts: What was read.
        outcome: What became of it.
        drift: How it differs from what the table held.
        before: What the table held.
        name: Of the report's folder: the snapshot's id, or what stands for it.
        error: Why nothing was committed, if nothing was.
    """
    storage = Storage(config.storage.uri)
    figures = {
        **report.counts(outcome),
        "operators": [dict(zip(("operator", "in", "kept", "gone"), row, strict=True)) for row in operators(outcome)],
        "drift": [vars(entry) for entry in drift],
        "sketch": outcome.sketch.to_json(),
        "error": str(error) if error else None,
    }
    storage.write(json.dumps(figures, default=float).encode(), "reports", "ingest", name, "report.json")
    page = _page(config, parts, outcome, drift, before, name, error)
    storage.write(page.encode(), "reports", "ingest", name, "report.html")


def operators(outcome: Outcome) -> list[tuple[str, int, int, int]]:
    """Each operator in order: its name, how many records came in, how many it let pass, how many it did not."""
    gone = outcome.quarantined + outcome.dropped
    whole_set = {name: gone[name] for name in WHOLE_SET}
    anomalies = gone["anomaly"]
    checks = sum(count for name, count in gone.items() if name.startswith("check_"))
    rules = gone.total() - sum(whole_set.values()) - anomalies - checks
    steps = (
        ("parse and check", rules),
        ("your checks", checks),
        ("exact duplicates", outcome.duplicates),
        ("contradictory labels", whole_set["contradictory_label"]),
        ("repeated ids", whole_set["duplicate_conversation_id"]),
        ("near-duplicates", whole_set["near_duplicate"] + outcome.near_duplicates),
        ("anomalies", anomalies),
    )
    rows, left = [], outcome.read
    for name, lost in steps:
        rows.append((name, left, left - lost, lost))
        left -= lost
    assert left == outcome.kept, (left, outcome.kept)
    return rows


def _page(
    config: Config, parts: Sequence[Part], outcome: Outcome, drift: Sequence[Drift], before: Sketch, name: str,
    error: RayloopError | None,
) -> str:  # fmt: skip
    personal = "personal data is masked" if config.ingestion.privacy.mask else "personal data is NOT masked"
    sections = [
        Section("Records", [_cards(outcome), _operators(outcome)]),
        Section("Rules", _rules(config, outcome), "What records broke, and what was done with them."),
        Section("What the new conversations are made of", _distributions(outcome.sketch, before)),
        Section("When they began", _days(outcome), "Days that are unlike the others of their weekday are listed."),
        Section(
            "Compared with the version before",
            [_drift(drift, before, outcome.sketch)],
            _drift_note(config, drift, before, outcome.sketch),
        ),
        Section("Refused records", [_examples(outcome)], f"Some of each reason; {personal}."),
        Section("Sources", [_sources(parts, outcome)]),
    ]
    title = f"Ingest into {config.ingestion.table}"
    return render(title, sections, f"version {name}", _verdict(outcome, drift, error))


def _verdict(outcome: Outcome, drift: Sequence[Drift], error: RayloopError | None) -> Verdict:
    if error is not None:
        return Verdict(f"Refused: {error}", "bad")
    moved = [entry.name for entry in drift if entry.drifted]
    said = f"{outcome.kept:,} of {outcome.read:,} records became conversations of this version."
    if moved:
        return Verdict(f"{said} They are unlike the ones before in {', '.join(moved)}.", "bad")
    return Verdict(said, "good")


def _cards(outcome: Outcome) -> Cards:
    share = outcome.refused / max(1, outcome.read)
    return Cards(
        [
            Card("Records read", outcome.read),
            Card("Kept", outcome.kept, state="good"),
            Card("Refused", outcome.refused, f"{share:.1%} of all"),
            Card("Duplicates", outcome.duplicates, f"and {outcome.near_duplicates:,} near-duplicates"),
            Card("Masked", outcome.masked, "conversations with personal data"),
            Card("Filled in", outcome.imputed.total(), ", ".join(sorted(outcome.imputed)) or "no values"),
        ]
    )


def _operators(outcome: Outcome) -> Table:
    return Table(("operator", "in", "kept", "gone"), operators(outcome))


def _rules(config: Config, outcome: Outcome) -> list[Block]:
    counted = outcome.quarantined + outcome.dropped + outcome.warned
    rows = [
        (name, rule_of(config.ingestion, name).severity, count, count / max(1, outcome.read))
        for name, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    ]
    if not rows:
        return [Table(("rule", "severity", "records", "share"), [("none was broken", "", 0, 0.0)], shares=("share",))]
    return [Table(("rule", "severity", "records", "share"), rows, shares=("share",))]


def _distributions(sketch: Sketch, before: Sketch) -> list[Block]:
    found: list[Block] = []
    for title, name in (("Intents", "intents"), ("Channels", "channels"), ("Languages", "languages")):
        series = {"before": _shares(getattr(before, name)), "new": _shares(getattr(sketch, name), MOST_ROWS)}
        if not before.size:
            series.pop("before")
        else:
            series["before"] = {key: series["before"].get(key, 0.0) for key in series["new"]}
        if series["new"]:
            found.append(Bars(series, f"{title}, share of conversations"))
    for title, name in (("Messages a conversation", "messages"), ("Characters a conversation", "characters")):
        series = {"before": _lengths(getattr(before, name)), "new": _lengths(getattr(sketch, name))}
        if not before.size:
            series.pop("before")
        if series["new"]:
            found.append(Bars(series, f"{title}, share of conversations"))
    return found


def _days(outcome: Outcome) -> list[Block]:
    if not outcome.days:
        return [Table(("day", "conversations", "expected", "deviation"), [("no conversation has a time", 0, 0.0, 0.0)])]
    days = range(min(outcome.days), max(outcome.days) + 1)
    drawn = {"conversations": ([*range(len(days))], [float(outcome.days[day]) for day in days])}
    caption = f"Conversations a day from {start_of(days[0]):%Y-%m-%d} to {start_of(days[-1]):%Y-%m-%d}"
    found: list[Block] = [lines(drawn, caption, "day", "conversations")]
    unusual = [
        (f"{rate.start:%Y-%m-%d}", rate.count, rate.expected, rate.z)
        for rate in sorted(rate_anomalies(outcome.days), key=lambda rate: -abs(rate.z))[:MOST_ROWS]
    ]
    return [*found, Table(("day", "conversations", "expected", "deviation"), unusual)] if unusual else found


def _shares(counts: Any, most: int | None = None) -> dict[str, float]:
    total = max(1, sum(counts.values()))
    return {name or "(none)": count / total for name, count in counts.most_common(most)}


def _lengths(bins: np.ndarray) -> dict[str, float]:
    """The shares of a length's doublings that occur."""
    doublings = bins[: len(bins) // BINS_A_DOUBLING * BINS_A_DOUBLING].reshape(-1, BINS_A_DOUBLING).sum(axis=1)
    total = max(1, int(doublings.sum()))
    used = np.flatnonzero(doublings)
    if not len(used):
        return {}
    return {
        f"{2**place:,} to {2 ** (place + 1) - 1:,}" if place else "1": float(doublings[place]) / total
        for place in range(int(used[0]), int(used[-1]) + 1)
    }


def _drift(drift: Sequence[Drift], before: Sketch, sketch: Sketch) -> Table:
    rows = [
        (entry.name, entry.statistic, entry.threshold, entry.effect, _psi(entry.name, before, sketch), entry.drifted)
        for entry in drift
    ]
    return Table(("compared", "statistic", "threshold", "effect", "PSI", "drifted"), rows)


def _psi(name: str, before: Sketch, sketch: Sketch) -> float:
    old, new = getattr(before, name), getattr(sketch, name)
    if isinstance(old, np.ndarray):
        return psi(old, new)
    names = sorted(old | new)
    return psi(np.array([old[key] for key in names]), np.array([new[key] for key in names]))


def _drift_note(config: Config, drift: Sequence[Drift], before: Sketch, sketch: Sketch) -> str:
    if not drift:
        return "There is no version before, or one of the two is too small to compare."
    rate = config.ingestion.drift.false_alarm_rate
    return (
        f"Batches of the same kind are called drifted in at most {rate:.1%} of all comparisons. "
        f"{new_word_share(before, sketch):.1%} of the words are new."
    )


def _examples(outcome: Outcome) -> Passages:
    items, notes = [], []
    for reason, shown in sorted(outcome.examples.items()):
        for entry in shown:
            items.append([("record", entry["raw"]), ("where", entry["detail"] or "–")])
            notes.append(f"{reason} · {entry['source']} at {entry['position']:,}")
    return Passages(items, notes)


def _sources(parts: Sequence[Part], outcome: Outcome) -> Table:
    rows = [
        (parts[index].uri, extent.records, extent.first_position, extent.last_position)
        for index, extent in sorted(outcome.extents.items())[:MOST_ROWS]
    ]
    return Table(("source", "records", "first position", "last position"), rows)
