"""Fine-tuning a registered model with adapters: every way to shard, resumed, merged, registered, used."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from app import lineage
from app import model as models
from app.config import Config
from app.errors import ModelError, RegistryError, StageFailed
from app.registry import Registry
from app.settings.training import TrainingConfig
from app.training import adapters, checkpoint, data
from app.training.trainer import Trained
from app.versions import ModelVersion, TableVersion
from tests.conftest import RunningCluster
from tests.trained import train_quickly

STEPS = 16
SETTINGS = {
    "training.base_model": "preset:tiny",
    "training.vocab_size": 512,
    "training.block_tokens": 64,
    "training.micro_batch_size": 4,
    "training.max_steps": STEPS,
    "training.report_every_steps": STEPS // 2,
    "training.validation_blocks": 16,
    "training.learning_rate": 1e-2,
    "ingestion.sample.conversations": 400,
    "compression.validation_blocks": 16,
    "evaluation.validation_blocks": 16,
    "evaluation.replies": 20,
    "evaluation.max_reply_tokens": 24,
}
LORA = {
    "training.base_model": "models:/support/1",
    "training.method": "lora",
    "training.lora.rank": 4,
    "training.lora.alpha": 8.0,
}


@pytest.fixture(scope="module")
def preset(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config().with_overrides({**SETTINGS, "storage.uri": str(tmp_path_factory.mktemp("finetune") / "store")})


@pytest.fixture(scope="module")
def table(preset: Config) -> TableVersion:
    from app.ingestion.pipeline import ingest

    return ingest(preset).version


@pytest.fixture(scope="module")
def base(preset: Config, table: TableVersion, tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return train_quickly(preset, table, tmp_path_factory.mktemp("base"), steps=40)


@pytest.fixture(scope="module")
def config(preset: Config, base: ModelVersion) -> Config:
    """Adapters on the registered version."""
    return preset.with_overrides(LORA)


def every_way(given: dict[str, Any]) -> None:
    """Train with each of the given settings in the same workers, then go on from the middle checkpoint of each."""
    import ray.train

    from app.training import loop, worker

    blocks, tokenizer, folder = given["blocks"], given["tokenizer"], Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()

    def run(name: str, training: TrainingConfig, resume: Path | None = None) -> None:
        losses: dict[int, float] = {}

        def report(metrics: dict[str, float], part: Any) -> None:
            losses[int(metrics["step"])] = metrics["validation_loss"]
            own = folder / f"part-of-{rank}"
            part.write(own)
            shutil.copytree(own, folder / name / str(int(metrics["step"])), dirs_exist_ok=True)
            shutil.rmtree(own)
            dist.barrier()

        model = worker.start_model(training, tokenizer)
        frozen = {key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad}
        hooks = loop.Hooks(report=report, step=lambda values: None)
        loop.run(model, tokenizer, training, data.Sequence(blocks, 3).take, blocks, hooks, resume)
        if training.zero_stage < 3:
            now = dict(model.named_parameters())
            assert all(torch.equal(now[key], weight) for key, weight in frozen.items()), "the base has changed"
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))

    for name, training in given["ways"].items():
        run(name, training)
        run(f"{name}-resumed", training, folder / name / str(STEPS // 2))


@dataclass(frozen=True)
class Ways:
    """Runs of the same steps in different ways."""

    folder: Path
    blocks: dict[str, np.ndarray]
    training: dict[str, TrainingConfig]

    def losses(self, name: str) -> dict[int, float]:
        """Validation losses by step."""
        found = json.loads((self.folder / f"{name}.json").read_text())
        return {int(step): loss for step, loss in found.items()}


def run_ways(folder: Path, config: Config, table: TableVersion, workers: int, **settings: dict[str, Any]) -> Ways:
    """Train in one start of Ray Train, once with each of the named settings."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from app.training.base_model import pinned

    config = pinned(config)[0].with_overrides({"training.lora.dropout": 0.0})
    training = {name: config.with_overrides(changed).training for name, changed in settings.items()}
    _, tokenizer = data.prepare(config, table)
    blocks = data.validation_blocks(config, table, tokenizer, 40)
    TorchTrainer(
        every_way,
        train_loop_config={"ways": training, "blocks": blocks, "tokenizer": tokenizer, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(folder / "ray")),
    ).fit()
    return Ways(folder, blocks, training)


