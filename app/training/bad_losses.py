"""Which losses of a run are bad, and what is done about them."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from app.errors import StageFailed
from app.settings.training import TrainingConfig

logger = logging.getLogger(__name__)

LOSSES = 50
"""Steps whose median a loss is compared with."""
FEW_LOSSES = 10
"""Fewer of them say little yet."""
JUMP_NATS = 1.0
"""A jump is at least as high: near zero a loss may well be many times another."""
REMEDY = (
    "submit it again with training.on_bad_loss=skip or roll_back to go on from its last checkpoint; with a lower "
    "training.learning_rate it is another run, which begins anew"
)
LOWER = "lower training.learning_rate: it is another run then, which begins anew"


class Losses:
    """The latest losses and the bad ones. Each worker sees the same ones, so all decide alike."""

    def __init__(self, training: TrainingConfig, kept: dict[str, Any] | None = None) -> None:
        """`kept`: what a checkpoint has of them, see `state`."""
        self._training = training
        self._latest: deque[float] = deque(kept["latest"] if kept else (), maxlen=LOSSES)
        self._bad: int = kept["bad"] if kept else 0
        self.left_out: set[int] = set(kept["left_out"] if kept else ())
        """Places of the sequence where steps begin that made the run go back."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run that goes on from it judges as if it had never stopped."""
        return {"latest": [*self._latest], "bad": self._bad, "left_out": sorted(self.left_out)}

    def go_back(self, kept: dict[str, Any] | None) -> None:
        """Forget the losses of the steps after a checkpoint, but not that there were bad ones."""
        self._latest = deque(kept["latest"] if kept else (), maxlen=LOSSES)

    def is_good(self, loss: float) -> bool:
        """Whether a step with this loss is to be taken."""
        if not math.isfinite(loss) or len(self._latest) < FEW_LOSSES:
            return math.isfinite(loss)
        median = statistics.median(self._latest)
        return loss <= max(median * self._training.bad_loss_factor, median + JUMP_NATS)

    def add(self, loss: float) -> None:
        """Remember a good one."""
        self._latest.append(loss)

    def meet(self, loss: float, step: int, began: int) -> None:
        """Count the bad loss of a step whose blocks began at a place.

        Raises:
            StageFailed: It is not to be gone on.
        """
        self._bad += 1
        training, said = self._training, f"the loss at step {step} is {loss:.4g}"
        logger.warning("%s, the %d. bad one (training.on_bad_loss=%s)", said, self._bad, training.on_bad_loss)
        if training.on_bad_loss == "stop":
            raise StageFailed(f"{said} and training.on_bad_loss is stop", REMEDY)
        if self._bad > training.max_bad_losses:
            raise StageFailed(
                f"{said}, after {training.max_bad_losses} bad ones (training.max_bad_losses)",
                f"{LOWER}; or raise the number",
            )
        if training.on_bad_loss == "roll_back":
            self.left_out.add(began)
