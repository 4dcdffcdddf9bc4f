"""Is a batch of conversations like the one before? Small sketches of both are compared; no texts are kept.

    found = compare(Sketch.of(old_rows), Sketch.of(new_rows), false_alarm_rate=0.01)
    drifted = [drift.name for drift in found if drift.drifted]

A sketch can be merged with others, so tasks make one each of their share, and stored as JSON beside a version.
"""

import base64
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

BUCKETS = 4_096
"""Hashed words."""
BINS, BINS_A_DOUBLING = 160, 8
"""Of a length; the last one begins at nearly 2**20."""
CATEGORIES, LENGTHS = ("intents", "languages", "channels"), ("characters", "messages")
NAMES = (*CATEGORIES, *LENGTHS, "words")
MISSING = ""
"""The category of what has none."""
LEAST_EXPECTED = 5.0
"""Categories of which fewer are expected in either batch are counted as one."""
LEAST_EFFECT: Mapping[str, float] = {**dict.fromkeys(CATEGORIES, 0.05), **dict.fromkeys(LENGTHS, 0.05), "words": 0.02}
"""Effects below are no drift, however sure they are; see `Drift.effect`."""


@dataclass(frozen=True)
class Sketch:
    """What a set of conversations is made of, in a few kB."""

    size: int = 0
    """Conversations."""
    intents: Counter[str] = field(default_factory=Counter)
    """Conversations with each intent, as are the next two; `MISSING` for those without one."""
    languages: Counter[str] = field(default_factory=Counter)
    channels: Counter[str] = field(default_factory=Counter)
    characters: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """(bins,), conversations by number of characters"""
    messages: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """(bins,), conversations by number of messages"""
    words: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    """(buckets,), conversations in which a word of the bucket occurs; every number counts as its length"""

    @classmethod
    def of(cls, rows: pa.Table) -> "Sketch":
        """The sketch of conversations.

        Args:
            rows: Has the columns `intent`, `language`, `channel` and `messages` of `app.conversation.SCHEMA`.
        """
        lists = rows["messages"].combine_chunks()
        contents = lists.flatten().field("content").to_pylist()
        turns = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(turns).tolist()
        texts = ["\n".join(contents[start:end]) for start, end in itertools.pairwise([0, *ends])]
        return cls(
            size=rows.num_rows,
            intents=_counted(rows["intent"]),
            languages=_counted(rows["language"]),
            channels=_counted(rows["channel"]),
            characters=_binned(np.array([len(text) for text in texts])),
            messages=_binned(turns),
            words=_worded(texts),
        )

    def merged(self, other: "Sketch") -> "Sketch":
        """The sketch of both sets together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("size", *NAMES)}
        return Sketch(**sums)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        categories = {name: dict(getattr(self, name).most_common()) for name in CATEGORIES}
        lengths = {name: getattr(self, name).tolist() for name in LENGTHS}
        packed = base64.b85encode(zlib.compress(self.words.astype("<u4").tobytes(), 9)).decode()
        return {"size": self.size, **categories, **lengths, "words": packed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Sketch":
        """The sketch that `to_json` made."""
        fields: dict[str, Any] = {name: Counter(value[name]) for name in CATEGORIES}
        fields |= {name: np.array(value[name], np.int64) for name in LENGTHS}
        words = np.frombuffer(zlib.decompress(base64.b85decode(value["words"])), "<u4").astype(np.int64)
        return cls(size=value["size"], words=words, **fields)


@dataclass(frozen=True)
class Drift:
    """One comparison of two batches."""

    name: str
    statistic: float
    """Categories: likelihood ratio G. Lengths: Kolmogorov-Smirnov distance. Words: -log10 of the smallest p-value."""
    threshold: float
    """What the statistic stays below in all but a known share of comparisons of batches of the same kind."""
    effect: float
    """Categories: share of the conversations that would have to change theirs. Lengths: Kolmogorov-Smirnov distance.
    Words: how much the share of conversations with the word that changed most has changed."""
    drifted: bool
    """Whether the statistic is above the threshold and the effect is not below `LEAST_EFFECT`."""


def compare(old: Sketch, new: Sketch, false_alarm_rate: float = 0.01) -> list[Drift]:
    """Compare a batch with the one before, in each of `NAMES`.

    Batches of the same kind, of independent conversations, are called drifted in at most `false_alarm_rate` of all
    calls: each comparison gets an equal part of it (Bonferroni). An empty batch has not drifted.
    """
    if not (old.size and new.size):
        return []
    rate = max(1e-300, false_alarm_rate / len(NAMES))
    found = [_categories(name, getattr(old, name), getattr(new, name), rate) for name in CATEGORIES]
    found += [_lengths(name, getattr(old, name), getattr(new, name), rate) for name in LENGTHS]
    return [*found, _words(old, new, rate)]


def js_divergence(p_counts: np.ndarray, q_counts: np.ndarray, weight: float = 0.5) -> float:
    """Jensen-Shannon divergence of two distributions over the same categories, in bits: 0 if equal, 1 if disjoint.

    Args:
        p_counts: (categories,)
        q_counts: (categories,)
        weight: Of the first. With each one's share of all counts it is the mutual information of category and
            distribution: times 2 ln(2) and the number of all counts, the likelihood ratio G.

    Source: Lin 1991, Divergence Measures Based on the Shannon Entropy.
    """
    p, q = _shares(p_counts), _shares(q_counts)
    return max(0.0, _entropy(weight * p + (1 - weight) * q) - weight * _entropy(p) - (1 - weight) * _entropy(q))


def psi(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """Population stability index of two distributions over the same categories.

    Half a count is added to each, so that an empty category gives no infinity. Customary: below 0.1 is stable, above
    0.25 is a shift.
    """
    p, q = _shares(np.asarray(p_counts) + 0.5), _shares(np.asarray(q_counts) + 0.5)
    return float(((q - p) * np.log(q / p)).sum())


def total_variation(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """Share of one distribution that would have to move to make it the other: 0 if equal, 1 if disjoint."""
    return float(np.abs(_shares(p_counts) - _shares(q_counts)).sum() / 2)


def ks(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two histograms over the same bins, in order."""
    return float(np.abs(np.cumsum(_shares(p_counts)) - np.cumsum(_shares(q_counts))).max())


