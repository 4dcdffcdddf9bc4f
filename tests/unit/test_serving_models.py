"""Which variant answers under which name, and what replicas of different versions tell each other."""

import pickle

from app.serving.models import Models
from app.serving.schema import Readiness
from app.settings.serving import ServingConfig


def test_a_chain_of_fallbacks_asks_no_replicas_twice() -> None:
    variants = [
        {"name": "base", "version": "1", "fallback": "student"},
        {"name": "polite", "version": "2", "adapter_of": "base", "fallback": "student", "weight": 0},
        {"name": "student", "version": "3", "fallback": "polite", "weight": 0},
    ]
    models = Models(ServingConfig.model_validate({"variants": variants}).variants)
    for name, other in (("polite", "student"), ("base", "student"), ("student", "polite")):
        assert [each.name for each in models.chain(models.resolve(name, "anybody"))] == [name, other]


def test_a_replica_of_before_adapters_says_what_it_is() -> None:
    ready = Readiness("base", "support/1", 10, 4, 0, "/code", {"polite": "support/2"})
    assert ready.versions == {"base": "support/1", "polite": "support/2"}
    old = pickle.loads(pickle.dumps(ready))
    del old.__dict__["adapted"]
    assert old.versions == {"base": "support/1"}
