"""The conversation record, the chat template, and text to token ids: the one place, so all stages agree."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # seconds to import, and most processes that know the record never see a tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))

# <|user|>where is my order?<|end|><|assistant|>It is on its way.<|end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("intent", pa.string())]))
SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("channel", pa.string()),
        ("language", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("intent", pa.string()),  # of the first labelled user message
        ("messages", MESSAGES),
        ("content_hash", pa.string()),  # of roles and texts, 64 hex digits
        ("split", pa.string()),  # train | validation
        ("source", pa.string()),  # URI
        ("position", pa.int64()),  # record number in the source, from 0
    ]
)


class Message(TypedDict, total=False):
    """One message: `role` and `content` always, `intent` where a user message is labelled."""

    role: str
    content: str
    intent: str | None


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff]")
_SPACE = re.compile(r"\s+")


def normalised(text: str) -> str:
    """NFC, without control characters, runs of white space as one space."""
    return _SPACE.sub(" ", _CONTROL.sub(" ", unicodedata.normalize("NFC", text))).strip()


def content_hash(messages: Sequence[Message]) -> str:
    """SHA-256 of roles and texts, whatever the ids, labels, letter case or white space around them."""
    text = json.dumps([[message["role"], normalised(message["content"]).casefold()] for message in messages])
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(content_hash: str, validation_fraction: float) -> str:
    """`train` or `validation`, by the hash alone: the same conversation is always on the same side."""
    return "validation" if int(content_hash[:12], 16) / 16**12 < validation_fraction else "train"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: ids and, for each, whether the model is to learn to write it."""

    ids: np.ndarray
    """(tokens,) int32"""
    learned: np.ndarray
    """(tokens,) bool"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer with our chat template; digits are single tokens so that numbers are copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages followed by the opening of the assistant's turn."""
    if tokenizer.chat_template == CHAT_TEMPLATE:
        ids = [token for message in messages for token in _message_ids(tokenizer, message)]
        opening: Any = tokenizer.convert_tokens_to_ids("<|assistant|>")
        return [*ids, opening]
    return _templated(tokenizer, messages, add_generation_prompt=True)


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], loss_on: str) -> Encoded:
    """A whole conversation as tokens.

    With `loss_on` "assistant", what is learned is each reply and the end of its turn; with "all", everything.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for index, message in enumerate(messages):
        reply = message["role"] == "assistant"
        if tokenizer.chat_template == CHAT_TEMPLATE:
            new, opening = _message_ids(tokenizer, message), 1
        else:
            # A base model's own template: what a message adds is what the rendering grows by.
            new = _templated(tokenizer, messages[: index + 1])[len(ids) :]
            prompt = _templated(tokenizer, messages[:index], add_generation_prompt=True) if reply else []
            opening = max(0, len(prompt) - len(ids))
        ids += new
        learned += [loss_on == "all" or (reply and place >= opening) for place in range(len(new))]
    return Encoded(np.array(ids, dtype=np.int32), np.array(learned, dtype=bool))


def _message_ids(tokenizer: "PreTrainedTokenizerBase", message: Message) -> list[int]:
    # Texts are encoded apart from the frame, so a role marker in a customer's text stays text.
    content = tokenizer.encode(message["content"], add_special_tokens=False, split_special_tokens=True)
    frame: Any = tokenizer.convert_tokens_to_ids([f"<|{message['role']}|>", END])
    return [frame[0], *content, frame[1]]


def _templated(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    safe = []
    for message in messages:
        content = message["content"]
        for token in special:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        safe.append({"role": message["role"], "content": content})
    if not safe:
        return []
    text = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