def new_word_share(old: Sketch, new: Sketch) -> float:
    """Share of the new batch's words, once a conversation, that the old one has in no conversation."""
    return float(new.words[old.words == 0].sum() / max(1, new.words.sum()))


def _categories(name: str, old: Counter[str], new: Counter[str], rate: float) -> Drift:
    """Source: Williams 1976, Improved Likelihood Ratio Tests for Complete Contingency Tables."""
    from scipy.stats import chi2

    counts = np.array([[batch[key] for key in old | new] for batch in (old, new)], dtype=np.float64)
    total, first = counts.sum(), counts[0].sum() / counts.sum()
    rare = counts.sum(axis=0) * min(first, 1 - first) < LEAST_EXPECTED
    pooled = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)]) if rare.any() else counts
    freedom = max(1, pooled.shape[1] - 1)
    # The correction without which G is too large where few are expected.
    excess = (1 / first + 1 / (1 - first) - 1) * ((total / pooled.sum(axis=0)).sum() - 1) / (6 * total * freedom)
    statistic = float(2 * math.log(2) * total * js_divergence(pooled[0], pooled[1], first) / (1 + excess))
    threshold = float(chi2.isf(rate, freedom))
    effect = total_variation(counts[0], counts[1])
    return Drift(name, statistic, threshold, effect, statistic > threshold and effect >= LEAST_EFFECT[name])


def _lengths(name: str, old: np.ndarray, new: np.ndarray, rate: float) -> Drift:
    # Smirnov's limit; on bins and for small batches the true false-alarm rate is lower still.
    distance = ks(old, new)
    threshold = math.sqrt(math.log(2 / rate) / 2 * (1 / old.sum() + 1 / new.sum()))
    return Drift(name, distance, threshold, distance, distance > threshold and distance >= LEAST_EFFECT[name])


def _words(old: Sketch, new: Sketch, rate: float) -> Drift:
    """The word whose share of the conversations changed most surely.

    Of the conversations with a word, the number in the new batch is binomial if the word is rare, and varies less if
    it is common: so the test errs on the safe side, whatever the batches' sizes. Words of one conversation go
    together; Bonferroni's correction over all of them does not mind.
    """
    from scipy.stats import binom

    used = (old.words + new.words) > 0
    before, after = old.words[used], new.words[used]
    if not len(before):
        return Drift("words", 0.0, -math.log10(rate), 0.0, False)
    share = new.size / (old.size + new.size)
    p_values = 2 * np.minimum(binom.sf(after - 1, before + after, share), binom.cdf(after, before + after, share))
    evidence = -np.log10(np.clip(p_values, 1e-300, 1.0))
    changes = np.abs(after / new.size - before / old.size)
    threshold = -math.log10(rate / len(before))
    sure = evidence > threshold
    effect = float(changes[sure].max() if sure.any() else changes[evidence.argmax()])
    drifted = bool(sure.any()) and effect >= LEAST_EFFECT["words"]
    return Drift("words", float(evidence.max()), threshold, effect, drifted)


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())


def _shares(counts: np.ndarray) -> np.ndarray:
    values = np.asarray(counts, dtype=np.float64)
    return np.asarray(values / max(1e-300, values.sum()))


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    return Counter(value or MISSING for value in column.to_pylist())


def _binned(lengths: np.ndarray) -> np.ndarray:
    bins = (BINS_A_DOUBLING * np.log2(np.maximum(1, lengths))).astype(np.int64)
    return np.bincount(np.minimum(BINS - 1, bins), minlength=BINS)


def _worded(texts: Sequence[str]) -> np.ndarray:
    """(buckets,), the number of texts in which a word of the bucket occurs."""
    import polars as pl

    words = pl.Series(texts, dtype=pl.String).str.to_lowercase().str.replace_all(r"\d", "0").str.extract_all(r"\w+")
    counts = words.list.len().to_numpy().astype(np.int64)
    coded = words.explode(empty_as_null=False).to_arrow().cast(pa.string()).dictionary_encode()
    hashes = [zlib.crc32(word.encode()) % BUCKETS for word in coded.dictionary.to_pylist()]
    buckets = np.array(hashes, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
    once = np.unique(np.repeat(np.arange(len(texts)), counts) * BUCKETS + buckets)
    return np.bincount(once % BUCKETS, minlength=BUCKETS)
