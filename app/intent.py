"""The small intent model: which of a table's labels a message carries, and how sure that is.

    model = IntentModel.fit(["where is my parcel?", "I want my money back"], ["track_order", "refund"], seed=17)
    [(label, confidence)] = model.predict(["has my parcel been sent?"])

Words, pairs of words and the character n-grams within words are hashed into a fixed number of columns, so there
is no vocabulary to keep and none to outgrow; on them stands scikit-learn's linear classifier. Answering needs
NumPy alone and a fraction of a millisecond, so a serving replica loads neither scikit-learn nor SciPy. It is kept
as safetensors and JSON.
"""

import functools
import itertools
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app import tables
from app.config import Config
from app.conversation import normalised
from app.errors import ModelError
from app.versions import TableVersion

FORMAT = 1
SETTINGS, WEIGHTS = "intent.json", "intent.safetensors"
COLUMNS = 2**14
"""Hashed columns: 2**16 were no more accurate on Banking77 (77 labels) and took four times the memory."""
CHARACTERS = (2, 3, 4)
"""Lengths of character n-grams; typos leave most of a word's n-grams as they were."""
REGULARISATION, EPOCHS = 2e-6, 5
"""On Banking77, ten epochs took twice as long and 1e-6 gave better calibrated confidences; neither was more accurate
by a percent."""
MAX_CONVERSATIONS = 20_000
"""Conversations read from each split, evenly over it."""
MAX_EXAMPLES = 40_000
"""Messages learned from. On the Schema-Guided Dialogues, 20,000 gave accuracy 0.528 in 4 s, 40,000 gave 0.560 in 7 s,
and all 93,000 gave 0.573 in 14 s."""

_WORD = re.compile(r"\w+")
_DIGIT = re.compile(r"\d")


class IntentModel:
    """A linear classifier over hashed n-grams; one sigmoid a label, divided by their sum."""

    def __init__(self, labels: Sequence[str], weights: np.ndarray, bias: np.ndarray) -> None:
        self.labels = tuple(labels)
        self.weights = np.ascontiguousarray(weights, dtype=np.float32)
        """(columns, labels)"""
        self.bias = np.asarray(bias, dtype=np.float32)
        """(labels,)"""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels) float32, rows that add up to 1."""
        scores = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for row, text in enumerate(texts):
            columns = hashed(text, len(self.weights))
            scores[row] = self.weights[columns].sum(axis=0) / _length(columns) + self.bias
        shares = 1.0 / (1.0 + np.exp(-np.clip(scores, -80.0, 80.0)))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """The likeliest label of each text and its probability."""
        shares = self.probabilities(texts)
        return [(self.labels[best], float(row[best])) for row, best in zip(shares, shares.argmax(axis=1), strict=True)]

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[str], seed: int) -> "IntentModel":
        """Learn from labelled texts; the same model for the same texts, labels and seed.

        Raises:
            ModelError: There are fewer than two labels to tell apart.
        """
        from scipy.sparse import csr_matrix
        from sklearn.linear_model import SGDClassifier

        if len(set(labels)) < 2:
            raise ModelError(
                f"an intent model needs two labels or more, got {sorted(set(labels))}", "label the user messages"
            )
        rows = [hashed(text, COLUMNS) for text in texts]
        values = np.concatenate([np.full(len(row), 1.0 / _length(row), dtype=np.float32) for row in rows])
        ends = np.cumsum([0, *(len(row) for row in rows)])
        matrix = csr_matrix((values, np.concatenate(rows), ends), shape=(len(rows), COLUMNS))
        classifier = SGDClassifier(
            loss="log_loss", alpha=REGULARISATION, max_iter=EPOCHS, tol=None, random_state=seed
        ).fit(matrix, list(labels))
        weights, bias = classifier.coef_, classifier.intercept_
        if len(classifier.classes_) == 2:  # scikit-learn keeps the second label's side only
            weights, bias = np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
        return cls([str(label) for label in classifier.classes_], weights.T, bias)

    def save(self, folder: Path) -> None:
        """Write the two files that `load` reads."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.weights, "bias": self.bias}, folder / WEIGHTS)
        settings = {"format": FORMAT, "labels": self.labels, "columns": len(self.weights), "characters": CHARACTERS}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "IntentModel":
        """The model that `save` wrote.

        Raises:
            ModelError: A file is missing, damaged, of another format, or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
            problem = _problem(settings, tensors)
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise ModelError(
                f"the intent model in {folder} cannot be loaded ({problem})", "restore it or train the version again"
            )
        return cls(settings["labels"], tensors["weights"], tensors["bias"])


def fit_on_table(config: Config, table: TableVersion) -> tuple[IntentModel | None, dict[str, Any]]:
    """An intent model of the table's labelled user messages, judged on those held out.

    Returns:
        The model, None where the messages carry fewer than two labels; and its figures: `intent_labels`,
        `intent_messages`, and `intent_accuracy` where labelled messages are held out.
    """
    texts, labels = (found[:MAX_EXAMPLES] for found in labelled(_messages(config, table, "train")))
    if len(set(labels)) < 2:
        return None, {"intent_labels": len(set(labels)), "intent_messages": len(texts)}
    model = IntentModel.fit(texts, labels, config.training.seed)
    figures: dict[str, Any] = {"intent_labels": len(model.labels), "intent_messages": len(texts)}
    texts, labels = labelled(_messages(config, table, "validation"))
    if texts:
        right = [label == wanted for (label, _), wanted in zip(model.predict(texts), labels, strict=True)]
        figures["intent_accuracy"] = sum(right) / len(right)
    return model, figures


def labelled(conversations: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[str]]:
    """The texts of labelled user messages, and their labels."""
    found = [
        (message["content"], message["intent"])
        for messages in conversations
        for message in messages
        if message["role"] == "user" and message.get("intent")
    ]
    return [text for text, _ in found], [label for _, label in found]


def _messages(config: Config, table: TableVersion, split: str) -> list[list[dict[str, Any]]]:
    rows = tables.read_local(config, table, ["messages"], split, MAX_CONVERSATIONS)
    found: list[list[dict[str, Any]]] = rows["messages"].to_pylist()
    return found


def hashed(text: str, columns: int) -> np.ndarray:
    """The columns that a text's words, pairs of words and character n-grams fall into, sorted, each once."""
    return np.unique(np.fromiter((zlib.crc32(gram) for gram in _grams(text)), dtype=np.int64) % columns)


