"""Rules and packing that the scripts share where they work record by record in Python: the product's own functions.

They need numpy, pyarrow, pydantic, orjson and phonenumbers; tokens come from Hugging Face tokenizers, a batch at once.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from app.conversation import END, ROLES, Encoded, Message, normalised_hash
from app.ingestion.quality import Conversation, Refusal, Rules, check, parse
from app.privacy import Detector, mask_messages
from app.settings.ingestion import ColumnsConfig, IngestionConfig
from app.training.packing import fill
from benchmarks.peers.protocol import BLOCK_TOKENS

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
DETECTOR = Detector.of(IngestionConfig().privacy)
RULES = Rules.of(IngestionConfig(), datetime.now(UTC))
COLUMNS = ColumnsConfig()


def cleaned(line: bytes, masks: bool) -> Conversation | None:
    """The valid, normalised and masked conversation of a line; none if a rule refuses it."""
    try:
        found = check(parse(line), COLUMNS, RULES, None)
    except Refusal:
        return None
    if masks:
        found.messages, counts = mask_messages(found.messages, DETECTOR)
        found.masked = counts.total()
    return found


def row_of(found: Conversation) -> dict[str, Any]:
    """What is stored of a conversation."""
    return {
        "conversation_id": found.conversation_id,
        "channel": found.channel,
        "language": found.language,
        "started_at": found.started_at,
        "intent": found.intent,
        "messages": found.messages,
        "content_hash": normalised_hash(found.messages),
    }


class Packer:
    """Conversations to packed blocks of tokens.

    Args:
        path: A tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._opening = {role: self._tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}
        self._end = self._tokenizer.token_to_id(END)
        self._pad = self._tokenizer.token_to_id("<|pad|>")

    def blocks(self, conversations: Sequence[Sequence[Message]]) -> pa.Table:
        """input_ids, position_ids and labels, each of `BLOCK_TOKENS`."""
        texts = [message["content"] for messages in conversations for message in messages]
        found = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        encoded = []
        for messages in conversations:
            ids: list[int] = []
            learned: list[bool] = []
            for message in messages:
                content = next(found).ids
                ids += [self._opening[message["role"]], *content, self._end]
                learned += [False] + [message["role"] == "assistant"] * (len(content) + 1)
            encoded.append(Encoded(np.array(ids, np.int32), np.array(learned, bool)))
        columns = fill(encoded, BLOCK_TOKENS, self._pad).columns()
        arrays = [pa.FixedSizeListArray.from_arrays(column.ravel(), BLOCK_TOKENS) for column in columns.values()]
        return pa.table(arrays, names=list(columns))
