"""The loss of preference tuning against its formula, computed by hand and pair by pair."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from app import conversation
from app import model as models
from app.preferences import Pair
from app.training import dpo
from app.training.packing import NOT_LEARNED, tokens_in
from app.training.preference_blocks import Sides, fill, tokens_of

PAIRS = [
    Pair(({"role": "user", "content": "where is my order?"},), "it is on its way", "no"),
    Pair(({"role": "user", "content": "refund please"},), "of course", "it is on its way to you, is it not?"),
    Pair(
        (
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello, where is your order?"},
            {"role": "user", "content": "no"},
        ),
        "please wait",
        "why",
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return conversation.train_tokenizer(["where is my order?", "it is on its way to you", "refund"] * 9, 320)


def blocks_of(tokenizer: Any, block_tokens: int = 160) -> tuple[list[Sides], dict[str, np.ndarray]]:
    sides = [tokens_of(tokenizer, pair) for pair in PAIRS]
    return sides, fill(sides, block_tokens, tokenizer.pad_token_id)


def reply_log_probability(model: Any, ids: np.ndarray, learned: np.ndarray) -> float:
    """Of one side alone, by the textbook."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
    found = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
    return float(found[torch.from_numpy(learned[1:])].sum())


def test_the_loss_is_that_of_given_log_probabilities() -> None:
    """Rafailov et al. 2023, equation 7, as trl's DPOTrainer computes it: -log sigmoid(beta (policy - reference))."""
    chosen, rejected, reference_chosen, reference_rejected = -12.0, -15.0, -13.5, -14.0
    beta = 0.3
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    assert float(dpo.losses(torch.tensor([margin]))) == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-6)
    assert float(dpo.losses(torch.zeros(1))) == pytest.approx(math.log(2))


def test_only_the_last_reply_is_learned_and_both_sides_share_the_prompt(tokenizer: Any) -> None:
    for pair, sides in zip(PAIRS, [tokens_of(tokenizer, pair) for pair in PAIRS], strict=True):
        for ids, learned, text in zip(sides.ids, sides.learned, (pair.chosen, pair.rejected), strict=True):
            assert tokenizer.decode(ids[learned]) == f"{text}<|end|>"
        first = int(np.argmax(sides.learned[0]))
        assert np.array_equal(sides.ids[0][:first], sides.ids[1][:first])


def test_packed_pairs_have_the_margins_they_have_alone(tokenizer: Any) -> None:
    sides, columns = blocks_of(tokenizer)
    assert len(columns["labels"]) < len(PAIRS), "some share a block"
    assert tokens_in(columns["position_ids"]) == sum(len(each) for each in sides)
    assert set(np.unique(columns["pair"][columns["labels"] == NOT_LEARNED])) >= {0}
    reference = models.new_model("preset:tiny", tokenizer, 160, seed=1).train(False)
    policy = models.new_model("preset:tiny", tokenizer, 160, seed=2).train(False)
    found, where = dpo.log_probabilities(reference, columns)
    columns["reference"] = np.zeros(columns["labels"].shape, np.float32)
    columns["reference"][where.numpy()] = found.detach().numpy()
    margins = dpo.reward_margins(policy, columns, 0.1)
    wanted = []
    for each in sides:
        ratio = [
            reply_log_probability(policy, ids, learned) - reply_log_probability(reference, ids, learned)
            for ids, learned in zip(each.ids, each.learned, strict=True)
        ]
        wanted.append(0.1 * (ratio[0] - ratio[1]))
    assert sorted(margins.tolist()) == pytest.approx(sorted(wanted), abs=1e-4)
    same = dpo.reward_margins(reference, columns, 0.1)
    assert same.tolist() == pytest.approx([0.0] * 3, abs=1e-5), "the model it started from has learned nothing"
    assert float(dpo.loss(policy, columns, 0.1)) == pytest.approx(
        float(dpo.losses(torch.tensor(wanted)).sum()), abs=1e-4
    )
    assert dpo.pairs_in(columns) == len(PAIRS)


def test_a_batch_without_pairs_has_no_margins(tokenizer: Any) -> None:
    _, columns = blocks_of(tokenizer)
    columns = {**columns, "labels": np.full_like(columns["labels"], NOT_LEARNED)}
    columns["reference"] = np.zeros(columns["labels"].shape, np.float32)
    model = models.new_model("preset:tiny", tokenizer, 160, seed=2)
    assert dpo.reward_margins(model, columns, 0.1).shape == (0,)
    assert dpo.pairs_in(columns) == 0


def test_learning_from_pairs_prefers_what_was_chosen(tokenizer: Any) -> None:
    _, columns = blocks_of(tokenizer)
    model: Any = models.new_model("preset:tiny", tokenizer, 160, seed=2)
    found, where = dpo.log_probabilities(model, columns)
    columns["reference"] = np.zeros(columns["labels"].shape, np.float32)
    columns["reference"][where.numpy()] = found.detach().numpy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        dpo.loss(model, columns, 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool((dpo.reward_margins(model, columns, 0.5) > 0.05).all())
