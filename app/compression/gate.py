"""What compression costs and saves, and whether that is within the budget."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from app.config import CompressionConfig
from app.storage import open_uri

if TYPE_CHECKING:
    import numpy as np

SPEED_TOKENS, SPEED_REPEATS = 32, 5
BATCHES = (1, 8)
"""Batch sizes that generation is timed at: one user, and several at once."""


@dataclass(frozen=True)
class Measured:
    """A model folder as it was loaded from disk."""

    bytes: int
    """Of the weights' files."""
    perplexity: float
    """On held-out blocks."""
    tokens_per_s: tuple[float, ...]
    """Generation rate at each of BATCHES."""


def measure(
    folder: Path, blocks: "Mapping[str, np.ndarray]", prompts: Sequence[Sequence[int]], batch_size: int, **options: Any
) -> Measured:
    """Load a model folder as serving does, and measure it.

    Args:
        folder: The model and its tokenizer.
        blocks: Held-out blocks for perplexity.
        prompts: Token ids that generation begins with; used again where a batch is larger.
        batch_size: Blocks computed at once.
        options: For app.model.load, e.g. device_map.

    Raises:
        ModelError: It cannot be loaded.
    """
    from app import evaluation
    from app import model as models

    model, tokenizer = models.load(folder, **options)
    perplexity = evaluation.perplexity(model, blocks, batch_size)

    def rate(batch: int) -> float:
        chosen = [prompts[index % len(prompts)] for index in range(batch)]
        started_s = time.perf_counter()
        evaluation.generate(model, tokenizer, chosen, SPEED_TOKENS, min_tokens=SPEED_TOKENS)
        return batch * SPEED_TOKENS / (time.perf_counter() - started_s)

    rate(1)  # the first call sets up what later ones use again
    # The best of several: on a machine that does other work too, it is the least disturbed.
    speeds = tuple(max(rate(batch) for _ in range(SPEED_REPEATS)) for batch in BATCHES)
    return Measured(weights_bytes(str(folder)), perplexity, speeds)


def weights_bytes(uri: str) -> int:
    """Bytes of the weights in a model folder, local or remote."""
    filesystem, path = open_uri(uri)
    files = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sum(file.size for file in files if file.extension == "safetensors")


def misses(budget: CompressionConfig, before: Measured, after: Measured) -> list[str]:
    """What is outside the budget, a clause each; empty if the compressed model is accepted."""
    found = []
    rise = after.perplexity / before.perplexity - 1
    # Written so that a perplexity that is not a number misses too.
    if not after.perplexity <= before.perplexity * (1 + budget.max_perplexity_increase) < math.inf:
        found.append(
            f"perplexity went from {before.perplexity:.4g} to {after.perplexity:.4g} ({rise:+.1%}), "
            f"compression.max_perplexity_increase is {budget.max_perplexity_increase:.1%}"
        )
    saved = 1 - after.bytes / before.bytes
    if saved < budget.min_bytes_reduction:
        found.append(
            f"weights went from {before.bytes:,} to {after.bytes:,} bytes ({saved:.1%} saved), "
            f"compression.min_bytes_reduction is {budget.min_bytes_reduction:.1%}"
        )
    return found


def figures(before: Measured, after: Measured, accepted: bool) -> dict[str, Any]:
    """Before and after, as the last line and MLflow show them; rates at the largest batch, and for one user."""
    return {
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "accepted": accepted,
        "tokens_per_s_before": round(before.tokens_per_s[-1], 1),
        "tokens_per_s_after": round(after.tokens_per_s[-1], 1),
        "tokens_per_s_one_user_before": round(before.tokens_per_s[0], 1),
        "tokens_per_s_one_user_after": round(after.tokens_per_s[0], 1),
    }