def _grams(text: str) -> Iterator[bytes]:
    # Any spelling of the same characters, in any case, gives the same n-grams; so does any number of that length.
    plain = normalised(unicodedata.normalize("NFKC", text).casefold())
    words = _WORD.findall(_DIGIT.sub("0", plain))
    for word in words:
        yield word.encode()
        yield from _within(word)
    for first, second in itertools.pairwise(words):
        yield f"{first} {second}".encode()


@functools.lru_cache(maxsize=65_536)
def _within(word: str) -> tuple[bytes, ...]:
    # Marked apart from words: the n-gram "an" is not the word "an".
    framed = f" {word} "
    grams = (framed[at : at + size] for size in CHARACTERS for at in range(len(framed) - size + 1))
    return tuple(f"#{gram}".encode() for gram in grams)


def _length(columns: np.ndarray) -> float:
    # Euclidean length of a row of ones.
    return math.sqrt(max(1, len(columns)))


def _problem(settings: Any, tensors: dict[str, np.ndarray]) -> str | None:
    """What keeps settings and tensors from being a model."""
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        return f"{SETTINGS} is not of format {FORMAT}"
    labels, weights, bias = settings.get("labels"), tensors.get("weights"), tensors.get("bias")
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(labels) or len(labels) < 2:
        return f"{SETTINGS} has no list of distinct labels"
    if settings.get("characters") != list(CHARACTERS):
        return f"its n-grams are {settings.get('characters')}, this code makes {list(CHARACTERS)}"
    shapes = (settings.get("columns"), len(labels)), (len(labels),)
    if weights is None or bias is None or (weights.shape, bias.shape) != shapes:
        return f"{WEIGHTS} does not hold weights {shapes[0]} and bias {shapes[1]}"
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        return f"{WEIGHTS} holds numbers that are not finite"
    return None
