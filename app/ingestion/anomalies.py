"""Conversations unlike the others: features of a text, what is usual, how far from it a conversation is.

    usual = Baseline.fit(features(history))
    unusual = usual.scores(features(batch)) > 12

Text once decoded with the wrong character set is found without any statistics, by `mojibake`.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

FEATURES: tuple[str, ...] = (
    "characters",  # of all messages; natural logarithm, as are the next four
    "messages",
    "words_per_message",
    "longest_message",  # characters
    "longest_word",  # characters
    "letters",  # share of the characters, as are the next four; all beyond ASCII count as letters
    "digits",
    "upper_case",
    "punctuation",
    "non_ascii",
    "repetition",  # share of the most frequent word, its first occurrence left out
    "distinct_words",  # log(distinct words) / log(words): Herdan's C, which hardly depends on the length
    "compressed",  # log(bytes, compressed by LZ4) / log(bytes)
)
FLOORS = np.array([0.15] * 5 + [0.02] * 8)
"""Smallest scale of each feature: a history in which all are alike does not make the next one an anomaly."""
TAILS = ((0.95, 1.645), (0.99, 2.326))
"""Quantiles that widen the scale where a tail is heavier than the normal distribution's, and that one's quantiles."""
DISTANCE_FLOOR = math.sqrt(0.5)
"""Smallest scale of the distance: that of independent features."""
TREES, TREE_SAMPLE, FOREST_FLOOR = 100, 1_024, 0.05
"""Of the isolation forest; the last is the smallest scale of its score, which lies between 0 and 1."""
CLIP, SHRINKAGE = 3.0, 0.1
"""How far out a value still counts for correlations, and how far those are pulled towards none."""

_KINDS = bytes(33) + b"." * 15 + b"0" * 10 + b"." * 7 + b"A" * 26 + b"." * 6 + b"a" * 26 + b"." * 4 + b"~" * 129
"""The kind of the character that a byte of UTF-8 begins."""
_CONTINUATION = bytes(range(128, 192))
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_LATIN = re.compile(r"[\x80-\x9f]")
_HIGH = re.compile(r"[^\x00-\x7f]+")
_CP1252 = {byte: bytes([byte]).decode("cp1252", "ignore") for byte in range(128, 160)}
_BYTE_OF = {ord(character): byte for byte, character in _CP1252.items() if character}
_LIKELY = re.compile("[\u00a0-\u017f\u2000-\u22ff\ufb00-\ufb06\U0001f000-\U0001ffff]|[^\x00-\x7f]{2}")


def features(messages: pa.ListArray) -> np.ndarray:
    """What conversations look like, whatever they are about.

    Args:
        messages: Those of each conversation, normalised; a list of structs with a field `content`.

    Returns:
        (conversations, features) float32; `FEATURES` names the columns.
    """
    contents = messages.flatten().field("content").to_pylist()
    ends = np.cumsum(messages.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)).tolist()
    codec = pa.Codec("lz4_raw")  # zlib tells as much and takes seven times as long
    rows = [_features(contents[start:end], codec) for start, end in itertools.pairwise([0, *ends])]
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(FEATURES))


def _features(contents: Sequence[str], codec: pa.Codec) -> tuple[float, ...]:
    text = "\n".join(contents)
    raw = text.encode(errors="replace")
    kinds = raw.translate(_KINDS, _CONTINUATION)  # a byte a character: what kind of character it is
    words = Counter(text.split())
    count, characters = words.total(), max(1, len(text))
    lower, upper, other = kinds.count(b"a"), kinds.count(b"A"), kinds.count(b"~")
    return (
        math.log1p(len(text)),
        math.log1p(len(contents)),
        math.log1p(count / max(1, len(contents))),
        math.log1p(max(map(len, contents), default=0)),
        math.log1p(max(map(len, words), default=0)),
        (lower + upper + other) / characters,
        kinds.count(b"0") / characters,
        upper / characters,
        kinds.count(b".") / characters,
        other / characters,
        (max(words.values(), default=1) - 1) / (count + 10),
        math.log(len(words) + 1) / math.log(count + 1) if count else 1.0,
        math.log(codec.compress(raw).size + 1) / math.log(len(raw) + 8),
    )


@dataclass(frozen=True)
class Baseline:
    """What is usual: median and scale of each feature, and how features go together.

    A score is a number of robust standard deviations from the median: of the feature that is farthest out, or of
    the combination of all, whichever is more. A scale is the median absolute deviation times 1.4826, for a normal
    distribution the standard deviation, and more where a tail is heavier than that one's.

    Combinations are judged twice: by the Mahalanobis distance, and by an isolation forest, which knows of no shape but
    saturates: what is far beyond anything seen before has hardly more than what is just beyond it. On planted
    anomalies the distance finds all that the forest finds (see benchmarks/quality.py), so the forest's robust standard
    deviations count `forest_weight` times, and by default rarely decide.
    """

    count: int
    """Conversations it was fitted on."""
    median: np.ndarray
    """(features,)"""
    below: np.ndarray
    """(features,), scale of values below the median"""
    above: np.ndarray
    """(features,), scale of values above it"""
    precision: np.ndarray
    """(features, features), inverse of the covariance of deviations"""
    distance: float
    """Median of the Mahalanobis distances."""
    distance_scale: float
    forest: Any
    """scikit-learn's IsolationForest, of deviations"""
    isolation: float
    """Median of the forest's scores."""
    isolation_scale: float
    forest_weight: float

    @classmethod
    def fit(cls, found: np.ndarray, forest_weight: float = 1.6) -> "Baseline":
        """What is usual in one conversation or more, from `features`; a few per mille of anomalies do no harm.

        Args:
            found: (conversations, features)
            forest_weight: What a robust standard deviation of the isolation forest counts.
        """
        from sklearn.ensemble import IsolationForest

        assert len(found), "a baseline needs conversations"
        values = found.astype(np.float64)
        median = np.median(values, axis=0)
        below, above = _scale(median - values, FLOORS), _scale(values - median, FLOORS)
        deviations = _deviations(values, median, below, above)
        precision = _precision(deviations)
        distances = _distances(deviations, precision)
        middle = float(np.median(distances))
        scale = float(_scale(distances - middle, DISTANCE_FLOOR))
        forest = IsolationForest(n_estimators=TREES, max_samples=min(TREE_SAMPLE, len(found)), random_state=0)
        isolated = -forest.fit(deviations).score_samples(deviations)
        isolation = float(np.median(isolated))
        isolation_scale = float(_scale(isolated - isolation, FOREST_FLOOR))
        return cls(
            len(found), median, below, above, precision, middle, scale, forest, isolation, isolation_scale,
            forest_weight,
        )  # fmt: skip

    def scores(self, found: np.ndarray) -> np.ndarray:
        """(conversations,) float32, robust standard deviations from what is usual."""
        if not len(found):
            return np.empty(0, np.float32)
        return np.asarray(np.maximum.reduce(list(self.parts(found).values())), dtype=np.float32)

    def parts(self, found: np.ndarray) -> dict[str, np.ndarray]:
        """The scores by what they come from: `feature`, `distance` and `forest`, which is weighted."""
        deviations = self._deviations(found)
        isolated = (-self.forest.score_samples(deviations) - self.isolation) / self.isolation_scale
        return {
            "feature": np.abs(deviations).max(axis=1),
            "distance": (_distances(deviations, self.precision) - self.distance) / self.distance_scale,
            "forest": self.forest_weight * isolated,
        }

    def reason(self, row: np.ndarray) -> str:
        """The three features that stand out most in one conversation, (features,), and by how much."""
        deviations = self._deviations(row[None])[0]
        farthest = np.argsort(-np.abs(deviations), kind="stable")[:3]
        return ", ".join(f"{FEATURES[place]} {deviations[place]:+.1f}" for place in farthest)

    def summary(self) -> dict[str, Any]:
        """What a report says of it; plain, for JSON."""
        kinds = {"median": self.median, "scale_below": self.below, "scale_above": self.above}
        tables = {kind: dict(zip(FEATURES, column.tolist(), strict=True)) for kind, column in kinds.items()}
        return {"conversations": self.count, **tables}

    def _deviations(self, found: np.ndarray) -> np.ndarray:
        return _deviations(found.astype(np.float64), self.median, self.below, self.above)


