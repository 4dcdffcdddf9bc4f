"""What a training run says of itself: a page with its curves, and the model's card.

reports/train/<run id>/report.html and report.json; README.md in the model folder
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from app.config import Config
from app.lineage import Lineage
from app.report import Block, Card, Cards, Section, Table, Verdict, lines, render
from app.settings.training import TrainingConfig
from app.storage import Storage
from app.versions import TableVersion

History = Mapping[str, Sequence[tuple[int, float]]]
"""A run's metrics by name: (step, value), in the order of the steps."""
CURVES = (
    ("Loss", "nats a token", ("loss", "validation_loss"), "Mean negative log-likelihood of a learned token."),
    ("Learning rate", "rate", ("learning_rate", "muon_learning_rate"), "The schedule, as the steps took it."),
    ("Gradient norm", "norm", ("gradient_norm",), "Of each step before clipping: a rise announces a diverging run."),
    ("Throughput", "tokens a second", ("tokens_per_s",), "Of all workers, without padding."),
)
STEP_FIGURES = ("perplexity", "mfu", "memory_bytes", "data_stall_fraction", "workers")
CARD = "README.md"
"""The model's card, in its folder."""
GIGABYTE = 1e9


METRICS = (*(name for _, _, names, _ in CURVES for name in names), *STEP_FIGURES)
"""What a page is made of."""


def write(config: Config, table: TableVersion, run_id: str, history: History, figures: Mapping[str, Any]) -> None:
    """Write the page and its figures."""
    storage = Storage(config.storage.uri)
    content = {**figures, "table": str(table), "history": history}
    storage.write(json.dumps(content, default=float).encode(), "reports", "train", run_id, "report.json")
    page = _page(config, table, run_id, history, figures)
    storage.write(page.encode(), "reports", "train", run_id, "report.html")


def _page(config: Config, table: TableVersion, run_id: str, history: History, figures: Mapping[str, Any]) -> str:
    training = config.training
    sections = [
        Section("Figures", [Cards(_cards(history, figures))]),
        *_curves(history),
        Section("Checkpoints", [_checkpoints(history)], "Held-out loss at each report; the lowest is the one to keep."),
        *_starts(history),
        Section("Settings", [Table(("setting", "value"), _settings(training))]),
    ]
    verdict = Verdict(
        f"Perplexity {figures['perplexity']:.3f} on held-out conversations after {figures['steps']:,} steps, "
        f"{figures['tokens']:,.0f} tokens from {training.base_model}."
    )
    return render(f"Training of {config.registry.model}", sections, f"{table} · run {run_id}", verdict)


def _cards(history: History, figures: Mapping[str, Any]) -> list[Card]:
    cards = [
        Card("Validation loss", figures["validation_loss"], "nats a token"),
        Card("Perplexity", figures["perplexity"], "held out"),
        Card("Training loss", figures["training_loss"], "since the report before"),
        Card("Tokens", int(figures["tokens"]), "learned from, without padding"),
        Card("Throughput", figures["tokens_per_s"], "tokens a second, all workers"),
        Card("Padding", figures["padding_fraction"], "share of the blocks"),
    ]
    for name, metric, note in (
        ("MFU", "mfu", "of a matrix product's speed here, median"),
        ("Data stall", "data_stall_fraction", "share of a step, median"),
    ):
        if history.get(metric):
            cards.append(Card(name, statistics.median(value for _, value in history[metric]), note))
    if history.get("memory_bytes"):
        most = max(value for _, value in history["memory_bytes"])
        cards.append(Card("Memory", most / GIGABYTE, "GB, the most that worker 0 held"))
    if figures.get("bad_losses"):
        cards.append(Card("Bad losses", figures["bad_losses"], "steps whose loss was not finite or jumped", "bad"))
    return cards


def _curves(history: History) -> list[Section]:
    sections = []
    for title, axis, names, caption in CURVES:
        series = {
            name.replace("_", " "): ([step for step, _ in history[name]], [value for _, value in history[name]])
            for name in names
            if history.get(name)
        }
        if series:
            plot: Block = lines(series, caption, "step", axis)
            sections.append(Section(title, [plot]))
    return sections


