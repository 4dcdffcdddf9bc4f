"""What a worker is said to need of memory."""

from pathlib import Path
from typing import Any

import pytest

from app import model as models
from app.config import Config
from app.settings.training import TrainingConfig
from app.training import memory
from app.training.probe import free_bytes


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from app import conversation

    return conversation.train_tokenizer(["where is my order 4512? it is on its way"] * 20, 512)


def training(**values: Any) -> TrainingConfig:
    small = {"base_model": "preset:tiny", "micro_batch_size": 2, "block_tokens": 32, **values}
    return Config().with_overrides({f"training.{name}": value for name, value in small.items()}).training


def predicted(tokenizer: Any, **values: Any) -> memory.Memory:
    settings = training(**values)
    return memory.predict(models.new_model("preset:tiny", tokenizer, 32, 17), settings)


def weights(tokenizer: Any) -> int:
    return sum(weight.numel() for weight in models.new_model("preset:tiny", tokenizer, 32, 17).parameters())


@pytest.mark.parametrize(("stage", "bytes_a_weight"), [(0, 16), (1, 4 + 12 / 2), (2, 2 + 14 / 2), (3, 16 / 2)])
def test_states_of_two_workers_in_bf16_are_those_of_the_zero_paper(
    tokenizer: Any, stage: int, bytes_a_weight: float
) -> None:
    found = predicted(tokenizer, zero_stage=stage, precision="bf16")
    states = found.weights + found.gradients + found.optimizer_states
    buffer = (
        2 * len(tokenizer) * 64 if stage in (1, 2) else 0
    )  # gradients are reduced in one of the size of the largest weight
    assert states == pytest.approx(bytes_a_weight * weights(tokenizer) + buffer, rel=0.01)


def test_more_workers_share_more(tokenizer: Any) -> None:
    two, four = (predicted(tokenizer, zero_stage=3, num_workers=workers) for workers in (2, 4))
    assert four.optimizer_states == pytest.approx(two.optimizer_states / 2, abs=1)
    assert four.weights == pytest.approx(two.weights / 2, abs=1)
    assert four.activations == two.activations


def test_activations_follow_the_batch_and_checkpointing_keeps_fewer(tokenizer: Any) -> None:
    one, four = (predicted(tokenizer, micro_batch_size=size) for size in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations)
    assert predicted(tokenizer, activation_checkpointing=True).activations < predicted(tokenizer).activations


def test_a_gpu_holds_nothing_of_what_is_offloaded(tokenizer: Any) -> None:
    on_gpu = {"use_gpu": True, "zero_stage": 3, "offload_optimizer": "cpu"}
    assert predicted(tokenizer, **on_gpu).optimizer_states == 0
    assert predicted(tokenizer, **on_gpu).weights > 0
    assert predicted(tokenizer, **on_gpu, offload_parameters="cpu").weights == 0
    assert predicted(tokenizer, **on_gpu).runtime == 0


def test_peak_is_of_the_forward_pass_or_of_the_update(tokenizer: Any) -> None:
    found = predicted(tokenizer)
    always = found.runtime + found.kept_free + found.weights + found.optimizer_states
    assert found.peak == always + max(found.activations + found.head, found.gradients + found.update)
    assert found.to_json()["peak"] == found.peak


def test_a_checkpoint_is_pieces_a_copy_and_the_model_that_is_loaded_again(tokenizer: Any) -> None:
    """With AdamW on two workers 12 / 2 bytes a weight of pieces, and 2 + 2 of the model in bf16."""
    found = predicted(tokenizer, zero_stage=1, precision="bf16", num_workers=2)
    assert found.checkpoint == pytest.approx((12 / 2 + 4) * weights(tokenizer), rel=0.01)


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("", {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 5\ninactive_file 200000\n"}),
        (
            "memory",
            {
                "memory.limit_in_bytes": "1000000",
                "memory.usage_in_bytes": "900000",
                "memory.stat": "inactive_file 7\ntotal_inactive_file 200000\n",
            },
        ),
    ],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, folder: str, files: dict[str, str]) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, content in files.items():
        (tmp_path / folder / name).write_text(content)
    assert free_bytes(tmp_path) == 300_000


def test_without_a_container_the_machine_has_what_it_has(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 100_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) > 100_000_000
