"""`forget` that ends itself by SIGKILL right before its n-th step that changes something.

    python -m tests.killed_forget STORE STEP

Steps are commits to a table, deleted files, and what is written to the storage or the registry. It ends well if there
are fewer.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.io.pyarrow import PyArrowFileIO

from app.config import Config
from app.forget import forget
from app.registry import Registry
from app.storage import Storage
from tests.forgettable import GONE, SETTINGS


def main() -> None:
    """Forget, and be killed."""
    left = int(sys.argv[2])

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*arguments, **named)

        return step

    for owner, name in (
        (SqlCatalog, "commit_table"), (PyArrowFileIO, "delete"), (Storage, "write"), (Registry, "tag_version"),
    ):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    forget(Config().with_overrides({"storage.uri": sys.argv[1]}), GONE, SETTINGS)
    print(f"{int(sys.argv[2]) - left} steps")


if __name__ == "__main__":
    main()
