"""Direct preference optimisation: a model learns which of two replies people liked better.

A batch is one that app/training/preference_blocks.py makes: both replies of a pair in one block, and what the model
that training started from thinks of every token. So no second model takes memory beside the one that learns.

Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from app.training.packing import NOT_LEARNED

# Axes: b blocks, t tokens of a block, l learned positions, v vocabulary, p pairs of a batch
Batch = Mapping[str, np.ndarray]


def log_probabilities(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model thinks of the tokens that are learned.

    Returns:
        (l,) float32, the log-probability of each after those before it, and (b, t) bool, where they are.
    """
    input_ids_bt, position_ids_bt, labels_bt = (
        torch.from_numpy(np.ascontiguousarray(batch[name])).long().to(model.device)
        for name in ("input_ids", "position_ids", "labels")
    )
    logits_btv = model(input_ids=input_ids_bt, position_ids=position_ids_bt, use_cache=False).logits
    learned_bt = labels_bt != NOT_LEARNED
    learned_bt[:, 0] = False
    logits_lv = logits_btv[:, :-1][learned_bt[:, 1:]].float()
    nll_l = torch.nn.functional.cross_entropy(logits_lv, labels_bt[learned_bt], reduction="none")
    return -nll_l, learned_bt


def reward_margins(model: Any, batch: Batch, beta: float) -> torch.Tensor:
    """By how much the model has come to prefer each pair's chosen reply over the rejected one.

    Returns:
        (p,) beta times the difference of both sides' log-ratios of model and reference, for the pairs of a batch in
        order; no pair, no element.
    """
    logps_l, learned_bt = log_probabilities(model, batch)
    reference_bt, pair_bt = (torch.from_numpy(np.ascontiguousarray(batch[name])) for name in ("reference", "pair"))
    reference_l = reference_bt.to(learned_bt.device)[learned_bt]
    pair_l = pair_bt.to(learned_bt.device)[learned_bt].long()
    block_l = learned_bt.nonzero()[:, 0]
    # A pair has at least one learned token on each side, so that numbering those there are loses none.
    _, place_l = torch.unique(block_l * (learned_bt.shape[1] + 1) + pair_l.abs(), return_inverse=True)
    pairs = int(place_l.max()) + 1 if len(place_l) else 0
    # Its type is said: while a checkpoint is looked at, the process's default may be another one.
    difference_p = torch.zeros(pairs, dtype=torch.float32, device=learned_bt.device)
    return beta * difference_p.index_add(0, place_l, pair_l.sign() * (logps_l - reference_l))


def losses(margins_p: torch.Tensor) -> torch.Tensor:
    """(p,) the loss of each pair: the negative log-likelihood that its chosen reply is preferred."""
    return -torch.nn.functional.logsigmoid(margins_p)


def loss(engine: Any, batch: Batch, beta: float) -> torch.Tensor:
    """Summed loss of the pairs of a micro batch."""
    return losses(reward_margins(engine, batch, beta)).sum()


def pairs_in(batch: Batch) -> int:
    """How many pairs a batch has, of which something is learned."""
    learned_bt = batch["labels"] != NOT_LEARNED
    learned_bt[:, 0] = False
    return sum(
        len(np.unique(np.abs(pair_t[learned_t]))) for pair_t, learned_t in zip(batch["pair"], learned_bt, strict=True)
    )


def validate(engine: Any, batches: Iterable[Batch], beta: float) -> dict[str, float]:
    """How held-out pairs fare, over the batches of all workers together.

    Returns:
        validation_loss, the mean loss of a pair; reward_margin, the mean margin; reward_accuracy, the share of pairs
        with a positive one.
    """
    total = torch.zeros(4, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            margins_p = reward_margins(engine, batch, beta).double()
            total += torch.stack(
                [
                    losses(margins_p).sum(),
                    margins_p.sum(),
                    (margins_p > 0).sum().double(),
                    total.new_tensor(len(margins_p)),
                ]
            )
    engine.train()
    dist.all_reduce(total)
    loss_sum, margin_sum, right, count = total.tolist()
    return {"validation_loss": loss_sum / count, "reward_margin": margin_sum / count, "reward_accuracy": right / count}
