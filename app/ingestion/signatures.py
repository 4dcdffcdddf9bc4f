"""MinHash signatures of texts: what nearly equal texts are found by, kept in the table.

    signed = signatures(texts)

The similarity of two texts is the Jaccard similarity of their sets of word 3-grams. It is estimated by one permutation:
every 3-gram falls into one of 512 bins, and a signature holds two bits of the least one of each bin, or that there is
none. Of a text of a hundred words nearly every 3-gram counts, so that the estimate is nearer (a standard deviation of
0.019 at similarities of 0.6 to 0.95) than that of 128 permutations (0.035), at a fraction of the work.

Source: Broder 1997, On the resemblance and containment of documents; Li, Owen and Zhang 2012, One Permutation Hashing;
Li and König 2010, b-Bit Minwise Hashing.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.conversation import SIGNATURE_BYTES

SHINGLE_WORDS = 3
BINS = SIGNATURE_BYTES * 4
CODES = 3
"""Values of two bits, less the one that means an empty bin."""
TEXTS_AT_ONCE = 1 << 8
"""So many fit into a processor's cache with all that is made of them."""

# Scripts without spaces between words are cut into characters.
_WORD = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\p{L}\p{M}\p{N}_']+"
_IN_WORD = np.array(
    [code | 32 * (65 <= code <= 90) if chr(code).isalnum() or chr(code) in "_'" else 0 for code in range(128)]
    + [0] * 128,
    np.uint8,
)
_BASE = 0x5851F42D4C957F2D
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_ALL, _SHIFT = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(29)


def signatures(texts: pa.Array) -> np.ndarray:
    """The signature of each text, the same on every machine.

    Returns:
        (texts, SIGNATURE_BYTES) uint8, four bins a byte
    """
    signed = np.empty((len(texts), SIGNATURE_BYTES), np.uint8)
    plain = pc.fill_null(pc.string_is_ascii(texts), False).to_numpy(zero_copy_only=False)
    for rows, words in ((np.flatnonzero(plain), _ascii_words), (np.flatnonzero(~plain), _words)):
        for at in range(0, len(rows), TEXTS_AT_ONCE):
            some = rows[at : at + TEXTS_AT_ONCE]
            signed[some] = _signed(*_shingles(*words(texts.take(pa.array(some)))))
    return signed


def shingles(text: str) -> np.ndarray:
    """The hashes of a text's word 3-grams; before its first and after its last word there are two empty ones.

    Returns:
        (3-grams,) uint64; not distinct
    """
    hashes, _ = _shingles(*_words(pa.array([text], pa.string())))
    return hashes


def _signed(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rows = np.repeat(np.arange(len(counts)) * BINS, counts)
    least = np.full(len(counts) * BINS, _ALL)
    np.minimum.at(least, rows + (hashes >> np.uint64(64 - BINS.bit_length() + 1)).astype(np.int64), hashes)
    filled = np.flatnonzero(least != _ALL)
    codes = np.zeros(len(least), np.uint8)
    codes[filled] = 1 + (least[filled] & np.uint64(0xFFFF)) % np.uint64(CODES)
    first, second, third, fourth = codes.reshape(len(counts), SIGNATURE_BYTES, 4).transpose(2, 0, 1)
    return np.asarray(first | second << 2 | third << 4 | fourth << 6)


def _shingles(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the 3-grams of texts, of one after another, and how many each has; from those of their words."""
    # Two empty words between texts belong to the one before and to the one after.
    padding = SHINGLE_WORDS - 1
    places = np.arange(len(hashes)) + np.repeat(padding * np.arange(1, len(counts) + 1), counts)
    stream = np.zeros(len(hashes) + padding * (len(counts) + 1), np.uint64)
    stream[places] = hashes ^ (hashes >> _SHIFT)
    windows = len(stream) - padding
    combined = np.zeros(windows, np.uint64)
    for place, factor in enumerate(_MIX):
        combined = (combined ^ (combined >> _SHIFT)) * _MIX[0] + stream[place : place + windows] * factor
    combined = (combined ^ (combined >> _SHIFT)) * _MIX[1]
    combined ^= combined >> np.uint64(32)
    # A text without words has none of the windows over empty words alone.
    return combined[np.repeat(counts > 0, counts + padding)], np.where(counts > 0, counts + padding, 0)


def _ascii_words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """What `_words` gives, of texts that are ASCII and none of them null, without a regular expression."""
    _, offsets_buffer, content = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, len(texts) + 1, texts.offset * 4)
    first, last = int(offsets[0]), int(offsets[-1])
    # As in a word, lower case; 0: not in a word. One at either end.
    letters = np.zeros(last - first + 2, np.uint8)
    if last > first:
        letters[1:-1] = _IN_WORD[np.frombuffer(content, np.uint8, last - first, first)]
    inside = letters > 0
    borders = offsets - first  # a word ends where its text does
    opens, closes = inside[1:] & ~inside[:-1], inside[:-1] & ~inside[1:]
    at = borders[(borders > 0) & (borders < last - first)]
    joined = at[inside[at] & inside[at + 1]]
    opens[joined] = closes[joined] = True
    starts, ends = np.flatnonzero(opens), np.flatnonzero(closes)
    return _hashed(letters[1:-1], starts, ends), np.diff(np.searchsorted(starts, borders))


def _words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the words of texts, of one after another, and how many each has."""
    import polars as pl

    words = pl.Series("text", texts, dtype=pl.String).str.to_lowercase().str.extract_all(_WORD)
    found = words.explode(empty_as_null=False).drop_nulls().to_arrow().cast(pa.large_string())
    _, offsets_buffer, content = found.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64, len(found) + 1, found.offset * 8)
    first, last = int(offsets[0]), int(offsets[-1])
    letters = np.frombuffer(content, np.uint8, last - first, first) if last > first else np.empty(0, np.uint8)
    counts = words.list.len().fill_null(0).to_numpy().astype(np.int64)
    return _hashed(letters, offsets[:-1] - first, offsets[1:] - first), counts


def _hashed(letters: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The hash of each word: the polynomial of its bytes modulo 2**64, from sums of the whole."""
    powers, inverse = _powers(1 << max(10, len(letters).bit_length()))
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters * powers[: len(letters)], out=sums[1:])
    return np.asarray((sums[ends] - sums[starts]) * inverse[starts])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of a base and of its inverse modulo 2**64, from the zeroth on."""
    made = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        made.append(np.cumprod(factors))
    return made[0], made[1]


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of signatures, none of them null, as (rows, SIGNATURE_BYTES) uint8."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * SIGNATURE_BYTES, chunk.offset * SIGNATURE_BYTES)
        for chunk in column.chunks
        if len(chunk)
    ]
    return (np.concatenate(chunks) if chunks else np.empty(0, np.uint8)).reshape(-1, SIGNATURE_BYTES)
