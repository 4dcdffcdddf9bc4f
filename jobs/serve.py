"""Serve the champion: an OpenAI-compatible chatbot with a page to talk to it.

python -m jobs.serve --config jobs/configs/demo.yaml
"""

import json
import os
import sys
from typing import Any

from app.config import Config
from app.errors import ConfigError, RayloopError, RegistryError
from app.job import Job, Outcome
from app.settings.serving import LIVE_DEPLOYMENTS, ServingConfig, VariantConfig
from app.storage import Storage, resolve
from app.versions import ModelVersion, as_json, digest

HAPROXY_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")


def inputs(config: Config) -> dict[str, Any]:
    """The variants the configuration names, else the version of `inputs.model_version`, else the champion."""
    from app.registry import Registry

    if config.serving.variants:
        found = []
        for variant in config.serving.variants:
            if not variant.uri:
                named = Registry(config.with_overrides({"registry.model": variant.model})).version(variant.version)
                variant = variant.model_copy(update={"uri": named.uri})
            found.append(variant.model_dump(mode="json"))
        return {"variants": found}
    registry = Registry(config)
    champion = registry.alias("champion")
    chosen = registry.version(config.inputs.model_version) if config.inputs.model_version else champion
    if chosen is None:
        raise RegistryError(
            f"model {config.registry.model} has no champion", "run jobs.evaluate first, or name inputs.model_version"
        )
    return {"model": as_json(chosen), "champion": chosen == champion}


def serving(config: Config, inputs: dict[str, Any]) -> ServingConfig:
    """The serving section with its blanks filled in: where traffic goes, and what `inputs` found."""
    if "variants" in inputs:
        variants = tuple(VariantConfig.model_validate(variant) for variant in inputs["variants"])
    else:
        variants = (_variant(ModelVersion(**inputs["model"]), inputs["champion"]),)
    return config.serving.model_copy(
        update={
            "variants": tuple(variant.model_copy(update={"uri": resolve(variant.uri)}) for variant in variants),
            "storage_uri": resolve(config.serving.storage_uri or config.storage.uri),
        }
    )


def _variant(version: ModelVersion, champion: bool) -> VariantConfig:
    name = "champion" if champion else f"version-{version.version}"
    return VariantConfig(name=name, model=version.model, version=version.version, uri=version.uri)


def _check(settings: ServingConfig) -> None:
    """Refuse what cannot be served before anything is deployed."""
    from app import adapter
    from app.model import check_folder
    from app.storage import local_folder

    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and settings.host not in HAPROXY_HOSTS:
        raise ConfigError(
            f"serving.host={settings.host}: HAProxy calls the replicas of its node at 127.0.0.1, and they would listen "
            "on that address alone",
            "set 127.0.0.1, or 0.0.0.0 for all of the machine's, or start Ray with RAY_SERVE_ENABLE_HA_PROXY=0",
        )
    for variant in settings.variants:
        if variant.adapter_of is None:
            with local_folder(variant.uri) as folder:
                check_folder(folder)
                for adapted in settings.adapters(variant):
                    with local_folder(adapter.located(adapted.uri)) as beside:
                        adapter.check_folder(beside)
                        adapter.check_base(_version(adapted), beside, _version(variant))
                        adapter.check_fit(beside, folder)
                        adapter.check_tokenizer(beside, folder)


def _version(variant: VariantConfig) -> ModelVersion:
    return ModelVersion(variant.model, variant.version, variant.uri)


def application(config: Config, inputs: dict[str, Any], code_uri: str) -> dict[str, Any]:
    """The application as Serve's configuration has it."""
    settings = serving(config, inputs)
    return {
        "name": config.serving.application,
        "route_prefix": "/",
        "import_path": "app.serving.application:build_app",
        "runtime_env": {"working_dir": code_uri},
        "args": settings.at_start().model_dump(mode="json"),
        # What may change without new replicas.
        "deployments": [{"name": name, "user_config": settings.live()} for name in LIVE_DEPLOYMENTS],
    }