def _starts(history: History) -> list[Section]:
    """Each time that workers began: again where some died, the cluster changed or the job was submitted again."""
    starts = history.get("workers", ())
    rows = [(step, int(workers)) for step, workers in starts]
    return [Section("Starts", [Table(("from step", "workers"), rows)])] if rows else []


def _checkpoints(history: History) -> Table:
    losses = list(history.get("validation_loss", ()))
    best = min((value for _, value in losses), default=None)
    perplexities = dict(history.get("perplexity", ()))
    rows = [(step, loss, perplexities.get(step), "lowest" if loss == best else "") for step, loss in losses]
    return Table(("step", "validation loss", "perplexity", ""), rows)


def _settings(training: TrainingConfig) -> list[tuple[str, str]]:
    """Each setting and its value; what has parts as JSON."""
    values = training.model_dump(mode="json").items()
    return [(f"training.{name}", value if isinstance(value, str) else json.dumps(value)) for name, value in values]


def card(config: Config, made: Lineage, figures: Mapping[str, Any]) -> str:
    """The model's card: Markdown with the front matter that the Hugging Face hub reads.

    Source of the parts: Mitchell et al. 2019, Model Cards for Model Reporting, section 4.
    """
    import yaml

    training = config.training
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not training.base_model.startswith("preset:"):
        front["base_model"] = training.base_model
    on_pairs = training.objective == "dpo"
    unit = "nats a preference pair" if on_pairs else "nats a token"
    learned = "preference pairs and measured on support conversations" if on_pairs else "support conversations"
    measured = [
        (f"validation loss, {unit}", figures["validation_loss"]),
        ("perplexity on conversations", figures["perplexity"]),
        (f"training loss, {unit}", figures["training_loss"]),
        ("margin of rewards on held-out pairs", figures.get("reward_margin")),
        ("held-out pairs whose chosen reply is preferred", figures.get("reward_accuracy")),
        ("tokens learned from", figures["tokens"]),
        ("steps", figures["steps"]),
        ("accuracy of the intent model beside it", figures.get("intent_accuracy")),
    ]
    sources = [f"- {_code(source['uri'])}: {source['records']:,} records" for source in made.sources]
    settings = [f"| {name} | {_code(value)} |" for name, value in _settings(training)]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {made.model}\n",
        f"A chat model that began as {_start(training.base_model)} and was trained on {learned} by run "
        f"{_code(made.run_id)} on {made.created_at}.\n",
        "## Data\n",
        f"Version {made.snapshot_id} of table {_code(made.table)}: {figures['conversations']:,} conversations, of "
        f"which a share of {config.ingestion.validation_fraction:g} is held out. Loss on: {training.loss_on}. "
        f"Personal data masked at ingestion: {'yes' if config.ingestion.privacy.mask else 'no'}.\n",
        *sources,
        "",
        "## Measured\n",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {_number(value)} |" for name, value in measured if value is not None),
        "",
        f"On held-out conversations of the table: at most {training.validation_blocks} blocks of "
        f"{training.block_tokens} tokens.\n",
        "## Settings\n",
        "| setting | value |",
        "|---|---|",
        *settings,
        "",
        "## Limits\n",
        *(f"- {limit}" for limit in _limits(config)),
        "",
    ]
    return "\n".join(parts)


def _start(base_model: str) -> str:
    return "random initial weights" if base_model.startswith("preset:") else f"the base model {_code(base_model)}"


def _limits(config: Config) -> list[str]:
    training = config.training
    limits = [
        "The figures are of held-out conversations of the same table: other customers, products and times may differ.",
        f"It has learned from at most {training.block_tokens} tokens at once: longer conversations are cut.",
        "Facts that are not in the conversation (an order's state, a price) it can only make up; give them to it, or "
        "check its replies before they reach a customer.",
        "It was not measured for bias, for harmful replies, or against attempts to lead it away from its task.",
    ]
    if training.base_model.startswith("preset:"):
        limits.insert(1, "It began from random weights: it knows the table's conversations and nothing else.")
    if not config.ingestion.privacy.mask:
        limits.append("Personal data was not masked: it may repeat what customers wrote.")
    return limits


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 10_000 else f"{value:,.0f}"


def _code(text: str) -> str:
    """Text that Markdown shows as it is; what would end the cell or the passage is left out."""
    return "`" + text.replace("`", "").replace("|", "/").replace("\n", " ") + "`"
