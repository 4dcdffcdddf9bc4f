"""A model version as plain files in any folder that `app.storage` opens, or its adapters alone.

    <uri>/config.json model.safetensors ...    what transformers, vLLM and the like load; `adapter/` where it has one
    <uri>/adapter_model.safetensors ...        of `export.what` adapter: what peft loads beside the base it names
    <uri>/_SUCCESS                             JSON, written last: the version, and of each file bytes and SHA-256

A folder without `_SUCCESS` holds an export that did not end; running it again replaces it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from app import adapter
from app.config import Config
from app.errors import ModelError, StorageError
from app.export import DONE
from app.registry import Registry
from app.storage import Storage, local_folder
from app.tables import sync_file
from app.versions import ModelVersion

_BEGUN = "_BEGUN"
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelExport:
    """What `_SUCCESS` says."""

    model: str
    version: str
    what: Literal["model", "adapter"]
    files: list[ExportedFile]


def planned(config: Config) -> tuple[ModelVersion, Storage]:
    """The version and the folder that the settings come to.

    Raises:
        RegistryError: There is no such version.
        ModelError: Its adapters are asked for, and it has none.
    """
    version = Registry(config).version(config.inputs.model_version)
    what = config.export.what
    if what == "adapter" and not Storage(version.uri).exists(adapter.FOLDER):
        raise ModelError(f"{version} has no adapters", "export one that was trained with training.method=lora")
    own = f"exports/{version.model}/{version.version}-{what}"
    return version, Storage(config.export.uri or Storage(config.storage.uri).uri(own))


def export(config: Config) -> tuple[str, ModelExport, bool]:
    """Copy the files of a version.

    Returns:
        The folder's URI, what is in it, and whether it was written now: False if it was all there.

    Raises:
        As `planned`.
        StorageError: The folder holds something else or a damaged export, or cannot be written.
    """
    version, target = planned(config)
    what: Any = config.export.what
    there = read(target)
    if there is not None:
        if (there.model, there.version, there.what) != (version.model, version.version, what):
            raise StorageError(
                f"{target.root_uri} is not empty: it holds {there.what} {there.model}/{there.version}",
                "choose another folder, or empty it",
            )
        if wrong := check(target):
            raise StorageError(
                f"{target.root_uri} holds this export, but {', '.join(wrong)} is missing or not as {DONE} says",
                f"delete {DONE} there, and export again",
            )
        return target.root_uri, there, False
    if (names := target.list()) and _BEGUN not in names:
        raise StorageError(f"{target.root_uri} is not empty: it holds {names[0]}", "choose another folder, or empty it")
    target.write(b"", _BEGUN)
    with local_folder(version.uri) as folder:
        root = folder / adapter.FOLDER if what == "adapter" else folder
        files = [_copy(root, name, target) for name in _names(root)]
    done = ModelExport(version.model, version.version, what, files)
    target.write(json.dumps(asdict(done), indent=2).encode(), DONE)
    target.filesystem.delete_file(target.path(_BEGUN))
    return target.root_uri, done, True


def read(target: Storage) -> ModelExport | None:
    """What a folder's `_SUCCESS` says, none where there is none.

    Raises:
        StorageError: It is damaged, or of something else.
    """
    if not target.exists(DONE):
        return None
    try:
        content = json.loads(target.read(DONE))
        return ModelExport(**content | {"files": [ExportedFile(**file) for file in content["files"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{target.uri(DONE)} is not of a model's export ({error})", "choose another folder"
        ) from error


def check(target: Storage) -> list[str]:
    """The files of an export that are missing or not as `_SUCCESS` says; empty if all is well.

    Raises:
        StorageError: There is no finished export.
    """
    done = read(target)
    if done is None:
        raise StorageError(f"{target.root_uri} holds no finished export", "run jobs.export")
    return [file.name for file in done.files if not target.exists(file.name) or _sum(target, file) != file.sha256]


def _names(root: Path) -> Iterator[str]:
    yield from sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _copy(root: Path, name: str, target: Storage) -> ExportedFile:
    path = target.path(name)
    found, size = hashlib.sha256(), 0
    try:
        target.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with (root / name).open("rb") as source, target.filesystem.open_output_stream(path, compression=None) as sink:
            while chunk := source.read(_CHUNK_BYTES):
                sink.write(chunk)
                found.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise StorageError(
            f"cannot write {target.uri(name)} ({error})", "free some space or check permissions"
        ) from error
    if target.is_local:
        sync_file(path)
    return ExportedFile(name, size, found.hexdigest())


def _sum(target: Storage, file: ExportedFile) -> str:
    with target.filesystem.open_input_stream(target.path(file.name), compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
