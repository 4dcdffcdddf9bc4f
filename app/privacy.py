"""Personal data in text: found by pattern and checksum, masked by placeholders such as [EMAIL_1].

    masked, counts = mask_messages(messages, Detector.of(config.ingestion.privacy))

What is found: e-mail addresses; phone numbers that the numbering plans know, international ones anywhere and national
ones of the configured countries; payment card numbers (Luhn); IBANs (ISO 13616); IP addresses; keys and tokens of well
known shapes, and what follows "password:" and the like; patterns of the user's own. What is not: names, street
addresses, dates of birth, account numbers without a checksum, and addresses written to be missed ("jane at example").
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app import presidio
from app.conversation import Message
from app.errors import ConfigError
from app.personal_data import SUSPECT, Finding, cards, emails, ibans, ip_addresses, phones, secrets
from app.settings.ingestion import PrivacyConfig

KINDS = ("email", "phone", "card", "iban", "ip_address", "secret")
"""By precedence where findings overlap: see `Detector.find`."""

_SUSPECT = re.compile(SUSPECT)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLACEHOLDER = re.compile(r"\[([A-Z][A-Z0-9_]*)_(\d{1,6})\]")
_FREE = re.compile(rb"\0+")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([\s\S]))")
_ESCAPED = {"n": "\n", "r": "\n", "t": "\t", "b": " ", "f": " ", "/": "/"}


@dataclass(frozen=True)
class Detector:
    """What is looked for; plain, so that it can be sent to tasks."""

    kinds: tuple[str, ...] = KINDS
    phone_regions: tuple[str, ...] = ("US", "GB", "DE")
    patterns: tuple[tuple[str, str], ...] = ()
    """Names and regular expressions of the user's own."""
    entities: tuple[str, ...] = ()
    """What Presidio is asked for; none: it is not used."""
    presidio_model: str | None = None
    presidio_min_score: float = 0.4

    @classmethod
    def of(cls, settings: PrivacyConfig) -> "Detector":
        """The detector of a configuration.

        Raises:
            ConfigError: A kind is not known, a pattern is no regular expression or has no name to be used, or Presidio
                is asked for and not installed.
        """
        if unknown := sorted(set(settings.kinds) - set(KINDS)):
            raise ConfigError(f"privacy.kinds: {', '.join(unknown)} is not known", f"choose from {', '.join(KINDS)}")
        for name, pattern in settings.secrets.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"privacy.secrets: {name!r} cannot name a placeholder", "use a-z, 0-9 and _")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"privacy.secrets.{name} is no regular expression ({error})") from None
        patterns = tuple(settings.secrets.items())
        if settings.engine == "patterns":
            return cls(settings.kinds, settings.phone_regions, patterns)
        presidio.check(settings.presidio_model)
        return cls(
            settings.kinds, settings.phone_regions, patterns, settings.presidio_entities, settings.presidio_model,
            settings.presidio_min_score,
        )  # fmt: skip

    def find(self, text: str) -> list[Finding]:
        """What a text holds, in order, not overlapping, placeholders left alone.

        Where findings overlap, the first counts in the order e-mail, IBAN, card, IP address, secret, patterns of the
        user's own, phone, Presidio's; what another one covers beyond it is a finding of its own.
        """
        if not (self.patterns or self.entities or _SUSPECT.search(text)):
            return []
        taken = bytearray(len(text))
        for match in _PLACEHOLDER.finditer(text):
            taken[match.start() : match.end()] = b"\1" * len(match[0])
        found: list[Finding] = []
        for candidate in self.candidates(text):
            start, end = candidate.start, candidate.end
            free = [Finding(candidate.kind, *part.span()) for part in _FREE.finditer(taken, start, end)]
            found += [part for part in free if any(map(str.isalnum, text[part.start : part.end]))]
            taken[start:end] = b"\1" * (end - start)
        return sorted(found, key=lambda finding: finding.start)

    def suspect_texts(self, texts: pa.StringArray) -> np.ndarray:
        """For each text, (texts,) bool: False if `find` surely finds nothing.

        True wherever a text is not ASCII: RE2 and Python differ on what a digit or a letter is.
        """
        if self.entities:
            return np.ones(len(texts), bool)
        suspect = pc.or_(pc.match_substring_regex(texts, SUSPECT), pc.invert(pc.string_is_ascii(texts)))
        for _, pattern in self.patterns:
            try:
                suspect = pc.or_(suspect, pc.match_substring_regex(texts, pattern))
            except pa.ArrowInvalid:  # what RE2 does not know, Python decides
                return np.ones(len(texts), bool)
        return np.asarray(suspect.to_numpy(zero_copy_only=False), bool)

    def candidates(self, text: str) -> Iterator[Finding]:
        """All that the patterns take for personal data, by precedence; they may overlap."""
        wanted = set(self.kinds)
        if "email" in wanted:
            yield from emails(text)
        if "iban" in wanted:
            yield from ibans(text)
        if "card" in wanted:
            yield from cards(text)
        if "ip_address" in wanted:
            yield from ip_addresses(text)
        if "secret" in wanted:
            yield from secrets(text)
        for name, own in self.patterns:
            yield from (Finding(name, *match.span()) for match in re.finditer(own, text))
        if "phone" in wanted:
            yield from phones(text, self.phone_regions)
        if self.entities:
            yield from presidio.recognised(text, self.entities, self.presidio_model, self.presidio_min_score)


