"""Grammars that are read once for many replies."""

import pytest

from app import model as models
from app.serving import grammar
from app.serving.grammar import Grammars
from app.serving.output_format import GrammarFailed
from tests import answering_model


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    folder = tmp_path_factory.mktemp("grammar") / "model"
    answering_model.make(folder)
    tokenizer = models.load_tokenizer(folder)
    return Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def lark(word: str) -> str:
    return f'start: "{word}"'


def first(grammars: Grammars, word: str) -> set[int]:
    return set(grammars.grammar(lark(word)).allowed().nonzero().flatten().tolist())


def test_replies_to_the_same_grammar_begin_at_its_beginning_whatever_others_wrote(grammars: Grammars) -> None:
    begin = first(grammars, "no")
    assert begin
    one = grammars.grammar(lark("no"))
    one.add(min(begin))
    assert first(grammars, "no") == begin
    assert first(grammars, "yes") != begin
    assert first(grammars, "no") == begin


def test_a_grammar_is_read_once_while_others_come_and_go_and_few_are_kept(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = grammar.LLMatcher

    def noted(tokens: object, text: str, **options: object) -> object:
        read.append(text)
        return plain(tokens, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar, "LLMatcher", noted)
    for _ in range(3):
        for word in ("a", "b", "c"):
            grammars.grammar(lark(word))
    assert read == [lark("a"), lark("b"), lark("c")]
    for number in range(grammar.KEPT):
        grammars.grammar(lark(str(number)))
    grammars.grammar(lark("a"))
    assert read.count(lark("a")) == 2


def test_a_broken_grammar_is_refused_each_time(grammars: Grammars) -> None:
    for _ in range(2):
        with pytest.raises(GrammarFailed):
            grammars.grammar("start: (")
