import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from app.serving.reply_text import ReplyText


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, so that every character beyond ASCII is cut."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def written(tokenizer: Tokenizer, text: str, stop: Sequence[str] = ()) -> list[str]:
    """The pieces a client sees while `text` is written; ends at a stop string."""
    reply = ReplyText(tokenizer.decode, stop)
    pieces = []
    for token in tokenizer.encode(text).ids:
        pieces.append(reply.push(token))
        if reply.stopped:
            return pieces
    return [*pieces, reply.finish()]


@pytest.mark.parametrize(
    "text", ["plain", "Grüße für 12 €", "日本語のテキスト", "👩‍👩‍👧 ok 🇩🇪", " leading and trailing "]
)
def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = written(tokenizer, text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_character_come_out_as_replacements_and_do_not_hold_the_reply_back(
    tokenizer: Tokenizer,
) -> None:
    alone = tokenizer.encode("é").ids[0]
    reply = ReplyText(tokenizer.decode)
    pieces = [reply.push(alone) for _ in range(20)]
    assert any(pieces)
    assert "".join(pieces) + reply.finish() == "\ufffd" * 20


@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ends with sto", ["stop"], "ends with sto"),
        ("abcabcabd", ["abcabd"], "abc"),
        ("Grüße", ["ü"], "Gr"),
        ("nothing", ["else"], "nothing"),
    ],
)
def test_a_stop_string_across_tokens_ends_the_reply_and_is_not_part_of_it(
    tokenizer: Tokenizer, text: str, stop: list[str], seen: str
) -> None:
    assert "".join(written(tokenizer, text, stop)) == seen


def test_text_that_cannot_become_a_stop_string_is_not_held_back(tokenizer: Tokenizer) -> None:
    reply = ReplyText(tokenizer.decode, ["stop"])
    assert [reply.push(token) for token in tokenizer.encode("stay").ids] == ["", "", "sta", "y"]


def test_any_text_and_stop_string_give_what_a_search_in_the_whole_text_gives(tokenizer: Tokenizer) -> None:
    draw = random.Random(5)
    for _ in range(500):
        text = "".join(draw.choices("abé ", k=draw.randint(0, 20)))
        stops = ["".join(draw.choices("abé ", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        places = [text.find(stop) for stop in stops if stop in text]
        seen = "".join(written(tokenizer, text, stops))
        # A stop string that ends first wins, as in a reply that stops while it is written.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if not places:
            assert seen == text
        else:
            first = min(ends)
            assert seen == text[: min(text.find(stop) for stop in stops if text.find(stop, 0, first) >= 0)]
