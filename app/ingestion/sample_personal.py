"""What customers of the shop tell of themselves, and what looks like it: a labelled set to judge a detector by.

Numbers and addresses are of ranges reserved for examples and fiction, so that none belongs to anybody.

    for labelled in personal(seed=7, count=1_000): ...
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.ingestion.sample_defects import card_number, digits, email_address, iban_number
from app.ingestion.sample_phrases import CITIES, MONTHS, NAMES, PRODUCTS, SURNAMES, Draw, pick


@dataclass(frozen=True)
class Labelled:
    """A sentence and what is planted in it."""

    text: str
    kind: str
    """One of the kinds of personal data, or of `UNSEEN` or `ALIKE`."""
    spelling: str
    """Which of the kind's spellings."""
    start: int
    end: int


def personal(seed: int, count: int) -> Iterator[Labelled]:
    """Yield sentences with one thing planted in each: every spelling of every kind in turn, `count` times."""
    spellings = [(kind, name, make) for kind, makes in {**PLANTED, **UNSEEN, **ALIKE}.items() for name, make in makes]
    for number in range(count):
        for kind, spelling, make in spellings:
            draw = random.Random(f"{seed} {kind} {spelling} {number}").random
            before, after = pick(draw, _LEADS.get(spelling) or _LEADS.get(kind, _ANY)), pick(draw, _AFTER)
            value = make(draw)
            yield Labelled(f"{before}{value}{after}", kind, spelling, len(before), len(before) + len(value))


def _filled(template: str) -> Callable[[Draw], str]:
    """Draws text in which every `#` is a digit and every `?` a capital letter."""

    def made(draw: Draw) -> str:
        return "".join(
            digits(draw, 1) if place == "#" else pick(draw, "ABCDEFGHJKLMNPRSTUVWXYZ") if place == "?" else place
            for place in template
        )

    return made


def _spelled(*templates: str) -> Callable[[Draw], str]:
    return lambda draw: _filled(pick(draw, templates))(draw)


def _letters(draw: Draw, alphabet: str, count: int) -> str:
    return "".join(pick(draw, alphabet) for _ in range(count))


_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_HEX = "0123456789abcdef"
_KEY = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_Makers = tuple[tuple[str, Callable[[Draw], str]], ...]

PLANTED: dict[str, _Makers] = {
    "email": (
        ("plain", email_address),
        ("tagged", lambda draw: email_address(draw).replace("@", f"+shop{digits(draw, 2)}@")),
        ("capitals", lambda draw: email_address(draw).upper()),
        ("umlaut", lambda draw: f"jörg.{pick(draw, SURNAMES).lower()}@example.org"),
        ("in a link", email_address),
    ),
    "phone": (
        ("international, spaces", _spelled("+44 20 7946 0###", "+1 202 555 01##", "+33 1 99 00 ####")),
        ("international, joined", _spelled("+442079460###", "+120255501##", "+4930231250##", "+3319900####")),
        ("international, dashes", _spelled("+44-20-7946-0###", "+1-202-555-01##", "+49-30-23125-###")),
        ("international, (0)", _spelled("+44 (0)20 7946 0###", "+49 (0)30 23125-###")),
        ("international, 00", _spelled("0044 20 7946 0###", "0049 30 23125 ###", "0033 1 99 00 ## ##")),
        ("national US", _spelled("(202) 555-01##", "202-555-01##", "202.555.01##", "202 555 01##")),
        ("national GB", _spelled("020 7946 0###", "07700 900###", "(020) 7946 0###")),
        ("national DE", _spelled("030 23125 ###", "030/23125###", "030-23125-###", "0171 39200##")),
        ("joined", _spelled("20255501##", "02079460###", "03023125###")),
    ),
    "card": (
        ("joined or in fours", card_number),
        ("dashes", lambda draw: card_number(draw).replace(" ", "-")),
        ("American Express", lambda draw: _with_luhn(f"3782 822463 {digits(draw, 4)}")),
    ),
    "iban": (
        ("joined or in fours", iban_number),
        ("lower case", lambda draw: iban_number(draw).lower()),
    ),
    "ip_address": (
        ("version 4", _spelled("192.0.2.1##", "198.51.100.2#", "203.0.113.#")),
        ("version 6", lambda draw: f"2001:db8:{_letters(draw, _HEX, 4)}::{_letters(draw, _HEX[1:], 3)}"),
    ),
    "secret": (
        ("password", lambda draw: f"{pick(draw, PRODUCTS).split()[-1].title()}{digits(draw, 3)}!"),
        ("PIN", _spelled("####")),
        ("API key", lambda draw: f"sk-{_letters(draw, _KEY, 32)}"),
        ("access key", lambda draw: f"AKIA{_letters(draw, _KEY[:26] + '0123456789', 16)}"),
        ("token", lambda draw: f"ghp_{_letters(draw, _KEY, 36)}"),
    ),
}  # fmt: skip
"""What the default finds, by kind."""