class Mask:
    """The placeholders of one conversation: the same value has the same one wherever it comes."""

    def __init__(self, detector: Detector, texts: Sequence[str] = ()) -> None:
        self._detector = detector
        self._names: dict[tuple[str, str], str] = {}
        self._last: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        for text in texts:  # placeholders that are there already keep their numbers
            for kind, number in _PLACEHOLDER.findall(text):
                self._last[kind.lower()] = max(self._last[kind.lower()], int(number))

    def text(self, text: str) -> str:
        """The text with every finding replaced, and with what is found only once those are gone."""
        while findings := self._detector.find(text):
            self.counts.update(finding.kind for finding in findings)
            pieces, end = [], 0
            for finding in findings:
                pieces += [text[end : finding.start], self._name(finding.kind, text[finding.start : finding.end])]
                end = finding.end
            text = "".join([*pieces, text[end:]])
        return text

    def _name(self, kind: str, value: str) -> str:
        key = kind, re.sub(r"[\s().\-/]", "", value).casefold() if kind != "secret" else value
        if key not in self._names:
            self._last[kind] += 1
            self._names[key] = f"[{kind.upper()}_{self._last[kind]}]"
        return self._names[key]


def mask_messages(messages: Sequence[Message], detector: Detector) -> tuple[list[Message], Counter[str]]:
    """The messages of a conversation, masked, and how many pieces of each kind there were."""
    mask = Mask(detector, [message["content"] for message in messages])
    masked: list[Message] = [{**message, "content": mask.text(message["content"])} for message in messages]
    return masked, mask.counts


def mask_column(messages: pa.ListArray, detector: Detector) -> tuple[pa.ListArray, np.ndarray]:
    """As `mask_messages`, for many conversations: their messages, and how many pieces there were in each.

    Args:
        messages: A list of structs with a field `content`, none of them null.
        detector: What is looked for.

    Returns:
        The same with texts replaced, and (conversations,) int32.
    """
    flat = messages.flatten()
    contents = flat.field("content")
    counts = np.zeros(len(messages), np.int32)
    places = np.flatnonzero(detector.suspect_texts(contents))
    if not len(places):
        return messages, counts
    ends = np.concatenate([[0], np.cumsum(messages.value_lengths().to_numpy(zero_copy_only=False))])
    rows = np.searchsorted(ends, places, side="right") - 1
    masked, mask = [], Mask(detector)
    texts = contents.take(pa.array(places)).to_pylist()
    for at, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
        if at == 0 or row != rows[at - 1]:
            mask = Mask(detector, contents.slice(ends[row], ends[row + 1] - ends[row]).to_pylist())
        masked.append(mask.text(text))
        counts[row] = mask.counts.total()
    chosen = np.zeros(len(contents), bool)
    chosen[places] = True
    replaced = pc.replace_with_mask(contents, pa.array(chosen), pa.array(masked, pa.string()))
    fields = list(messages.type.value_type)
    columns = [replaced if field.name == "content" else flat.field(field.name) for field in fields]
    struct = pa.StructArray.from_arrays(columns, fields=fields)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), struct), counts


def mask_document(text: str, detector: Detector) -> str:
    """A raw record, which need not be JSON, masked; as it is where there is nothing to mask.

    What JSON escapes is looked through: `\\u0040` is an @, and the n of `\\n` belongs to no word.
    """
    mask = Mask(detector, [text])
    literal = mask.text(text)  # what is no JSON may mean a backslash as one
    plain = _ESCAPE.sub(_unescaped, literal).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    masked = mask.text(plain) if plain != literal else plain
    return literal if masked == plain else masked


def _unescaped(match: re.Match[Any]) -> str:
    if match[1] is None:
        return _ESCAPED.get(match[2], str(match[0]))
    character = chr(int(match[1], 16))
    if character.isspace():
        return " "
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() or "\ud800" <= character <= "\udfff" else "\ufffd"
