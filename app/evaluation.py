"""How good a model is: perplexity, replies and their token F1, classification figures. Nothing here knows Ray.

Axes of tensors: b batch, t tokens, v vocabulary.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.conversation import Message, prompt_ids

if TYPE_CHECKING:  # seconds to import, and a driver that judges replies needs neither
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_LEARNED = -100
"""Label of a token that no loss is taken on."""

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}’‘“”…–—]")


def perplexity(model: "PreTrainedModel", blocks: Mapping[str, np.ndarray], batch_size: int) -> float:
    """exp of the mean negative log-likelihood of the learned tokens; infinite where it leaves floating point.

    Args:
        model: In evaluation mode.
        blocks: input_ids, position_ids and labels, each (blocks, tokens); a label is its token's id, or -100.
            Conversations that share a block do not see each other: their position ids begin at 0.
        batch_size: Blocks computed at once.
    """
    import torch

    nll, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(blocks["input_ids"]), batch_size):
            batch = {
                name: torch.as_tensor(column[start : start + batch_size], device=model.device).long()
                for name, column in blocks.items()
            }
            logits_btv = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[:, :-1]
            labels_bt = batch["labels"][:, 1:]
            learned_bt = labels_bt != NOT_LEARNED
            nll += float(
                torch.nn.functional.cross_entropy(
                    logits_btv[learned_bt].float(), labels_bt[learned_bt], reduction="sum"
                )
            )
            tokens += int(learned_bt.sum())
    mean = nll / max(1, tokens)
    return math.exp(mean) if mean < 700 else math.inf


def generate_replies(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    contexts: Sequence[Sequence[Message]],
    max_tokens: int,
    batch_size: int,
) -> list[str]:
    """The model's likeliest reply to each conversation, token by token, in the order of `contexts`.

    A context that leaves no room for the reply loses its oldest tokens. Contexts of similar length are answered
    together, so that little is computed on padding.
    """
    room = int(getattr(model.config, "max_position_embeddings", 1 << 30)) - max_tokens
    prompts = [prompt_ids(tokenizer, context)[-room:] for context in contexts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        generated = generate(model, tokenizer, [prompts[index] for index in chosen], max_tokens)
        for index, tokens in zip(chosen, generated, strict=True):
            replies[index] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return replies


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    min_tokens: int = 0,
) -> list[list[int]]:
    """Greedy continuations of one batch of prompts, without the end token and what follows it."""
    import torch

    end: Any = tokenizer.eos_token_id
    pad: Any = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(prompt) for prompt in prompts)
    ids_bt = torch.full((len(prompts), width), pad)
    mask_bt = torch.zeros_like(ids_bt)
    for row, prompt in enumerate(prompts):
        ids_bt[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_bt[row, width - len(prompt) :] = 1
    model_too: Any = model
    with torch.inference_mode():
        made_bt = model_too.generate(
            input_ids=ids_bt.to(model.device), attention_mask=mask_bt.to(model.device), max_new_tokens=max_tokens,
            min_new_tokens=min_tokens, do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=pad,
        )  # fmt: skip
    return [_until(row, end) for row in made_bt[:, width:].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, whatever their order, case and punctuation.

    Source: Rajpurkar et al. 2016, SQuAD, section 6.1; articles stay, since the texts need not be English.
    """
    predicted, wanted = Counter(_words(prediction)), Counter(_words(reference))
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (predicted & wanted).total()
    return 2 * shared / (predicted.total() + wanted.total())


def _words(text: str) -> list[str]:
    return _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower()).split()


@dataclass(frozen=True)
class LabelFigures:
    """How one label fares."""

    label: str
    support: int
    """Examples that truly carry it."""
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Classification:
    """How a classifier fares; macro figures are means over the labels that occur, as scikit-learn takes them."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    labels: tuple[LabelFigures, ...]
    """Every label that was true or predicted at least once, by name."""
    confusion: np.ndarray
    """(labels, labels) int64, how often the row's label was taken for the column's."""

    def worst(self, most: int) -> list[int]:
        """Indices into `labels` of those with mistakes, worst F1 first."""
        wrong = [
            index
            for index in range(len(self.labels))
            if self.confusion[index].sum() + self.confusion[:, index].sum() > 2 * self.confusion[index, index]
        ]
        return sorted(wrong, key=lambda index: (self.labels[index].f1, self.labels[index].label))[:most]


def classification(predicted: Sequence[str], wanted: Sequence[str]) -> Classification:
    """Accuracy, and precision, recall and F1 by label; a ratio without a denominator counts as 0."""
    names = sorted({*predicted, *wanted})
    number = {name: index for index, name in enumerate(names)}
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, ([number[name] for name in wanted], [number[name] for name in predicted]), 1)
    right = np.diag(confusion).astype(float)
    support, claimed = confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = _ratio(right, claimed), _ratio(right, support)
    f1 = _ratio(2 * right, support + claimed)
    figures = tuple(
        LabelFigures(name, int(support[index]), float(precision[index]), float(recall[index]), float(f1[index]))
        for index, name in enumerate(names)
    )
    macro = [float(column.mean()) if names else 0.0 for column in (precision, recall, f1)]
    return Classification(float(right.sum() / max(1, support.sum())), macro[0], macro[1], macro[2], figures, confusion)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
    return shares


@dataclass(frozen=True)
class Question:
    """A held-out customer's turn, what came before it, and what the reference says to it."""

    key: str
    """Content hash and place of the reply: the same in every run over a table version."""
    context: tuple[Message, ...]
    """All messages up to the reply."""
    reference: str
    intent: str | None
    """Of the message before the reply, where it is labelled."""


def questions(conversations: Sequence[Mapping[str, Any]]) -> Iterator[Question]:
    """Every reply of conversations ({content_hash, messages}) that follows a user message, as a question."""
    for conversation in conversations:
        messages = conversation["messages"]
        for place in range(1, len(messages)):
            asked, answered = messages[place - 1], messages[place]
            if (asked["role"], answered["role"]) == ("user", "assistant"):
                key = f"{conversation['content_hash']}:{place}"
                yield Question(key, tuple(messages[:place]), answered["content"], asked.get("intent"))
