"""Errors cross process boundaries whole."""

import pickle

import pytest

from app import errors

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.RayloopError)
]
ARGUMENTS = {
    errors.StageRefused: ("perplexity rose by 9 %", "raise the budget", {"perplexity": 1.5}),
    errors.RequestError: (400, "temperature is 9, the largest is 2", "invalid_value", "temperature"),
}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_survives_pickling(kind: type[errors.RayloopError]) -> None:
    error = kind(*ARGUMENTS.get(kind, ("no folder at /x", "run ingest first")))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_sentence_ends_with_the_remedy() -> None:
    assert (
        str(errors.TableError("there is no table a.b", "run jobs.ingest")) == "there is no table a.b: run jobs.ingest"
    )
    assert str(errors.TableError("there is no table a.b")) == "there is no table a.b"


def test_only_a_wrong_configuration_exits_with_two() -> None:
    assert {kind for kind in CLASSES if kind.exit_code == 2} == {errors.ConfigError}
