"""Figures of a model: scikit-learn, torch's own loss and HF generation one by one are the oracles."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app import conversation, evaluation
from app import model as models
from app.evaluation import classification, generate_replies, perplexity, questions, token_f1
from app.ingestion import sample
from app.training.packing import fill
from tests.conftest import ROOT

RECORDS = [json.loads(line)["messages"] for line in sample.lines(7, 0, 60, 0.0)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = [message["content"] for messages in RECORDS for message in messages]
    return conversation.train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    made = models.new_model("preset:tiny", tokenizer, 128, seed=3)
    with torch.no_grad():
        # Large enough weights make the random model sure of its tokens, so that rounding does not decide.
        for parameter in made.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    made.train(False)
    return made


# Perplexity


def test_perplexity_of_packed_blocks_is_that_of_each_conversation_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    encoded = [conversation.encode(tokenizer, messages[:2], "assistant") for messages in RECORDS[:12]]
    encoded = [part for part in encoded if len(part.ids) <= 128]
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for part in encoded:
            ids = torch.from_numpy(part.ids).long()[None]
            scores = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
            for place in np.flatnonzero(part.learned):
                nll -= float(scores[place - 1, part.ids[place]])
                tokens += 1
    packed = fill(encoded, 128, pad_id=0).columns()
    assert len(packed["input_ids"]) < len(encoded)
    for batch_size in (1, 3, 64):
        assert perplexity(model, packed, batch_size) == pytest.approx(math.exp(nll / tokens), rel=1e-3)


def test_perplexity_beyond_floating_point_is_infinite(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    packed = fill([conversation.encode(tokenizer, RECORDS[0], "all")], 512, pad_id=0).columns()
    head = model.get_output_embeddings()
    try:
        head.weight.data.mul_(1e4)
        assert perplexity(model, packed, 8) == math.inf
    finally:
        head.weight.data.div_(1e4)


# Replies


def test_replies_in_batches_are_those_generated_one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    contexts = [messages[: 1 + 2 * (index % 2)] for index, messages in enumerate(RECORDS[:9])]
    alone = []
    for context in contexts:
        ids = torch.tensor([conversation.prompt_ids(tokenizer, context)])
        with torch.no_grad():
            made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        alone.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(alone)) > 3
    for batch_size in (1, 4, 32):
        assert generate_replies(model, tokenizer, contexts, 12, batch_size) == alone


def test_a_reply_ends_before_the_end_token_while_others_go_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [[300, 301, 302], [40]]
    long, other = evaluation.generate(model, tokenizer, prompts, 12)
    assert len(long) == 12
    ending = copy.deepcopy(tokenizer)
    place = next(place for place, token in enumerate(long) if place and token not in (*long[:place], *other))
    ending.eos_token = tokenizer.convert_ids_to_tokens(long[place])
    assert evaluation.generate(model, ending, prompts, 12) == [long[:place], other]


def test_a_context_too_long_for_the_model_loses_its_beginning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = [{"role": "user", "content": "where is my order? " * 800}]
    [reply] = generate_replies(model, tokenizer, [long], 4, 1)  # type: ignore[list-item]
    assert isinstance(reply, str)


# Token F1


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("It is on its way.", "it is on its way", 1.0),
        ("way its on is it", "It is on its way!", 1.0),
        ("on the way", "on the road", 2 / 3),
        ("a b c d", "a", 2 / 5),
        ("the the", "the", 2 / 3),
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("no", "", 0.0),
        ("", "", 1.0),
        ("…!", "?", 1.0),
        ("Don’t", "dont", 1.0),
    ],
)
def test_token_f1_of_known_pairs(prediction: str, reference: str, score: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(score)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_token_f1_is_symmetric_and_between_0_and_1(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one)
    assert 0.0 <= token_f1(one, other) <= 1.0
    assert token_f1(one, one) == 1.0


# Classification


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("bcde")), min_size=1, max_size=60))
def test_classification_figures_are_those_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    predicted, wanted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ours = classification(predicted, wanted)
    names = sorted({*predicted, *wanted})
    assert ours.accuracy == pytest.approx(sklearn.metrics.accuracy_score(wanted, predicted))
    by_label = sklearn.metrics.precision_recall_fscore_support(wanted, predicted, labels=names, zero_division=0)
    macro = sklearn.metrics.precision_recall_fscore_support(wanted, predicted, average="macro", zero_division=0)
    assert [ours.macro_precision, ours.macro_recall, ours.macro_f1] == pytest.approx(list(macro[:3]))
    for index, label in enumerate(ours.labels):
        assert label.label == names[index]
        assert [label.precision, label.recall, label.f1, label.support] == pytest.approx(
            [column[index] for column in by_label]
        )
    np.testing.assert_array_equal(ours.confusion, sklearn.metrics.confusion_matrix(wanted, predicted, labels=names))


def test_the_worst_labels_are_those_with_mistakes() -> None:
    found = classification(list("aaabbc"), list("aabbbc"))
    assert [found.labels[index].label for index in found.worst(5)] == ["a", "b"]
    assert found.worst(1) == found.worst(5)[:1]


# Questions


def test_every_reply_to_a_customer_is_a_question_with_all_that_came_before() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "intent": "greeting"},
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": "still there?"},
        {"role": "user", "content": "yes", "intent": None},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "bye", "intent": "goodbye"},
    ]
    first, second = questions([{"content_hash": "abc", "messages": messages}])
    assert (first.context, first.reference, first.intent) == (tuple(messages[:2]), "hello", "greeting")
    assert (second.context, second.reference, second.intent) == (tuple(messages[:5]), "good", None)
    assert first.key != second.key


def test_judging_replies_needs_no_torch() -> None:
    code = "import sys, app.evaluation, app.judgement; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
