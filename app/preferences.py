"""Preference pairs: two replies to the same messages, one of which people liked better.

They come from the product's own traffic, where customers rated answers to the same question up and down, and from
tables of pairs as others keep them: JSON Lines or Parquet with `prompt`, `chosen` and `rejected`, each a text or a list
of {"role", "content"}; where `chosen` and `rejected` are whole conversations, `prompt` may be missing.
"""

import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from app import traffic
from app.config import Config
from app.conversation import ROLES, Message, content_hash, normalised
from app.errors import SourceError, StageFailed
from app.privacy import Detector, Mask
from app.storage import Storage, open_uri
from app.traffic import Exchange
from app.versions import digest

logger = logging.getLogger(__name__)

TRAFFIC = "traffic:"
PAIRS_PER_QUESTION = 16
"""A question that is asked all day does not outweigh all others."""


@dataclass(frozen=True)
class Pair:
    """Two replies to the same messages."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    @property
    def key(self) -> str:
        """Of the prompt: all pairs of a question are on the same side of the split."""
        return content_hash(self.prompt)


def collect(config: Config) -> list[Pair]:
    """The pairs of all `training.dpo.sources`, personal data masked as in ingestion, each once, in an order of its own.

    Raises:
        SourceError: A file is not there or cannot be read.
        StageFailed: There is no pair, or more records are no pairs than `ingestion.max_refused_fraction` allows.
    """
    found: list[Pair] = []
    refused: Counter[str] = Counter()
    sources = config.training.dpo.sources
    for source in sources:
        if source == TRAFFIC:
            found += of_exchanges(*rated(Storage(config.storage.uri)))
            continue
        for row in _rows(source):
            try:
                found.append(parse(row))
            except ValueError as error:
                refused[str(error)] += 1
    if refused:
        share = refused.total() / (len(found) + refused.total())
        reasons = "; ".join(f"{count} times {reason}" for reason, count in refused.most_common(3))
        if share > config.ingestion.max_refused_fraction:
            raise StageFailed(
                f"{share:.0%} of the records of {', '.join(sources)} are no preference pairs: {reasons}",
                "a pair has prompt, chosen and rejected; or raise ingestion.max_refused_fraction",
            )
        logger.warning("left out %d records that are no preference pairs: %s", refused.total(), reasons)
    if not found:
        raise StageFailed(
            f"there are no preference pairs in {', '.join(sources)}",
            "a pair needs a good and a bad answer to the same question: collect feedback, or name a file of pairs in "
            "training.dpo.sources",
        )
    if config.ingestion.privacy.mask:
        detector = Detector.of(config.ingestion.privacy)
        found = [_masked(pair, detector) for pair in found]
    return _distinct(found)


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """Names a set of pairs."""
    return digest([asdict(pair) for pair in pairs])


def rated(storage: Storage) -> tuple[list[Exchange], dict[str, int]]:
    """The exchanges that were rated, oldest first, and the newest rating of each, 1 or -1, by response id."""
    by_time = sorted(traffic.read_feedback(storage), key=lambda entry: entry.received_at)
    newest = {entry.response_id: entry.rating for entry in by_time}
    ratings = {name: rating for name, rating in newest.items() if rating in (1, -1)}
    exchanges = [exchange for exchange in traffic.read_exchanges(storage) if exchange.response_id in ratings]
    return sorted(exchanges, key=lambda exchange: exchange.received_at), ratings


def of_exchanges(exchanges: Sequence[Exchange], ratings: dict[str, int]) -> list[Pair]:
    """Each reply rated up beside each one rated down to the same messages, at most PAIRS_PER_QUESTION a question.

    Left out are exchanges that did not end well or that a person took over, and replies that were rated both ways.
    """
    replies: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: {1: {}, -1: {}})
    prompts: dict[str, tuple[Message, ...]] = {}
    for exchange in exchanges:
        if exchange.is_conversation and exchange.status == "ok" and exchange.handover is None and exchange.reply:
            key = content_hash(exchange.messages)
            prompts.setdefault(key, tuple(_plain(message) for message in exchange.messages))
            replies[key][ratings[exchange.response_id]].setdefault(normalised(exchange.reply), exchange.reply)
    found = []
    for key, by_rating in replies.items():
        good, bad = by_rating[1], by_rating[-1]
        both = good.keys() & bad.keys()
        combined = itertools.product(
            [text for name, text in good.items() if name not in both],
            [text for name, text in bad.items() if name not in both],
        )
        found += [Pair(prompts[key], *texts) for texts in itertools.islice(combined, PAIRS_PER_QUESTION)]
    return found


def parse(row: Any) -> Pair:
    """A pair from a record of a file.

    Raises:
        ValueError: Saying what it lacks.
    """
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    chosen, rejected = (_messages(row.get(name), name, "assistant") for name in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _messages(row["prompt"], "prompt", "user")
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise ValueError("chosen and rejected answer different messages")
        chosen, rejected = chosen[-1:], rejected[-1:]
    if not prompt:
        raise ValueError("prompt is missing")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            raise ValueError(f"{name} is not one reply of the assistant")
    if normalised(chosen[0]["content"]) == normalised(rejected[0]["content"]):
        raise ValueError("chosen and rejected are the same")
    return Pair(tuple(prompt), chosen[0]["content"], rejected[0]["content"])


def _messages(value: Any, name: str, role: str) -> list[Message]:
    """A text, as one message of a role, or a list of messages, checked."""
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is missing")
    for message in value:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{name} holds something other than messages with role and content")
    return [_plain(message) for message in value]


def _plain(message: Any) -> Message:
    return {"role": message["role"], "content": message["content"]}


def _masked(pair: Pair, detector: Detector) -> Pair:
    texts = [*(message["content"] for message in pair.prompt), pair.chosen, pair.rejected]
    mask = Mask(detector, texts)
    *prompt, chosen, rejected = (mask.text(text) for text in texts)
    roles = [message["role"] for message in pair.prompt]
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, prompt, strict=True)]
    return Pair(tuple(messages), chosen, rejected)


def _distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair once; sorted by its digest, so that the order of log files and folders does not matter."""
    return [pair for _, pair in sorted({pairs_digest([pair]): pair for pair in pairs}.items())]


def _rows(uri: str) -> Iterator[Any]:
    """The records of a JSON Lines or Parquet file, or of all those in a folder."""
    filesystem, path = open_uri(uri)
    try:
        info = filesystem.get_file_info(path)
        files = [info]
        if info.type == fs.FileType.Directory:
            files = sorted(filesystem.get_file_info(fs.FileSelector(path)), key=lambda file: file.path)
        files = [file for file in files if file.type == fs.FileType.File and file.extension in ("jsonl", "parquet")]
        if not files:
            raise SourceError(
                f"training.dpo.sources: {uri} is no .jsonl or .parquet file and no folder of them", "check the path"
            )
        for file in files:
            with filesystem.open_input_file(file.path) as stream:
                if file.extension == "parquet":
                    for batch in pq.ParquetFile(stream).iter_batches():
                        yield from batch.to_pylist()
                else:
                    yield from map(_json, stream.read().splitlines())
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise SourceError(f"cannot read preference pairs from {uri} ({error})", "give JSON Lines or Parquet") from error


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
