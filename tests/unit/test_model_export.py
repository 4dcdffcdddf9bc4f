"""A model version's files, or its adapters, copied and told apart from anything else."""

import json
from pathlib import Path

import pytest

from app import model_export
from app.config import Config
from app.errors import ConfigError, ModelError, StorageError
from app.registry import Registry
from jobs.export import JOB


@pytest.fixture
def config(store: str, tmp_path: Path) -> Config:
    """A store with two registered versions; only the second has adapters."""
    config = Config().with_overrides({"storage.uri": store, "export.what": "model"})
    registry = Registry(config)
    for number in (1, 2):
        folder = tmp_path / f"model-{number}"
        (folder / "intent").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * number)
        (folder / "intent" / "weights.json").write_text("[]")
        if number == 2:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"small")
            (folder / "adapter" / "adapter_config.json").write_text("{}")
        registry.register(registry.start_run("train", {}, {}), str(folder), {"rayloop.stage": "train"})
    return config


def test_the_newest_version_is_copied_whole_and_only_once(config: Config, tmp_path: Path) -> None:
    config = config.with_overrides({"export.uri": str(tmp_path / "out")})
    uri, done, written = model_export.export(config)
    assert written
    assert (done.model, done.version, done.what) == ("support", "2", "model")
    names = [file.name for file in done.files]
    assert names == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.json", "intent/weights.json",
        "model.safetensors",
    ]  # fmt: skip
    assert sorted(path.name for path in Path(uri).iterdir()) == [
        "_SUCCESS", "adapter", "config.json", "intent", "model.safetensors",
    ]  # fmt: skip
    assert (Path(uri) / "model.safetensors").read_bytes() == bytes(range(256)) * 2
    assert model_export.export(config)[2] is False
    (Path(uri) / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(StorageError, match=r"model\.safetensors is missing or not as _SUCCESS says"):
        model_export.export(config)


def test_adapters_alone_are_what_peft_loads(config: Config) -> None:
    uri, done, _ = model_export.export(config.with_overrides({"export.what": "adapter"}))
    assert [file.name for file in done.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert uri.endswith("/exports/support/2-adapter")
    without = {"export.what": "adapter", "inputs.model_version": "1"}
    with pytest.raises(ModelError, match=r"has no adapters: export one that was trained with training\.method=lora"):
        model_export.export(config.with_overrides(without))


def test_a_folder_with_anything_else_is_left_alone_and_a_cut_export_is_done_again(
    config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    other = config.with_overrides({"export.uri": str(out)})
    with pytest.raises(StorageError, match=r"is not empty: it holds letter\.txt"):
        model_export.export(other)
    (out / "letter.txt").rename(out / "_BEGUN")  # as an export that was killed leaves it
    assert model_export.export(other)[2] is True
    with pytest.raises(StorageError, match="it holds model support/2"):
        model_export.export(other.with_overrides({"inputs.model_version": "1"}))


def test_the_job_says_what_it_exported(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"storage": {"uri": config.storage.uri}, "export": {"what": "model"}}))
    assert JOB.main(["--config", str(file)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["status"], line["figures"]["files"]) == ("done", 5)
    assert line["outputs"]["model"]["version"] == "2"
    assert JOB.main(["--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "up_to_date"


def test_settings_of_tables_do_not_fit_models() -> None:
    with pytest.raises(ConfigError, match="what=model copies a model's files as they are: leave out format"):
        Config().with_overrides({"export.what": "model", "export.format": "jsonl"})
