"""What personal data looks like: patterns, checksums and numbering plans."""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

# The union of what the patterns below need: a text without it holds nothing that they find. RE2 and Python agree on it
# as far as texts are ASCII.
SUSPECT = (
    r"@|\d[\d \t().\-/]{5,}\d|(?:^|[^A-Za-z0-9])[A-Za-z]{2}\d\d(?: ?[A-Za-z0-9]){11}"
    r"|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:"
    r"|(?i:(?:passwor[dt]|passcode|api[ _-]?key|secret key|access token)[\\\"'\s]{0,6}(?:is|was|=|:))"
    r"|(?i:\b(?:pin|cv[vc]2?)(?:\b|\d))"
    r"|[spr]k-|AKIA|gh[pousr]_|xox[abprs]-|eyJ|-----BEGIN"
)
_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_DIGITS = re.compile(r"\d(?:[ -]?\d){12,}")
_DIGIT_GROUP = re.compile(r"\d+")
# Looks ahead only, so that what merely begins like an IBAN does not hide the one that follows.
_IBAN = re.compile(r"(?<![A-Za-z0-9])(?=([A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30})(?![A-Za-z0-9]))")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|firmware|release|build)[ .:]*$", re.IGNORECASE)
_PHONE = re.compile(r"(?:(?<!\d)\+|(?<!\w))\(?\d[\d \t().\-/]{5,20}\d(?!\w)")
# What stands before a number that is none of a telephone, although a national numbering plan knows it.
_REFERENCE = re.compile(
    r"(?:order|tracking|invoice|reference|ref|parcel|shipment|ticket|article|item|serial|customer|account|sku|ean|isbn)"
    r"(?:[ _-]?(?:number|no\.?|nr\.?|id|code))?(?: is)?[ :#=\"']*$",
    re.IGNORECASE,
)
_LOOK_BACK = 32
_DATE_OR_AMOUNT = re.compile(r"\(?(?:0?[1-9]|[12]\d|3[01])([./-])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)\d\d|\(?\d+\.\d\d")
_SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b[spr]k-[A-Za-z0-9_-]{16,}",
        r"\bAKIA[0-9A-Z]{16}\b",
        r"\bgh[pousr]_[A-Za-z0-9]{20,}",
        r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
        r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:(?!-----END)[\s\S]){0,8000}"
        r"(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
        # After "is", what looks like a word is one: "my password is wrong".
        r"(?ai)\b(?:password|passwort|passcode|api[ _-]?key|secret key|access token)[\\\"']{0,3}\s{0,3}"
        r"(?:(?:is|ist|was)\s{1,3}(?=[^\s,;\"']{0,63}(?:\d|[@#$%^&*_+=!?~]\w))|[=:]\s{0,3})[\\\"']{0,3}"
        r"(?P<value>[^\s,;\"'\\]{4,64})",
        r"(?ai)\b(?:pin|cvv2?|cvc2?)(?: code| number)?[\\\"']{0,3}\s{0,3}(?:is|ist|=|:)?\s{0,3}[\\\"']{0,3}"
        r"(?P<value>\d{3,6})\b",
    )
)
_ISSUERS = re.compile(
    r"4(?:\d{15}|\d{18})"  # Visa; of 13 digits it gives out none any more, and EANs have 13
    r"|(?:5[1-5]|2[2-7])\d{14}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|[689]\d)\d{11,16}"  # Diners Club
    r"|35\d{14,17}"  # JCB
    r"|6\d{15,18}"  # Discover, UnionPay, Maestro
    r"|5[0678]\d{11,17}"  # Maestro
)
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
"""Characters of an IBAN by country: ISO 13616 registry."""


@dataclass(frozen=True)
class Finding:
    """A piece of personal data in a text."""

    kind: str
    start: int
    end: int


def emails(text: str) -> Iterator[Finding]:
    """E-mail addresses."""
    if "@" in text:
        yield from (Finding("email", *match.span()) for match in _EMAIL.finditer(text))


def secrets(text: str) -> Iterator[Finding]:
    """Keys and tokens of well known shapes, and what is said to be a password, a PIN and the like."""
    for pattern in _SECRETS:
        group = "value" if "value" in pattern.groupindex else 0
        yield from (Finding("secret", *match.span(group)) for match in pattern.finditer(text))


def is_card(text: str) -> bool:
    """Whether digits, perhaps apart, are a card number: as many as its issuer's have, with Luhn's check digit."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]) + sum(digits[-1::-2])
    return doubled % 10 == 0 and _ISSUERS.fullmatch("".join(map(str, digits))) is not None


def is_iban(text: str) -> bool:
    """Whether a text without spaces is an IBAN: the country's length, and 1 modulo 97."""
    text = text.upper()
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def cards(text: str) -> Iterator[Finding]:
    """Card numbers, wherever among other digits they begin and end, as long as that is between groups of digits."""
    for run in _DIGITS.finditer(text):
        groups = [match.span() for match in _DIGIT_GROUP.finditer(text, *run.span())]
        for first, (start, _) in enumerate(groups):
            digits = 0
            for begin, end in groups[first:]:
                digits += end - begin
                if digits > 19:
                    break
                if digits >= 13 and is_card(text[start:end]):
                    yield Finding("card", start, end)


def ibans(text: str) -> Iterator[Finding]:
    """IBANs, with or without spaces."""
    for match in _IBAN.finditer(text):
        # What follows an IBAN may look like more of it: the country says where it ends.
        length = IBAN_LENGTHS.get(match[1][:2].upper(), 0)
        places = [place for place, character in enumerate(match[1]) if character != " "]
        if 0 < length <= len(places):
            end = places[length - 1] + 1
            if is_iban(match[1][:end].replace(" ", "")):
                yield Finding("iban", match.start(), match.start() + end)


def ip_addresses(text: str) -> Iterator[Finding]:
    """Addresses of IP, version 4 and 6; not what is said to be the version of something."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if match[0] != "::" and not _VERSION.search(text, max(0, match.start() - _LOOK_BACK), match.start()):
                yield Finding("ip_address", *match.span())


def phones(text: str, regions: Sequence[str]) -> Iterator[Finding]:
    """Telephone numbers: international ones, and those that the plans of some countries know.

    Args:
        text: Where they are looked for.
        regions: ISO 3166, two letters.
    """
    for window in _PHONE.finditer(text):
        international = "+" in window[0]
        if not international and _REFERENCE.search(text, max(0, window.start() - _LOOK_BACK), window.start()):
            continue
        for start, end in _numbers(window[0], (None,) if international else tuple(regions)):
            yield Finding("phone", window.start() + start, window.start() + end)


@lru_cache(maxsize=65_536)
def _numbers(window: str, regions: tuple[str | None, ...]) -> tuple[tuple[int, int], ...]:
    """Where the numbers are in digits and what is between them, by the first region whose plan knows one.

    Remembered: a shop's own numbers come again and again, and each takes half a millisecond.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in regions:
        matches = list(PhoneNumberMatcher(window, region, leniency=Leniency.VALID))
        if matches:
            return tuple(
                (match.start + (match.raw_string.startswith("(") and ")" not in match.raw_string), match.end)
                for match in matches
                if not _DATE_OR_AMOUNT.fullmatch(match.raw_string)
            )
    return ()
