"""Applications that do not come up, deployed by tests: `import_path: tests.broken:dying`."""

import os
import signal
from typing import Any
from unittest import mock

from ray import serve

from app.serving import application, language_model
from app.settings.serving import ServingConfig


class Dying(language_model.LanguageModel):
    """Its process is killed while the model is being loaded, as it is where memory runs out."""

    def __init__(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Unwell(language_model.LanguageModel):
    """Loads its model, and says that it is not well."""

    def check_health(self) -> None:
        raise RuntimeError("the model has forgotten everything")


def dying(args: ServingConfig) -> serve.Application:
    return _with(Dying, args)


def unwell(args: ServingConfig) -> serve.Application:
    return _with(Unwell, args)


def _with(kind: type, args: ServingConfig) -> serve.Application:
    with mock.patch.object(application, "LanguageModel", kind):
        return application.build_app(args)
