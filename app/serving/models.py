"""The variants that are served: the names they answer to, and who gets which."""

import time
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

from app import lineage
from app.errors import ModelError, RequestError, StorageError
from app.serving.openai_format import model_card
from app.settings.serving import VariantConfig


class Models:
    """What `model` may say: a registered model (`support`), one version of it (`support/3`) or a variant's name."""

    def __init__(self, variants: Sequence[VariantConfig]) -> None:
        self._created = {variant.name: _created(variant) for variant in variants}
        self.take(variants)

    def take(self, variants: Sequence[VariantConfig]) -> None:
        """Go on with other weights."""
        self._variants = tuple(variants)
        self._names: dict[str, list[VariantConfig]] = {}
        for variant in variants:
            for name in dict.fromkeys((variant.model, f"{variant.model}/{variant.version}", variant.name)):
                self._names.setdefault(name, []).append(variant)

    def resolve(self, name: str, who: str) -> VariantConfig:
        """The variant that answers under a name. Of several, `who` always gets the same, by their weights.

        Raises:
            RequestError: 404, nothing answers to that name.
        """
        candidates = self._named(name)
        place = int.from_bytes(sha256(who.encode()).digest()[:8]) / 2**64 * sum(each.weight for each in candidates)
        for variant in candidates:
            place -= variant.weight
            if place < 0:
                return variant
        return candidates[-1]

    def chain(self, variant: VariantConfig) -> list[VariantConfig]:
        """A variant, the one that it falls back on, and so on."""
        found = [variant]
        by_name = {each.name: each for each in self._variants}
        while (name := found[-1].fallback) is not None:
            if by_name[name].deployment in {each.deployment for each in found}:
                break
            found.append(by_name[name])
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """All that `model` may say."""
        return tuple(self._names)

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models, registered models first."""
        names = sorted(self._names, key=lambda name: name not in {variant.model for variant in self._variants})
        return [self.card(name) for name in names]

    def card(self, name: str) -> dict[str, Any]:
        """One entry of /v1/models.

        Raises:
            RequestError: 404.
        """
        variant = self._named(name)[0]
        version = f"{variant.model}/{variant.version}"
        return model_card(name, self._created[variant.name], variant.name, version, variant.adapter_of)

    def _named(self, name: str) -> list[VariantConfig]:
        if name not in self._names:
            known = ", ".join(self._names)
            raise RequestError(
                404, f"there is no model {name[:200]!r} here; there are {known}", "model_not_found", "model"
            )
        return self._names[name]


def version_gone(name: str) -> RequestError:
    """For who named one version, where another version's replica would answer: versions change at this moment."""
    return RequestError(404, f"model {name!r} is no longer here: another version took over", "model_not_found", "model")


def _created(variant: VariantConfig) -> int:
    """When the model was made; without lineage, when it was first served."""
    try:
        return int(datetime.fromisoformat(lineage.read(variant.uri).created_at).timestamp())
    except (ModelError, StorageError):
        return int(time.time())
