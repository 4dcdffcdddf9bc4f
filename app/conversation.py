"""The conversation record, the chat template, and text to token ids: the one place, so all stages agree."""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa

from app.errors import ModelError
from app.tokenization import pre_tokenizer, token_ids

if TYPE_CHECKING:  # seconds to import, and most processes that know the record never see a tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))
CALL_TOKENS = frozenset({"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"})
"""Serving writes calls and their results with them, and spells them apart in what others wrote."""

# <|user|>where is my order?<|end|><|assistant|>It is on its way.<|end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SIGNATURE_BYTES = 128
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
        ("position", pa.int64()),  # of the record in the source: see app/ingestion/sources.py
        ("imputed", pa.list_(pa.string())),  # names of the columns that were filled in
        ("masked", pa.int32()),  # pieces of personal data that were masked
        ("anomaly_score", pa.float32()),  # robust standard deviations from the accepted history
        ("minhash", pa.binary(SIGNATURE_BYTES)),  # signature that near-duplicates are found by
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
    return normalised_hash([message | {"content": normalised(message["content"])} for message in messages])


def normalised_hash(messages: Sequence[Message]) -> str:
    """The `content_hash` of messages whose texts are normalised already."""
    # Normalised text holds no control character, so these two cannot be part of it.
    text = "\x1e".join(f"{message['role'][0]}\x1f{message['content'].casefold()}" for message in messages)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hashes(messages: pa.ListArray) -> list[str]:
    """The `content_hash` of each of many conversations, of type `MESSAGES`, whose texts are normalised already."""
    import pyarrow.compute as pc

    flat = messages.flatten()
    contents = flat.field("content")
    folded = pc.ascii_lower(contents)
    if other := np.flatnonzero(~pc.string_is_ascii(contents).to_numpy(zero_copy_only=False)).tolist():
        mask = np.zeros(len(contents), bool)
        mask[other] = True
        rest = pa.array([contents[place].as_py().casefold() for place in other], pa.string())
        folded = pc.replace_with_mask(folded, pa.array(mask), rest)
    initials = pc.utf8_slice_codeunits(flat.field("role"), 0, 1)
    spoken = pc.binary_join_element_wise(initials, folded, "\x1f")
    ends = np.concatenate([[0], np.cumsum(messages.value_lengths().to_numpy(zero_copy_only=False))])
    texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), spoken), "\x1e")
    return [hashlib.sha256(text).hexdigest() for text in texts.cast(pa.binary()).to_pylist()]


def id_hash(conversation_id: str) -> str:
    """What a refused record is found by when its conversation is to be forgotten: SHA-256, 64 hex digits.

    Not the id itself: in a record that breaks rules it may be anything.
    """
    return hashlib.sha256(conversation_id.encode()).hexdigest()


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
    tokenizer.pre_tokenizer = pre_tokenizer()
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


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], tools: Sequence[Any] = ()
) -> list[int]:
    """Token ids of the messages followed by the opening of the assistant's turn.

    Args:
        tools: Functions in OpenAI's form, for a template of a base model's that shows them.
    """
    if tokenizer.chat_template == CHAT_TEMPLATE:
        ids = [token for message in messages for token in _message_ids(tokenizer, message)]
        opening: Any = tokenizer.convert_tokens_to_ids("<|assistant|>")
        return [*ids, opening]
    templated: list[int] = tokenizer.encode(
        _rendered(tokenizer, messages, prompt=True, tools=tools), add_special_tokens=False
    )
    return templated


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], loss_on: str) -> Encoded:
    """A whole conversation as tokens.

    With `loss_on` "assistant", what is learned is each reply and the end of its turn; with "last", only the last
    message, if it is a reply; with "all", everything.

    Raises:
        ModelError: The base model's chat template does not take such a conversation, or its tokenizer is a slow one.
    """
    wanted = [
        message["role"] == "assistant" and (loss_on != "last" or index == len(messages) - 1)
        for index, message in enumerate(messages)
    ]
    if tokenizer.chat_template != CHAT_TEMPLATE:
        return _encode_templated(tokenizer, messages, wanted, loss_on == "all")
    ids: list[int] = []
    learned: list[bool] = []
    for message, reply in zip(messages, wanted, strict=True):
        new = _message_ids(tokenizer, message)
        ids += new
        learned += [loss_on == "all" or (reply and place > 0) for place in range(len(new))]
    return Encoded(np.array(ids, dtype=np.int32), np.array(learned, dtype=bool))


