import optuna
import pytest

from app.config import Config
from app.errors import ConfigError
from app.tuning import space


def searching(**dimensions: dict[str, object]) -> Config:
    renamed = {key.replace("__", "."): value for key, value in dimensions.items()}
    return Config().with_overrides({"tuning.space": renamed})


ALL_KINDS = {
    "training__learning_rate": {"kind": "log_float", "low": 1e-4, "high": 1e-2},
    "training__weight_decay": {"kind": "float", "low": 0.0, "high": 0.2},
    "training__micro_batch_size": {"kind": "int", "low": 1, "high": 16},
    "training__zero_stage": {"kind": "choice", "choices": [0, 2]},
}


def test_every_value_optuna_draws_makes_a_configuration() -> None:
    config = searching(**ALL_KINDS)
    space.check(config)
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=1, n_startup_trials=4))
    for number in range(6):
        drawn = study.ask(space.distributions(config.tuning.space))
        trained = space.trial_config(config, drawn.params).training
        assert trained.learning_rate == drawn.params["training.learning_rate"]
        assert trained.zero_stage in (0, 2)
        assert 1 <= trained.micro_batch_size <= 16
        study.tell(drawn, float(number))


def test_a_logarithmic_dimension_is_drawn_evenly_in_its_logarithm() -> None:
    config = searching(training__learning_rate=ALL_KINDS["training__learning_rate"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [study.ask(space.distributions(config.tuning.space)).params["training.learning_rate"] for _ in range(200)]
    assert 0.35 < sum(value < 1e-3 for value in drawn) / 200 < 0.65


def test_a_trial_takes_the_steps_and_workers_of_the_search() -> None:
    config = Config().with_overrides({"tuning.max_steps": 33, "tuning.grace_steps": 11, "tuning.num_workers": 1})
    trained = space.trial_config(config, {"training.learning_rate": 0.005}).training
    assert (trained.max_steps, trained.report_every_steps, trained.num_workers) == (33, 11, 1)
    assert trained.learning_rate == 0.005


@pytest.mark.parametrize("values", [{}, {"training.micro_batch_size": 2}])
def test_a_trial_learns_from_as_many_blocks_a_step_as_training(values: dict[str, object]) -> None:
    config = Config().with_overrides(
        {"training.num_workers": 4, "tuning.num_workers": 1, "training.micro_batch_size": 8}
    )
    trained = space.trial_config(config, values).training
    assert trained.num_workers == 1
    assert trained.blocks_per_step == config.with_overrides(dict(values)).training.blocks_per_step


def test_blocks_are_made_for_each_combination_of_what_they_depend_on() -> None:
    config = searching(
        training__learning_rate=ALL_KINDS["training__learning_rate"],
        training__block_tokens={"kind": "choice", "choices": [128, 256]},
        training__loss_on={"kind": "choice", "choices": ["assistant", "all"]},
    )
    space.check(config)
    assert len(list(space.data_settings(config))) == 4
    assert list(space.data_settings(searching(training__learning_rate=ALL_KINDS["training__learning_rate"]))) == [{}]


@pytest.mark.parametrize(
    ("key", "dimension", "sentence"),
    [
        ("training.learning_rat", {"kind": "float", "low": 0.1, "high": 1.0}, "did you mean 'learning_rate'"),
        ("training.learning_rate", {"kind": "float", "low": -1.0, "high": 1.0}, "learning_rate cannot be -1.0"),
        ("training.lr", {"kind": "float", "low": 0.1, "high": 1.0}, "training.lr is not a setting"),
        (
            "training.lora.rank",
            {"kind": "int", "low": 2, "high": 8},
            "read only with training.method=lora, which is full",
        ),
        ("training.precision", {"kind": "choice", "choices": ["fp32", "fp8"]}, "precision cannot be 'fp8'"),
        ("training.max_steps", {"kind": "choice", "choices": [100, 1000]}, "decided by tuning.max_steps"),
        ("training.num_workers", {"kind": "int", "low": 1, "high": 2}, "decided by tuning.num_workers"),
        ("training.block_tokens", {"kind": "int", "low": 64, "high": 256}, "list the values"),
        ("evaluation.replies", {"kind": "int", "low": 1, "high": 2}, "a trial only trains"),
    ],
)
def test_a_space_that_no_configuration_fits_is_refused(key: str, dimension: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        space.check(Config().with_overrides({"tuning.space": {key: dimension}}))


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="name at least one key"):
        space.check(Config().with_overrides({"tuning.space": {}}))
