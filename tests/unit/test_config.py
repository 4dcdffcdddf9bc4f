"""A configuration is checked whole, and every error helps."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import Config, load
from app.errors import ConfigError
from app.settings.training import HOW_A_RUN_IS_COMPUTED, TrainingConfig

CONFIGS = sorted((Path(__file__).parent.parent.parent / "jobs" / "configs").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refusal(file: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load(path)


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    file.write_text("")
    assert load(file) == Config()


def test_a_misspelt_key_is_refused_with_place_alternatives_and_nearest(file: Path) -> None:
    message = refusal(file, "training:\n  zero_stage: 1\n  learnig_rate: 0.1\n")
    assert f"{file}:3: training.learnig_rate is not a setting" in message
    assert "did you mean 'learning_rate'?" in message
    assert "micro_batch_size" in message


def test_a_misspelt_rule_is_refused_where_it_was_given(file: Path) -> None:
    message = refusal(file, "", ("ingestion.rules.nearduplicate.severity=warn",))
    assert "--set: ingestion.rules.nearduplicate is not a setting; did you mean 'near_duplicate'?" in message
    assert "literal" not in message


def test_all_errors_come_at_once(file: Path) -> None:
    message = refusal(file, "training: {zero_stage: 7, max_steps: many}\nservin: {}\n", ("tuning.trials=0",))
    assert "training.zero_stage: must be 0, 1, 2 or 3, got 7" in message
    assert 'training.max_steps: must be a valid integer, got "many"' in message
    assert "did you mean 'serving'?" in message
    assert "--set: tuning.trials: must be greater than or equal to 1, got 0" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("serving: {deploy_timeout_s: 10s}", "(seconds, a plain number)"),
        ("serving: {deploy_timeout_ms: 10000}", "did you mean 'deploy_timeout_s'?"),
        ("serving: {max_body_bytes: 1MB}", "(bytes, a plain number)"),
        ("ingestion: {validation_fraction: 10}", "(a share from 0 to 1)"),
    ],
)
def test_a_wrong_unit_is_refused_with_the_right_one(file: Path, text: str, expected: str) -> None:
    assert expected in refusal(file, text)


def test_errors_in_lists_name_the_item(file: Path) -> None:
    message = refusal(file, "ingestion:\n  sources:\n    - {uri: a, format: jsonl}\n    - {uri: b, format: xml}\n")
    assert f"{file}:4: ingestion.sources.1.format: must be 'jsonl', 'parquet', 'csv', 'arrow'" in message


def test_numbers_in_exponent_form_are_numbers(file: Path) -> None:
    file.write_text("training: {learning_rate: 1e-3}")
    assert load(file, ["training.weight_decay=5e-2"]).training.learning_rate == 1e-3


def test_a_version_may_be_written_as_a_number(file: Path) -> None:
    file.write_text("")
    assert load(file, ["inputs.model_version=3"]).inputs.model_version == "3"


def test_a_variant_has_a_name_that_metrics_can_carry(file: Path) -> None:
    message = refusal(file, "serving: {variants: [{name: größer, version: '1', uri: /m}]}")
    assert "serving.variants.0.name" in message
    assert "größer" in message


def test_a_string_is_not_taken_for_a_number(file: Path) -> None:
    assert "must be a valid integer" in refusal(file, "training: {max_steps: '50'}")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_must_be_finite(file: Path, value: str) -> None:
    assert "training.learning_rate" in refusal(file, f"training: {{learning_rate: {value}}}")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "training: !!python/object/apply:os.system ['true']\n",
        "training: {max_steps: [}\n",
        "- 1\n",
        "training: {\x00}\n",
    ],
)
def test_hostile_or_broken_yaml_is_refused(file: Path, text: str) -> None:
    assert str(file) in refusal(file, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["training.max_steps", "=3", ""])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    assert "--set" in refusal(file, "", (override,))


def test_overrides_reach_below_the_search_space(file: Path) -> None:
    file.write_text("")
    config = load(file, ["tuning.space.training.seed={kind: int, low: 1, high: 9}"])
    assert config.tuning.space["training.seed"].high == 9


def test_a_space_without_a_range_is_refused(file: Path) -> None:
    message = refusal(file, "tuning: {space: {training.seed: {kind: int, low: 3, high: 2}}}")
    assert "needs `low` < `high`" in message


def test_the_digest_follows_the_named_sections_only() -> None:
    base = Config()
    changed = base.with_overrides({"training.seed": 99})
    assert base.digest("training") != changed.digest("training")
    assert base.digest("ingestion") == changed.digest("ingestion")


@given(st.floats(min_value=1e-9, max_value=1e3), st.integers(min_value=1, max_value=10**9))
def test_overrides_come_back_as_they_were_given(rate: float, steps: int) -> None:
    config = Config().with_overrides({"training.learning_rate": rate, "training.max_steps": steps})
    assert (config.training.learning_rate, config.training.max_steps) == (rate, steps)
    assert config.with_overrides({}) == config


def test_a_password_in_a_sources_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ingestion:\n  sources:\n    - {uri: 'pg://me:s3cret@db/x', format: sql, query: SELECT 1}\n")
    with pytest.raises(ConfigError, match="holds no password") as caught:
        load(file)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "lora"}, "base_model=preset:small is random: name a registered model"),
        ({"base_model": "m", "method": "lora", "optimizer": "muon"}, "method=lora has none: use adamw"),
        (
            {"base_model": "m", "method": "lora", "lora.load_in_8bit": True, "zero_stage": 3},
            "where DeepSpeed cannot shard them; use zero_stage 0 to 2",
        ),
        ({"base_model": "m", "lora.load_in_8bit": True}, "needs method=lora: int8 weights cannot be trained"),
        ({"objective": "dpo"}, "objective=dpo prefers among what a trained model says"),
        ({"base_model": "m", "method": "lora", "lora.dropout": 1.0}, "must be less than 1"),
        ({"base_model": "m", "method": "lora", "tensor_parallel_size": 2}, "is computed by one worker a batch"),
        ({"base_model": "m", "lora.rank": 0}, "must be greater than or equal to 1"),
    ],
)
def test_fine_tuning_that_cannot_be_is_refused_with_the_reason(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_overrides({f"training.{key}": value for key, value in settings.items()})
    assert reason in str(caught.value)


def test_a_run_keeps_its_identity_when_only_the_way_it_is_computed_changes() -> None:
    run = Config().training
    elsewhere = {"num_workers": [1, 4], "zero_stage": 3, "use_gpu": True, "max_failures": 0, "keep_checkpoints": 5}
    other = Config().with_overrides({f"training.{key}": value for key, value in elsewhere.items()}).training
    assert other.identity() == run.identity()
    for key, value in {"learning_rate": 1e-5, "seed": 18, "micro_batch_size": 3, "max_steps": 301}.items():
        assert Config().with_overrides({f"training.{key}": value}).training.identity() != run.identity()
    assert set(HOW_A_RUN_IS_COMPUTED) < set(TrainingConfig.model_fields)


def test_workers_are_a_number_or_the_fewest_and_the_most(file: Path) -> None:
    file.write_text("training: {num_workers: [1, 3], micro_batch_size: 2, gradient_accumulation_steps: 4}")
    training = load(file).training
    assert (training.min_workers, training.max_workers, training.blocks_per_step) == (1, 3, 24)
    assert "num_workers is [fewest, most], got [3, 1]" in refusal(file, "training: {num_workers: [3, 1]}")
    assert "training.num_workers: must be" in refusal(file, "training: {num_workers: 0}")
    several = refusal(file, "training: {global_batch_size: 3, num_workers: 4}")
    assert "global_batch_size=3 has no block for each of num_workers=4" in several