def _scale(excess: np.ndarray, floor: Any) -> np.ndarray:
    """The scale of one side of a distribution, by column; `excess` is how far above the median values are."""
    tails = [np.quantile(excess, share, axis=0) / normal for share, normal in TAILS]
    return np.asarray(np.max(np.broadcast_arrays(floor, 1.4826 * np.median(np.abs(excess), axis=0), *tails), axis=0))


def _deviations(values: np.ndarray, median: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    return np.asarray((values - median) / np.where(values < median, below, above))


def _precision(deviations: np.ndarray) -> np.ndarray:
    # In robust units: a feature that hardly varies has a variance of 1, its floor, and correlates with none.
    covariance = np.cov(np.clip(deviations, -CLIP, CLIP), rowvar=False, bias=True)
    np.fill_diagonal(covariance, np.maximum(1.0, covariance.diagonal()))
    return np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(covariance)))


def _distances(deviations: np.ndarray, precision: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(((deviations @ precision) * deviations).sum(axis=1)))


def mojibake(text: str) -> bool:
    """Whether text, not normalised yet, was once decoded with the wrong character set, or holds control characters.

    That is: characters that, written as Windows-1252 or Latin-1, are the UTF-8 of fewer characters which are likely
    to be meant: Latin letters, punctuation, symbols, or two of any script; C1 controls; a replacement character.
    """
    if text.isascii():
        return not text.isprintable() and _CONTROL.search(text) is not None
    return "\ufffd" in text or bool(_CONTROL.search(text) or _LATIN.search(text)) or _misread(text)


def repaired(text: str) -> str:
    """The text as it was meant: decoded once more, control characters left out; a replacement character stays."""
    text = _CONTROL.sub("", text)
    while True:  # some texts were misread more than once
        if _misread(text):
            text = _HIGH.sub(lambda run: _decoded(run[0]) or run[0], text)
        elif _LATIN.search(text):
            text = _LATIN.sub(lambda found: _CP1252[ord(found[0])], text)
        else:
            return text


def _misread(text: str) -> bool:
    return any((decoded := _decoded(run)) and _LIKELY.search(decoded) for run in _HIGH.findall(text))


def _decoded(run: str) -> str | None:
    """What characters beyond ASCII are if they are bytes of UTF-8 written as Windows-1252 or Latin-1."""
    try:
        return run.translate(_BYTE_OF).encode("latin-1").decode()
    except UnicodeError:
        return None
