"""Object stores of the tests: moto for S3, gcp-storage-emulator for Google Cloud Storage, Azurite for Azure.

with stores.s3(tmp_path) as store:
    for name, value in store.environment.items(): monkeypatch.setenv(name, value)
    Storage(store.uri("a", "b"))           # s3://rayloop/a/b
"""

import contextlib
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.servers.running import free_port, installed, process

BUCKET = "rayloop"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, the same for everyone."""


@dataclass(frozen=True)
class Store:
    """A running store with one empty bucket."""

    root: str
    """URI of the bucket."""
    port: int
    environment: Mapping[str, str]
    """What a client has to have in its environment."""
    endpoint: str = ""
    """The variable of the environment that holds the address."""

    def uri(self, *parts: str) -> str:
        """Of something in the bucket."""
        return "/".join([self.root, *parts])

    def behind(self, port: int) -> "Store":
        """The same store as it is reached through a proxy."""
        return replace(self, environment={**self.environment, self.endpoint: f"http://127.0.0.1:{port}"})


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[Store]:
    """moto. It holds everything in memory."""
    port = free_port()
    command = [str(installed("s3") / "venv" / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with process(command, folder / "s3.log", [port]):
        there = b"<LocationConstraint>eu-central-1</LocationConstraint>"
        body = b"<CreateBucketConfiguration>" + there + b"</CreateBucketConfiguration>"
        made = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", data=body, method="PUT")
        urllib.request.urlopen(made, timeout=30).close()
        yield Store(f"s3://{BUCKET}", port, environment, "AWS_ENDPOINT_URL")


@contextlib.contextmanager
def gcs(folder: Path) -> Iterator[Store]:
    """gcp-storage-emulator, in memory."""
    port = free_port()
    program = str(installed("gcs") / "venv" / "bin" / "gcp-storage-emulator")
    command = [program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET]
    with process(command, folder / "gcs.log", [port]):
        environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
        yield Store(f"gs://{BUCKET}", port, environment, "STORAGE_EMULATOR_HOST")


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[Store]:
    """Azurite's blob service, in memory."""
    from pyarrow import fs

    port = free_port()
    command = [str(installed("azure") / "node_modules" / ".bin" / "azurite-blob"), "--blobHost", "127.0.0.1"]
    command += ["--blobPort", str(port), "--skipApiVersionCheck", "--inMemoryPersistence", "--silent"]
    environment = {
        "AZURE_STORAGE_ACCOUNT": AZURE_ACCOUNT,
        "AZURE_STORAGE_KEY": AZURE_KEY,
        "RAYLOOP_AZURE_ENDPOINT": f"http://127.0.0.1:{port}",
    }
    with process(command, folder / "azure.log", [port]):
        address = f"127.0.0.1:{port}"
        fs.AzureFileSystem(
            account_name=AZURE_ACCOUNT, account_key=AZURE_KEY,
            blob_storage_authority=address, blob_storage_scheme="http",
            dfs_storage_authority=address, dfs_storage_scheme="http",
        ).create_dir(BUCKET)  # fmt: skip
        yield Store(f"abfs://{BUCKET}", port, environment, "RAYLOOP_AZURE_ENDPOINT")


STORES: dict[str, Callable[[Path], AbstractContextManager[Store]]] = {"s3": s3, "gs": gcs, "abfs": azure}
