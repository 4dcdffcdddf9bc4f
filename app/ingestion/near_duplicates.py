"""Nearly equal texts by their signatures: the bands that bring candidates together, and which of them stay.

    edges = pairs(band_keys(signed, 0.8, band), signed, 0.8)         # band by band, wherever there is a CPU
    losers = losing(edges, ...)

Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4 (bands); Shrivastava and Li 2014,
Densifying One Permutation Hashing via Rotation.
"""

import numpy as np

from app.conversation import SIGNATURE_BYTES
from app.ingestion.signatures import BINS, CODES

BANDS = 24
RECALL = 0.99
"""Share of the pairs at the threshold that have to meet in a band."""
SPREAD = 0.05
"""How much less than the similarity the share of bins in common may be."""
MOST_IN_BUCKET = 48
"""Of more rows with one band key not every pair is looked at, but each row with two others."""
ROWS_AT_ONCE = 1 << 18
_LOW_BITS = np.uint64(0x5555555555555555)
_ALL, _ONE = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(1)


def bins_a_band(threshold: float) -> int:
    """How many bins a band takes: as many as leave the pairs at the threshold to meet with probability `RECALL`.

    With r bins in each band, two texts that have a share s of the bins in common meet in some band with probability
    1 - (1 - s**r) ** BANDS.
    """
    share = threshold - SPREAD
    return next((r for r in range(16, 1, -1) if 1 - (1 - share**r) ** BANDS >= RECALL), 1)


def band_keys(signed: np.ndarray, threshold: float, band: int) -> np.ndarray:
    """What the rows of one band are brought together by: (rows,) uint64.

    An empty bin takes part as the next one that is not, so that texts of a few words meet as surely as long ones do.
    What is next differs from band to band: else a bin after many empty ones would count for all of them everywhere.
    """
    order = np.random.RandomState(band).permutation(SIGNATURE_BYTES).reshape(-1, 8)
    width = bins_a_band(threshold)
    starts = np.arange(width) * BINS // width
    keys = [_keys(signed[at : at + ROWS_AT_ONCE], order, starts) for at in range(0, len(signed), ROWS_AT_ONCE)]
    return np.concatenate(keys) if keys else np.empty(0, np.uint64)


def _keys(signed: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The keys of signatures by the bins at and after some places.

    Args:
        signed: (rows, SIGNATURE_BYTES)
        order: (words, 8), which bytes of a signature make a word of 32 bins; most bands need a few words only.
        starts: The places, in bins.
    """
    keys = np.zeros(len(signed), np.uint64)
    for begin, first in zip(*np.divmod(starts, 32), strict=True):
        codes = _word(signed, order[begin])
        rest = _any(codes) & (_ALL << np.uint64(2 * first))
        word = np.full(len(signed), begin, np.uint64)
        empty = np.flatnonzero(rest == 0)
        for step in range(1, len(order) + 1):
            if not len(empty):
                break
            following = (begin + step) % len(order)
            word[empty], codes[empty] = following, _word(signed[empty], order[following])
            rest[empty] = _any(codes[empty])
            empty = empty[rest[empty] == 0]
        bit = np.bitwise_count((rest & -rest) - _ONE).astype(np.uint64)
        source = word << np.uint64(6) | bit
        keys = (keys ^ (source << np.uint64(2) | codes >> bit & np.uint64(3))) * np.uint64(0x100000001B3)  # FNV-1a
        keys ^= keys >> np.uint64(31)
    return keys


def _word(signed: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Some eight bytes of each signature as one number, (rows,) uint64."""
    return np.asarray(np.take(signed, places, axis=1).view("<u8")[:, 0])


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of texts by their signatures, (rows, SIGNATURE_BYTES) each.

    Of the bins that either text fills, the share in which both have the same least 3-gram; unbiased: of two different
    ones, one in three has the same code by chance. A text without words is similar to none.
    """
    left, right = (np.ascontiguousarray(side).view("<u8") for side in (first, second))
    fills_left, fills_right = _any(left), _any(right)
    either = _counted(fills_left | fills_right)
    both = _counted(fills_left & fills_right)
    same = _counted(fills_left & fills_right & ~_any(left ^ right))
    return np.asarray((CODES * same - both) / ((CODES - 1) * np.maximum(1, either)))


def _any(codes: np.ndarray) -> np.ndarray:
    """Which codes of two bits are not 0, as their low bits."""
    return np.asarray((codes | codes >> _ONE) & _LOW_BITS)


def _counted(bits: np.ndarray) -> np.ndarray:
    return np.asarray(np.bitwise_count(bits).sum(axis=1, dtype=np.int64))


def pairs(keys: np.ndarray, signed: np.ndarray, threshold: float, held: int = 0) -> np.ndarray:
    """The similar rows among those with the same key of one band.

    Args:
        keys: (rows,)
        signed: (rows, SIGNATURE_BYTES)
        threshold: Least similarity.
        held: The first so many rows are not compared with each other.

    Returns:
        (pairs, 2), the smaller row first
    """
    # Of the held rows only those count whose key a new one has.
    met = np.flatnonzero(np.isin(keys[:held], keys[held:])) if held else np.empty(0, np.int64)
    places = np.concatenate([met, np.arange(held, len(keys))])
    order = places[np.argsort(keys[places], kind="stable")]
    ordered = keys[order]
    found = []
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, bool)
    group = np.cumsum(begins) - 1
    sizes = np.bincount(group) if len(group) else np.empty(0, int)
    first = np.flatnonzero(begins)
    for distance in range(1, min(MOST_IN_BUCKET, int(sizes.max(initial=0)))):
        candidates = np.flatnonzero(group[distance:] == group[:-distance])
        if distance > 1:
            candidates = candidates[sizes[group[candidates]] <= MOST_IN_BUCKET]
        found.append(_similar(order[candidates], order[candidates + distance], signed, threshold, held))
    large = np.flatnonzero(sizes[group] > MOST_IN_BUCKET) if len(group) else np.empty(0, int)
    found.append(_similar(order[first[group[large]]], order[large], signed, threshold, held))
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _similar(left: np.ndarray, right: np.ndarray, signed: np.ndarray, threshold: float, held: int) -> np.ndarray:
    chosen = (np.maximum(left, right) >= held) & (left != right)
    left, right = left[chosen], right[chosen]
    near = [
        similarity(signed[left[at : at + ROWS_AT_ONCE]], signed[right[at : at + ROWS_AT_ONCE]]) >= threshold
        for at in range(0, len(left), ROWS_AT_ONCE)
    ]
    mask = np.concatenate(near) if near else np.empty(0, bool)
    return np.stack([np.minimum(left[mask], right[mask]), np.maximum(left[mask], right[mask])], axis=1)


def losing(edges: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The rows that go: every one that is similar to a better row which stays.

    Rows are taken from the best on, so of a chain in which each is similar only to the next, not all but one go.

    Args:
        edges: (pairs, 2) similar rows.
        rank: (rows,), all different; the lower, the better.

    Returns:
        The rows, ascending.
    """
    edges = np.unique(edges, axis=0)
    by_rank = np.where((rank[edges[:, 0]] < rank[edges[:, 1]])[:, None], edges, edges[:, ::-1])
    gone: set[int] = set()
    for better, worse in by_rank[np.argsort(rank[by_rank[:, 0]], kind="stable")].tolist():
        if better not in gone:
            gone.add(worse)
    return np.array(sorted(gone), np.int64)
