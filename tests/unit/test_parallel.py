"""Every way of sharing the work of a step learns the same: ZeRO, tensor and sequence parallel, offload, recomputing."""

from pathlib import Path
from typing import Any

import pytest

from app.config import Config
from app.errors import ConfigError
from tests import packed

PARALLEL: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"training.tensor_parallel_size": 2},
    "sequence": {"training.sequence_parallel_size": 2},
}
CPU = {"training.offload_optimizer": "cpu"}
WAYS: list[dict[str, Any]] = [
    *({"training.zero_stage": stage} for stage in range(4)),
    *({"training.zero_stage": stage, "training.activation_checkpointing": True} for stage in (0, 3)),
    *({"training.zero_stage": stage, **CPU} for stage in (1, 2, 3)),
    {"training.zero_stage": 3, **CPU, "training.offload_parameters": "cpu"},
    {"training.zero_stage": 2, "training.micro_batch_size": 2, "training.gradient_accumulation_steps": 2},
    {"training.zero_stage": 1, "training.loss_chunk_tokens": 7},
    {"training.zero_stage": 1, "training.adam_kernel": "fused"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed") / "store"
    packed.make(root)
    return root


@pytest.fixture(scope="module")
def plain(store: Path) -> dict[str, float]:
    """Validation losses of two workers that each compute their own batches, with nothing sharded."""
    (found,) = packed.trained(store, [{"training.zero_stage": 0}])
    assert found["validation"]["12"] < found["validation"]["6"] - 0.1
    losses: dict[str, float] = found["validation"]
    return losses


@pytest.mark.parametrize("parallel", ["tensor", "sequence"])
def test_workers_that_share_a_batch_come_to_the_loss_of_workers_that_do_not(
    store: Path, plain: dict[str, float], parallel: str
) -> None:
    stage = 1 if parallel == "tensor" else 3
    for found in packed.trained(store, [{**PARALLEL[parallel], "training.zero_stage": stage}]):
        assert found["validation"] == pytest.approx(plain, abs=2e-6)


def test_a_token_counts_as_much_in_whatever_micro_batch_it_is(store: Path, plain: dict[str, float]) -> None:
    """Replies differ in length, so that a mean of the micro batches' means would be another loss."""
    way = {"training.zero_stage": 2, "training.micro_batch_size": 1, "training.gradient_accumulation_steps": 4}
    (found,) = packed.trained(store, [way])
    assert found["validation"] == pytest.approx(plain, abs=2e-6)


def test_every_zero_stage_learns_in_bf16_what_fp32_does_and_goes_on_exactly(
    store: Path, plain: dict[str, float]
) -> None:
    ways = [
        {"training.precision": "bf16", "training.zero_stage": stage, "checkpoints": True, "resume": resume}
        for stage in range(4)
        for resume in (False, True)
    ]
    found = packed.trained(store, [{**way} for way in ways])
    for stage, (whole, resumed) in enumerate(zip(found[::2], found[1::2], strict=True)):
        assert whole["validation"]["12"] == pytest.approx(plain["12"], abs=5e-3), stage
        assert whole["model_loss"] == pytest.approx(plain["12"], abs=0.05), "computed in bf16"
        assert resumed["validation"]["12"] == pytest.approx(whole["validation"]["12"], abs=1e-5), stage
        assert len(resumed["steps"]) == 6


def test_muon_learns_the_same_in_bf16_and_stage_0_as_in_stage_1(store: Path) -> None:
    ways = [
        {"training.precision": "bf16", "training.optimizer": "muon", "training.zero_stage": stage} for stage in (0, 1)
    ]
    replicated, sharded = packed.trained(store, ways)
    assert replicated["validation"]["12"] == pytest.approx(sharded["validation"]["12"], abs=1e-2)


@pytest.mark.slow
def test_deepspeeds_own_adam_learns_what_torchs_does_and_goes_on(store: Path, plain: dict[str, float]) -> None:
    settings = [
        {"training.zero_stage": 0},
        *({"training.zero_stage": stage, **CPU} for stage in (1, 2, 3)),
        *({"training.zero_stage": stage, "training.precision": "bf16"} for stage in (1, 3)),
    ]
    ways = [
        {**way, "training.adam_kernel": "deepspeed", "checkpoints": True, "resume": resume}
        for way in settings
        for resume in (False, True)
    ]
    for way, found in zip(ways, packed.trained(store, [{**way} for way in ways]), strict=True):
        near = 5e-3 if "training.precision" in way else 2e-6
        assert found["validation"]["12"] == pytest.approx(plain["12"], abs=near), way
        assert len(found["steps"]) == (6 if way["resume"] else 12)


def test_blocks_that_do_not_divide_count_as_much_in_whatever_micro_batch_they_are(store: Path) -> None:
    """5 and 4 blocks; 1 and 2, three times; and a turn that one worker has nothing for."""
    ways: list[dict[str, Any]] = [{"training.micro_batch_size": size} for size in (5, 2, 1)]
    ways += [
        {"training.micro_batch_size": 1, "training.zero_stage": 3, "training.activation_checkpointing": True},
        {"training.micro_batch_size": 2, "training.zero_stage": 3, **PARALLEL["sequence"]},
        {"training.micro_batch_size": 2, "training.zero_stage": 1, **PARALLEL["tensor"]},
    ]
    two_large, *others = packed.trained(store, [{"training.global_batch_size": 9, **way} for way in ways])
    for found, way in zip(others, ways[1:], strict=True):
        assert found["validation"] == pytest.approx(two_large["validation"], abs=2e-6), way
        assert found["tokens"] == two_large["tokens"], way


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_every_way_of_sharing_the_work_comes_to_the_same_loss(
    store: Path, plain: dict[str, float], parallel: str
) -> None:
    ways = [{**PARALLEL[parallel], **way} for way in WAYS]
    for way, found in zip(ways, packed.trained(store, ways), strict=True):
        # The mean of two halves of a batch is not quite the mean of the batch.
        assert found["validation"] == pytest.approx(plain, abs=2e-6), way


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_checkpoints_of_every_kind_of_group_are_gone_on_from(
    store: Path, plain: dict[str, float], parallel: str
) -> None:
    ways = [
        {**PARALLEL[parallel], "training.zero_stage": stage, "checkpoints": True, "resume": resume}
        for stage in range(4)
        for resume in (False, True)
    ]
    for way, found in zip(ways, packed.trained(store, ways), strict=True):
        assert found["validation"]["12"] == pytest.approx(plain["12"], abs=2e-6), way
        assert len(found["steps"]) == (6 if way["resume"] else 12)
        assert found["model_loss"] == pytest.approx(plain["12"], abs=1e-5), "the model that the checkpoint holds"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tensor_parallel_size": 3}, "num_workers=2 cannot be shared out to groups of tensor_parallel_size=3"),
        ({"sequence_parallel_size": 2, "block_tokens": 63}, "block_tokens=63 cannot be cut into"),
        ({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, "exclude each other"),
        ({"tensor_parallel_size": 2, "optimizer": "muon"}, "optimizer=muon needs whole matrices"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "needs zero_stage 1, 2 or 3, not 0"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters=cpu needs zero_stage=3, not 2"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "offload_parameters=nvme needs nvme_path"),
        ({"zero_stage": 3, "offload_optimizer": "nvme"}, "offload_optimizer=nvme has no checkpoints"),
        ({"attention": "flex"}, "attention=flex has no backward pass on a CPU"),
        ({"attention": "flash", "use_gpu": True, "sequence_parallel_size": 2}, "forgets where conversations end"),
        ({"adam_kernel": "deepspeed", "precision": "bf16", "zero_stage": 0}, "has no checkpoints"),
        ({"attention": "flash", "use_gpu": True}, "attention=flash needs micro_batch_size=1, got 8"),
        ({"adam_kernel": "fused", "optimizer": "muon"}, "is for optimizer=adamw"),
        ({"num_workers": [1, 2], "tensor_parallel_size": 2}, "needs a fixed num_workers, got 1 to 2"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Config().with_overrides({f"training.{key}": value for key, value in settings.items()})