UNSEEN: dict[str, _Makers] = {
    "name": (("full", lambda draw: f"{pick(draw, NAMES)} {pick(draw, SURNAMES)}"),),
    "street address": (
        ("English", lambda draw: f"{1 + int(draw() * 90)} {pick(draw, SURNAMES)} Street, {pick(draw, CITIES)}"),
        ("German", lambda draw: f"{pick(draw, SURNAMES)}straße {1 + int(draw() * 90)}"),
    ),
    "date of birth": (
        ("in words", lambda draw: f"{1 + int(draw() * 28)} {pick(draw, MONTHS)} 19{digits(draw, 2)}"),
        ("in digits", _spelled("1#/0#/19##", "0#.1#.19##")),
    ),
    "e-mail, disguised": (
        ("in words", lambda draw: email_address(draw).replace("@", " at ").replace(".com", " dot com")),
        ("in brackets", lambda draw: email_address(draw).replace("@", "(at)")),
    ),
    "phone, spelled out": (("in words", lambda draw: " ".join(pick(draw, _DIGIT_WORDS) for _ in range(10))),),
    "phone, national elsewhere": (("French", _spelled("01 99 00 ## ##", "06 39 98 ## ##")),),
    "password, plain word": (("word", lambda draw: pick(draw, ("sunflower", "lavender", "marigold", "rosemary"))),),
    "account number": (("eight digits", _spelled("########")),),
}  # fmt: skip
"""What the default does not look for."""

ALIKE: dict[str, _Makers] = {
    "order number": (("digits", _spelled("####", "######", "##########")),),
    "price": (("amount", _spelled("1,2##.50", "£##.99", "1.2##,50 EUR")),),
    "date": (
        ("in digits", _spelled("2025-1#-2#", "0#.11.2025", "1#/11/2025", "0#-11-2025", "2025-11-2#T1#:0#:0#Z")),
        ("in words", _spelled("1# March 2025")),
    ),
    "time": (("clock", _spelled("1#:3#", "1#:3#:2#")),),
    "tracking number": (
        ("several", _spelled("1Z999AA1##########", "003404341610########", "RR#########GB", "############")),
    ),
    "version": (("dotted", _spelled("10.#.2.1#", "2.1#.3")),),
    "product code": (("several", _spelled("MF-######", "??##-####", "978-3-16-1#####-#", "40###########")),),
    "size": (("metres", _spelled("12# x 24# x 3# cm", "1,5## x 2,0## mm")),),
    "hardware address": (("MAC", _spelled("00:1A:2B:3C:4#:5#")),),
    "handle": (("social", lambda draw: f"@{pick(draw, NAMES).lower()}_{digits(draw, 2)}"),),
}  # fmt: skip
"""What is not personal data, or none that a shop has to hide, by what it is."""

_ANY = ("It is ", "That would be ", "Here it is: ", "(")
_AFTER = ("", ".", ", thanks", " - is that right?", ", order 1042", ") please")
_LEADS: dict[str, tuple[str, ...]] = {
    "email": ("Write to me at ", "My e-mail is ", "Contact: ", "("),
    "in a link": ("mailto:", "<mailto:"),
    "phone": ("Call me on ", "My number is ", "Tel.: ", "Phone ", "("),
    "card": ("My card is ", "Order 4711, card ", "Paid with ", "4711 "),
    "iban": ("My IBAN is ", "Refund to ", "IBAN: "),
    "ip_address": ("My IP address is ", "I connect from ", "IP "),
    "password": ("My password is ", "password: ", "The access token is "),
    "PIN": ("My PIN is ", "pin code: ", "CVV "),
    "order number": ("Where is order ", "My order number is ", "Order #"),
    "price": ("You charged ", "It costs "),
    "date": ("I ordered on ", "Deliver it on "),
    "time": ("I called at ", "Come at "),
    "tracking number": ("Tracking number ", "The parcel is ", "Your tracking code: "),
    "version": ("The app is version ", "Firmware ", "I have v"),
    "product code": ("The article is ", "Item number ", "ISBN "),
    "size": ("It measures ", "The shelf is "),
    "name": ("My name is ", "It is for ", "I am "),
    "street address": ("I live at ", "Deliver it to "),
    "date of birth": ("I was born on ", "My birthday is "),
    "account number": ("My account number is ", "Account "),
    "password, plain word": ("My password is ", "The password was "),
}


def _with_luhn(body: str) -> str:
    """The digits with the check digit after them."""
    found = [int(character) for character in body if character.isdigit()]
    total = sum(found[-2::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in found[-1::-2])
    return f"{body}{-total % 10}"
