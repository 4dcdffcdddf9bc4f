"""Texts to token ids, many at once.

    ids, ends = token_ids(tokenizer, contents)       # ids[ends[i] : ends[i + 1]] are those of text i

Customers and shops repeat their words: the tokenizer that Rayloop trains never joins two words into one token, so each
distinct word of a batch is tokenised once and the rest is looked up, ten times faster. Texts with two white spaces in
a row, and those of other tokenizers, are tokenised whole.
"""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

MEMO_WORDS = 1_000_000
"""So many words are remembered at most, about 200 MB."""
# What `pre_tokenizer` cuts a text into if it has no two white spaces in a row: GPT-2's pattern with digits apart.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\p{N}|\s"
# Two white spaces as that pattern understands them; pyarrow's \s knows six of ASCII alone.
_SPACES = r"[\t-\r\x{85}\p{Z}]{2}"


def pre_tokenizer() -> "PreTokenizer":
    """Where the tokenizers that Rayloop trains cut a text: into words, digits one by one."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of each text; what looks like a special token is text.

    Args:
        tokenizer: A fast one is needed for speed; any will do.
        texts: None of them null.

    Returns:
        (tokens,) int32 of one text after another, and (texts + 1,) where each text's begin and end
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found: list[Any] = [
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts.to_pylist()
        ]
        return _joined(found)
    if not _is_ours(backend):
        return _whole(backend, texts)
    spaced = pc.match_substring_regex(texts, _SPACES).to_numpy(zero_copy_only=False)
    if not spaced.any():
        return _by_words(backend, texts)
    apart = _by_words(backend, texts.filter(pa.array(~spaced))), _whole(backend, texts.filter(pa.array(spaced)))
    lists = pa.concat_arrays([pa.ListArray.from_arrays(ends.astype(np.int32), ids) for ids, ends in apart])
    places = np.argsort(np.argsort(spaced, kind="stable"), kind="stable")
    lists = lists.take(pa.array(places))
    return lists.flatten().to_numpy(), lists.offsets.to_numpy().astype(np.int64)


def _whole(backend: "Tokenizer", texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return _joined([entry.ids for entry in encoded])


def _is_ours(backend: "Tokenizer") -> bool:
    """Whether a tokenizer cuts texts as `pre_tokenizer` does, and changes nothing before that."""
    if backend.normalizer is not None or backend.pre_tokenizer is None or type(backend.model).__name__ != "BPE":
        return False
    return bool(_state(backend.pre_tokenizer) == _state(pre_tokenizer()))


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__())


def _by_words(backend: "Tokenizer", texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    # A space always begins a word, so what stands between spaces is looked up whole: regular expressions are slow.
    pieces = pc.split_pattern(texts, " ")
    coded = pieces.flatten().dictionary_encode()
    counts = pieces.value_lengths().to_numpy(zero_copy_only=False)
    begins = np.concatenate([[0], np.cumsum(counts)])
    places = coded.indices.to_numpy(zero_copy_only=False)
    first, which = np.unique(places[begins[:-1]], return_inverse=True)
    alone = coded.dictionary.take(pa.array(first))
    nothing, space = (pa.scalar(text, coded.dictionary.type) for text in ("", " "))
    spaced = pc.binary_join_element_wise(nothing, coded.dictionary, space)
    known, known_ends = _by_pattern(backend, pa.concat_arrays([spaced, alone]))
    places = places.copy()
    places[begins[:-1]] = len(spaced) + which  # a text's first piece has no space before it
    lists = pa.ListArray.from_arrays(pa.array(known_ends.astype(np.int32)), pa.array(known)).take(pa.array(places))
    ends = lists.offsets.to_numpy()
    return lists.flatten().to_numpy(), ends[begins].astype(np.int64)


def _by_pattern(backend: "Tokenizer", pieces: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl
    from tokenizers import pre_tokenizers

    words = pl.Series("piece", pieces, dtype=pl.String).str.extract_all(_WORD)
    coded = words.explode(empty_as_null=False).to_arrow().cast(pa.string()).dictionary_encode()
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    memo = _memo(backend.to_str())
    distinct = coded.dictionary.to_pylist()
    for word in distinct:
        if word not in memo:
            spelled = spelling.pre_tokenize_str(word)
            memo[word] = [token.id for part, _ in spelled for token in backend.model.tokenize(part)]
    known, known_ends = _joined([memo[word] for word in distinct])
    if len(memo) > MEMO_WORDS:
        memo.clear()
    places = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    sizes = np.diff(known_ends)[places]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    # The tokens of word w are known[known_ends[w] : known_ends[w + 1]]; gathered for one word after another.
    gathered = known[np.arange(ends[-1]) + np.repeat(known_ends[:-1][places] - ends[:-1], sizes)]
    counts = words.list.len().fill_null(0).to_numpy().astype(np.int64)
    return gathered, ends[np.concatenate([[0], np.cumsum(counts)])]


@lru_cache(maxsize=2)
def _memo(tokenizer: str) -> dict[str, list[int]]:
    """The tokens of words that this process has met before; a task gets its tokenizer anew, as JSON tells it apart."""
    return {}


def _joined(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.concatenate([[0], np.cumsum([len(entry) for entry in lists], dtype=np.int64)]).astype(np.int64)
    return np.array([token for entry in lists for token in entry], np.int32), ends