def encode_many(tokenizer: "PreTrainedTokenizerBase", conversations: pa.ListArray, loss_on: str) -> list[Encoded]:
    """Each of many conversations, of type `MESSAGES`, as `encode` makes it."""
    if tokenizer.chat_template != CHAT_TEMPLATE:
        return [encode(tokenizer, messages, loss_on) for messages in conversations.to_pylist()]
    import pyarrow.compute as pc

    flat = conversations.flatten()
    contents, content_ends = token_ids(tokenizer, flat.field("content"))
    role = pc.index_in(flat.field("role"), pa.array(ROLES)).to_numpy(zero_copy_only=False).astype(np.int64)
    frame: Any = tokenizer.convert_tokens_to_ids([*(f"<|{name}|>" for name in ROLES), END])
    counts = np.diff(content_ends) + 2
    ends = np.concatenate([[0], np.cumsum(counts)])
    first, last = ends[:-1], ends[1:] - 1
    ids = np.empty(ends[-1], np.int32)
    within = np.ones(ends[-1], bool)
    within[first] = within[last] = False
    ids[within] = contents
    ids[first], ids[last] = np.array(frame[:-1])[role], frame[-1]
    learned = np.repeat((role == ROLES.index("assistant")) | (loss_on == "all"), counts)
    learned[first] = loss_on == "all"
    turns = conversations.value_lengths().to_numpy(zero_copy_only=False)
    bounds = ends[np.concatenate([[0], np.cumsum(turns)])].tolist()
    return [Encoded(ids[start:end], learned[start:end]) for start, end in itertools.pairwise(bounds)]


def _message_ids(tokenizer: "PreTrainedTokenizerBase", message: Message) -> list[int]:
    # Texts are encoded apart from the frame, so a role marker in a customer's text stays text.
    content = tokenizer.encode(message["content"], add_special_tokens=False, split_special_tokens=True)
    frame: Any = tokenizer.convert_tokens_to_ids([f"<|{message['role']}|>", END])
    return [frame[0], *content, frame[1]]


def _encode_templated(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], wanted: Sequence[bool], everything: bool
) -> Encoded:
    """A conversation in a base model's own template, tokenised as a whole, with the wanted replies learned.

    What a reply adds is what the rendering grows by. Some templates render a reply in another way once the
    conversation goes on (Qwen3 drops the room for its thoughts): such a reply is learned only where it is the last.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the base model's tokenizer is a {type(tokenizer).__name__}, which does not say where its tokens lie",
            "name a base model with a tokenizer.json",
        )
    whole = _rendered(tokenizer, messages)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    learned = np.full(len(starts), everything)
    for index in np.flatnonzero(wanted).tolist():
        until = _rendered(tokenizer, messages[: index + 1])
        if whole.startswith(until):
            opening = _rendered(tokenizer, messages[:index], prompt=True)
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, opening, strict=False))
            learned |= (starts >= sum(1 for _ in alike)) & (starts < len(until))
    return Encoded(np.array(encoded["input_ids"], dtype=np.int32), learned)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    prompt: bool = False,
    tools: Sequence[Any] = (),
) -> str:
    """The messages in the template's words, what looks like a special token spelled apart."""
    from jinja2 import TemplateError

    special = {token for token in tokenizer.all_special_tokens if len(token) > 1}
    # Others, such as Qwen's <think>, are a model's own words, which nobody else writes.
    others = {token for token in tokenizer.get_added_vocab() if len(token) > 1} - special - CALL_TOKENS
    safe = []
    for message in messages:
        content = message["content"]
        for token in sorted(special if message["role"] == "assistant" else special | others):
            content = content.replace(token, f"{token[0]} {token[1:]}")
        safe.append({"role": message["role"], "content": content})
    if not safe:
        return ""
    try:
        return str(tokenizer.apply_chat_template(safe, [*tools] or None, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the base model's chat template does not take a conversation of {roles} ({error})",
            "name a base model whose template does, or leave such conversations out with a rule of ingestion",
        ) from error
