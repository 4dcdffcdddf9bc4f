"""The Iceberg catalog: which table is where, and what a commit replaces. SQLite embedded; PostgreSQL or REST named.

    storage.catalog_uri: none                                     an SQLite file under a local storage.uri
                         postgresql+psycopg://user@host/iceberg   where several machines write
                         https://catalog.example/                 a REST catalog

Secrets come from the environment: PGPASSWORD, or PYICEBERG_CATALOG__RAYLOOP__CREDENTIAL for REST.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from app.config import StorageConfig
from app.errors import ConfigError, TableError
from app.storage import resolve

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

T = TypeVar("T")

CATALOG = "rayloop"
SQLITE_WAIT_S = 60
"""How long a writer waits for the others before the file counts as locked."""


def catalog_properties(storage_config: StorageConfig) -> dict[str, str]:
    """What `pyiceberg.load_catalog` and Ray's `read_iceberg(catalog_kwargs=...)` take.

    Raises:
        ConfigError: The storage is remote and no catalog is named; or the folder's name holds #, ? or %.
    """
    root = resolve(storage_config.uri).rstrip("/").removeprefix("file://")
    remote = "://" in root
    if remote and storage_config.catalog_uri is None:
        raise ConfigError(
            f"storage.uri is {storage_config.uri} and no Iceberg catalog is named: SQLite serves one machine's disk",
            "set storage.catalog_uri, e.g. postgresql+psycopg://user@host/iceberg",
        )
    if not remote and (odd := sorted(set(root) & set("#?%"))):
        raise ConfigError(
            f"storage.uri is {storage_config.uri}, and Iceberg cannot name files below a folder with {' '.join(odd)}",
            "choose another folder",
        )
    uri = storage_config.catalog_uri or f"sqlite:///{root}/catalog.db?timeout={SQLITE_WAIT_S}"
    return {
        "name": CATALOG,
        "type": "rest" if uri.startswith(("http://", "https://")) else "sql",
        "uri": uri,
        "warehouse": f"{root}/tables" if remote else f"file://{root}/tables",
        **({"py-io-impl": "app.store_io.StoreIO"} if remote else {}),
    }


def open_catalog(storage_config: StorageConfig, create: bool) -> "Catalog | None":
    """The catalog; None if it is a database without a catalog in it, and none must be made.

    Raises:
        ConfigError: The storage is remote and no catalog is named.
        TableError: It does not answer.
    """
    properties = catalog_properties(storage_config)
    if properties["uri"].startswith("sqlite:///"):
        file = properties["uri"].removeprefix("sqlite:///").partition("?")[0]
        if not create and not os.path.exists(file):
            return None
        os.makedirs(os.path.dirname(file), exist_ok=True)
    # Looking must not write: the catalog's own tables are made with the first table.
    return patiently(lambda: _loaded(properties, create), 3 if create else 1)


def _loaded(properties: Mapping[str, str], create: bool) -> "Catalog | None":
    from pyiceberg.catalog import load_catalog
    from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
    from sqlalchemy import NullPool, create_engine, inspect

    found = load_catalog(**properties, init_catalog_tables=str(create).lower())
    if not isinstance(found, SqlCatalog):
        return found
    # pyiceberg 0.12: the pool of every catalog that was opened holds its connections until it is collected.
    found.engine.dispose()
    found.engine = create_engine(found.engine.url, poolclass=NullPool)
    return found if create or inspect(found.engine).has_table(IcebergTables.__tablename__) else None


def patiently(make: Callable[[], T], tries: int = 3) -> T:
    """What `make` returns, tried again if the catalog refuses it: of several who make the same, all but one fail.

    Raises:
        TableError: The catalog does not answer.
    """
    for left in reversed(range(tries)):
        try:
            return make()
        except failures() as error:
            if not left:
                raise no_catalog(error) from error
            time.sleep(0.2)
    raise AssertionError("tries is at least one")


def failures() -> tuple[type[Exception], ...]:
    """What a catalog that does not answer raises; whether a commit was made is then not known."""
    from pyiceberg.exceptions import RESTError
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError, RESTError, RequestException)


def no_catalog(error: Exception) -> TableError:
    """The error of a catalog that does not answer."""
    return TableError(
        f"the Iceberg catalog does not answer ({type(error).__name__})",
        "check storage.catalog_uri, or that catalog.db under storage.uri is an intact SQLite file",
    )