def way(stage: int, int8: bool) -> dict[str, Any]:
    return {"training.zero_stage": stage, "training.lora.load_in_8bit": int8}


@pytest.fixture(scope="module")
def ways(config: Config, table: TableVersion, tmp_path_factory: pytest.TempPathFactory) -> Ways:
    """Adapters beside either kind of base, sharded over two workers."""
    folder = tmp_path_factory.mktemp("ways")
    return run_ways(folder, config, table, 2, lora=way(2, False), int8=way(1, True))


def check_way(ways: Ways, name: str, base: ModelVersion) -> None:
    """It learned, resumes exactly, and keeps the adapters and nothing of the base."""
    whole, resumed = ways.losses(name), ways.losses(f"{name}-resumed")
    assert whole[STEPS] < whole[STEPS // 2] - 0.02
    assert list(resumed) == [STEPS]
    assert resumed[STEPS] == pytest.approx(whole[STEPS], abs=1e-6)
    folder = ways.folder / name / str(STEPS)
    assert checkpoint.damaged(folder) is None
    assert not (folder / "model").exists()
    assert 0 < models.weights_bytes(folder / "adapter") < 0.2 * models.weights_bytes(Path(base.uri))
    for pieces in (folder / "state").iterdir():
        with safe_open(pieces, framework="pt") as held:
            assert all("lora_" in key for key in held.keys())  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("name", ["lora", "int8"])
def test_adapters_learn_and_resume_and_their_checkpoints_hold_nothing_of_the_base(
    ways: Ways, base: ModelVersion, name: str
) -> None:
    check_way(ways, name, base)


@pytest.mark.slow
def test_every_zero_stage_and_number_of_workers_gives_the_same_loss(
    config: Config, table: TableVersion, base: ModelVersion, tmp_path: Path
) -> None:
    two = {f"lora-{stage}": way(stage, False) for stage in range(4)}
    two |= {f"int8-{stage}": way(stage, True) for stage in range(3)}
    sharded = run_ways(tmp_path, config, table, 2, **two)
    # As many blocks a step: one worker takes two micro batches.
    alone = run_ways(tmp_path, config, table, 1, lora=way(1, False), int8=way(1, True))
    for name in two:
        check_way(sharded, name, base)
        wanted = alone.losses(name.partition("-")[0])[STEPS]
        assert sharded.losses(name)[STEPS] == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("name", ["lora", "int8"])
def test_merged_weights_compute_what_base_and_adapters_compute(ways: Ways, tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    training = ways.training[name]
    adapter = ways.folder / name / str(STEPS) / "adapter"
    adapters.merge(training, training.base_model, adapter, tmp_path / "merged")
    apart = PeftModel.from_pretrained(adapters.load_base(training, training.base_model), adapter)
    apart.train(False)
    merged, _ = models.load(tmp_path / "merged")
    ids = torch.from_numpy(ways.blocks["input_ids"][:4]).long()
    with torch.no_grad():
        wanted = apart(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=2e-3, rtol=1e-3)
        with apart.disable_adapter():
            assert float((apart(input_ids=ids).logits - wanted).abs().max()) > 0.1, "the adapters do something"


@pytest.fixture(scope="module")
def adapted(config: Config, table: TableVersion, base: ModelVersion) -> Trained:
    """The base fine-tuned as int8, published."""
    from app.training.trainer import train

    before = {file.name: file.read_bytes() for file in Path(base.uri).iterdir() if file.is_file()}
    trained = train(config.with_overrides({"training.lora.load_in_8bit": True, "training.max_steps": 24}), table)
    assert {file.name: file.read_bytes() for file in Path(base.uri).iterdir() if file.is_file()} == before
    return trained


def test_int8_fine_tuning_of_a_registered_model_gives_a_version_like_any_other(
    config: Config, base: ModelVersion, adapted: Trained
) -> None:
    from app.judgement import judge

    figures, folder = adapted.figures, Path(adapted.version.uri)
    assert figures["merged_perplexity"] == pytest.approx(figures["perplexity"], rel=1e-3)
    assert figures["adapter_bytes"] == models.weights_bytes(folder / "adapter") < 0.2 * figures["model_bytes"]
    assert figures["model_bytes"] == models.weights_bytes(folder)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base.uri
    tags = Registry(config).tags(adapted.version)
    assert (tags["rayloop.stage"], tags["rayloop.base_model"]) == ("train", "support/1")
    assert lineage.read(adapted.version.uri).parent == "support/1"
    judged = judge(config, adapted.version, data.validation_blocks)
    assert judged.figures["perplexity"] == pytest.approx(figures["perplexity"], rel=0.01)


@pytest.mark.slow
def test_adapters_go_on_from_a_compressed_version(config: Config, table: TableVersion, adapted: Trained) -> None:
    from app.compression.pipeline import compress
    from app.training.trainer import train

    compressed = compress(config, adapted.version)
    assert compressed.figures["accepted"]
    again = train(config.with_overrides({"training.base_model": "models:/support@candidate"}), table)
    assert lineage.read(again.version.uri).parent == f"support/{compressed.version.version}"
    assert again.figures["validation_loss"] < adapted.figures["validation_loss"] + 0.05
    full = {"training.base_model": compressed.version.uri, "training.method": "full"}
    with pytest.raises(ModelError, match=r"is int8, and int8 weights cannot be trained: set training\.method=lora"):
        train(config.with_overrides(full), table)


def test_bases_that_cannot_be_adapted_are_refused_before_workers_start(
    config: Config, table: TableVersion, base: ModelVersion, tmp_path: Path
) -> None:
    from app.training.trainer import train

    with pytest.raises(RegistryError, match="'support' has no version '99'"):
        train(config.with_overrides({"training.base_model": "models:/support/99"}), table)
    with pytest.raises(RegistryError, match="no version of model 'support' has the alias 'golden'"):
        train(config.with_overrides({"training.base_model": "models:/support@golden"}), table)
    with pytest.raises(ModelError, match=r"names no layer of .*: its layers are .*q_proj"):
        train(config.with_overrides({"training.lora.target_modules": ["query"]}), table)
    model, tokenizer = models.load(base.uri)
    tokenizer.chat_template = None
    models.save(model, tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="has no chat template"):
        train(config.with_overrides({"training.base_model": str(tmp_path)}), table)


@pytest.mark.slow
def test_preference_tuning_learns_what_people_liked_and_keeps_the_merged_model_usable(
    config: Config, table: TableVersion, base: ModelVersion, tmp_path: Path
) -> None:
    from app.training.trainer import train

    things = ["order", "refund", "invoice", "parcel", "address", "account", "payment", "voucher"]
    asked = [f"where is my {thing} number {number}?" for thing in things for number in range(30)]
    rows = [
        {"prompt": question, "chosen": f"Sorry about that, I will look at {question[12:-1]}.", "rejected": "No idea."}
        for question in asked
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "training.objective": "dpo",
        "training.lora.load_in_8bit": True,
        "training.dpo.sources": [str(tmp_path / "pairs.jsonl")],
        "training.block_tokens": 128,
        "training.learning_rate": 3e-3,
        "training.max_steps": 24,
        "training.report_every_steps": 12,
    }
    trained = train(config.with_overrides(settings), table)
    figures = trained.figures
    assert figures["reward_margin"] > 0.1, "of pairs that were held out"
    assert figures["reward_accuracy"] > 0.9
    assert figures["validation_loss"] < 0.65 < np.log(2)
    assert figures["merged_perplexity"] == pytest.approx(figures["perplexity"], rel=1e-3)
    models.load(trained.version.uri)


def test_preference_tuning_without_pairs_is_refused_with_what_to_do(config: Config, table: TableVersion) -> None:
    from app.training.trainer import train

    with pytest.raises(StageFailed, match=r"there are no preference pairs in traffic:.*collect feedback"):
        train(config.with_overrides({"training.objective": "dpo"}), table)