def run(config: Config, inputs: dict[str, Any]) -> Outcome:
    """Check the models, see to a key, deploy, and wait until the application answers."""
    from app.deployment import deploy, package_code, replicas
    from app.serving.access import ensure_key

    settings = serving(config, inputs)
    _check(settings)
    if key := ensure_key(Storage(settings.storage_uri)):
        print(f"An API key was made. It is shown this once and kept only as a hash:\n\n    {key}\n", flush=True)
    wanted = application(config, inputs, package_code(Storage(config.storage.uri)))
    for change in changes(_running(config), wanted):
        print(f"changes {change}", flush=True)
    address = {"host": settings.host, "port": settings.port}
    seconds = deploy(wanted, address, settings.deploy_timeout_s)
    url = f"http://{settings.host}:{settings.port}"
    print(f"The chatbot answers at {url}/v1, and its page is {url}", flush=True)
    return Outcome(
        outputs={
            "url": url,
            "variants": [variant.model_dump(mode="json") for variant in settings.variants],
            "deployed": _fingerprint(wanted),
        },
        figures={"replicas": len(replicas(settings.application)), "seconds_to_ready": round(seconds, 2)},
    )


def plan(config: Config, inputs: dict[str, Any]) -> dict[str, Any]:
    """The models and their sizes, and what would be deployed where."""
    from app import adapter
    from app.model import weights_bytes
    from app.storage import local_folder

    settings = serving(config, inputs)
    _check(settings)
    reads = {}
    for variant in settings.variants:
        place = adapter.located(variant.uri) if variant.adapter_of else variant.uri
        with local_folder(place) as folder:
            reads[place] = {"weights_bytes": weights_bytes(folder)}
    storage = Storage(config.storage.uri)
    return {
        "reads": reads,
        "writes": {"code": storage.uri("code"), "keys and traffic": settings.storage_uri},
        "deploys": application(config, inputs, storage.uri("code", "<digest>.zip")),
    }


def changes(before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
    """What one deployment takes the place of in another, a setting a line; nothing where none runs yet.

    Of a variant that comes or goes only the version is told.
    """
    if before is None:
        return []
    old, new = _settings(before), _settings(after)
    sides = [{one["name"] for one in application["args"].get("variants", ())} for application in (before, after)]
    moved = tuple(f"serving.{kind}.{one}." for one in sides[0] ^ sides[1] for kind in ("variants", "weights"))
    names = [
        name
        for name in {**old, **new}
        if old.get(name) != new.get(name) and (not f"{name}.".startswith(moved) or name.endswith(".version"))
    ]
    return [f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in names]


def _settings(application: dict[str, Any]) -> dict[str, Any]:
    """Each setting by its name, such as serving.variants.champion.version; and where the code is."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            value = {one["name"]: one for one in value}
        if isinstance(value, dict):
            for key, one in value.items():
                note(f"{name}.{key}", one)
        else:
            found[name] = value

    # What runs may have been deployed by other means, such as serve.yaml, and say less.
    note("serving", application["args"])
    for deployment in application.get("deployments") or ():
        note("serving", deployment.get("user_config") or {})
    return found | {"code": (application.get("runtime_env") or {}).get("working_dir")}


def _running(config: Config) -> dict[str, Any] | None:
    """The application as it runs now; none where it does not, or nobody can say."""
    from app.deployment import deployed

    try:
        running = deployed(config.serving.application)
        return running and {**running, "args": running.get("args") or {}}
    except RayloopError:
        return None


def still_there(config: Config, outputs: dict[str, Any]) -> bool:
    """Whether the application runs exactly as it was deployed."""
    running = _running(config)
    return running is not None and _fingerprint(running) == outputs["deployed"]


def _fingerprint(application: dict[str, Any]) -> str:
    return digest([application[part] for part in ("import_path", "runtime_env", "args", "deployments")])


JOB = Job(
    stage="serve",
    run=run,
    inputs=inputs,
    plan=plan,
    sections=("storage", "registry", "serving"),
    packages=("serving",),
    still_there=still_there,
)

if __name__ == "__main__":
    sys.exit(JOB.main())
