"""API keys of the served application: make, list, rotate and revoke them. It follows within about two seconds.

python -m jobs.keys make --name shop --scopes chat,feedback --expires-in-days 90 --config jobs/configs/demo.yaml
python -m jobs.keys list --config jobs/configs/demo.yaml
python -m jobs.keys rotate shop --overlap-s 3600 --config jobs/configs/demo.yaml
python -m jobs.keys revoke shop --config jobs/configs/demo.yaml

A key is shown once, on a line of its own, and kept only as a hash. The last line is JSON and holds no key.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from typing import Any

from app.config import load
from app.errors import ConfigError, RayloopError
from app.serving import keys
from app.serving.keys import SCOPES, StoredKey
from app.storage import Storage

MOST_S = 36_500 * 86_400


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked, and say what was done; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        config = load(options.config, options.set)
        storage = Storage(config.serving.storage_uri or config.storage.uri)
        told = {"make": _make, "list": _list, "rotate": _rotate, "revoke": _revoke}[options.action](storage, options)
    except RayloopError as error:
        print(f"keys: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"action": options.action, "keys": [_public(key) for key in told]}))
    return 0


def _make(storage: Storage, options: argparse.Namespace) -> Sequence[StoredKey]:
    scopes = [scope.strip() for scope in options.scopes.split(",") if scope.strip()]
    days = options.expires_in_days
    life = None if days is None else _span("--expires-in-days", days, 86_400)
    limits = options.requests_per_minute, options.tokens_per_minute
    made = keys.change(storage, lambda ring: ring.with_new(_now(), options.name, scopes, life, *limits))
    _show(made.key)
    return [made.stored]


def _list(storage: Storage, options: argparse.Namespace) -> Sequence[StoredKey]:
    ring = keys.read(storage)
    found = ring.keys if ring else ()
    rows = [
        ("id", "name", "scopes", "state", "expires", "requests/min", "tokens/min"),
        *(
            (key.id, key.name, ",".join(key.scopes), key.state(_now()), key.expires_at or "never", *_limits(key))
            for key in found
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return found


def _rotate(storage: Storage, options: argparse.Namespace) -> Sequence[StoredKey]:
    overlap = _span("--overlap-s", options.overlap_s, 1)
    made = keys.change(storage, lambda ring: ring.rotated(_now(), options.which, overlap))
    _show(made.key)
    assert made.replaces
    print(f"The key {made.replaces.id} is taken for {options.overlap_s:g} s more, unless it ends before.")
    return [made.stored]


def _revoke(storage: Storage, options: argparse.Namespace) -> Sequence[StoredKey]:
    revoked = keys.change(storage, lambda ring: ring.revoked(_now(), options.which))
    for key in revoked:
        print(f"The key {key.id} of {key.name} is revoked.")
    if not revoked:
        print(f"The key {options.which} was revoked before.")
    after = keys.read(storage)
    return [key for key in after.keys if key.id in {one.id for one in revoked}] if after else []


def _span(option: str, value: float, unit_s: float) -> datetime.timedelta:
    """A time that an option names, of up to a hundred years."""
    if not 0 <= value * unit_s <= MOST_S:
        raise ConfigError(f"{option} {value:g} cannot be", f"give 0 to {MOST_S / unit_s:.0f}")
    return datetime.timedelta(seconds=value * unit_s)


def _limits(key: StoredKey) -> tuple[str, str]:
    """As they are listed; one that the key has none of is the configuration's."""
    return str(key.requests_per_minute or "default"), str(key.tokens_per_minute or "default")


def _show(made: str) -> None:
    print(f"An API key was made. It is shown this once and kept only as a hash:\n\n    {made}\n", flush=True)


def _public(key: StoredKey) -> dict[str, Any]:
    shown = ("id", "name", "scopes", "created_at", "expires_at", "revoked_at")
    limits = ("requests_per_minute", "tokens_per_minute")
    return {"state": key.state(_now()), **{field: getattr(key, field) for field in (*shown, *limits)}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.keys", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    made = _action(actions, "make", "make a key and show it")
    made.add_argument("--name", required=True, help="who is to have it")
    made.add_argument("--scopes", default=",".join(SCOPES), metavar="S,S", help=f"some of {','.join(SCOPES)}; all")
    made.add_argument("--expires-in-days", type=float, metavar="N", help="else it does not expire")
    made.add_argument("--requests-per-minute", type=int, metavar="N", help="else serving.requests_per_minute")
    made.add_argument("--tokens-per-minute", type=int, metavar="N", help="else serving.tokens_per_minute")
    _action(actions, "list", "list the keys, without the keys themselves")
    rotated = _action(actions, "rotate", "make a key that takes the place of another")
    rotated.add_argument("which", metavar="NAME_OR_ID")
    rotated.add_argument("--overlap-s", type=float, default=86_400, metavar="S", help="how long both are taken")
    revoked = _action(actions, "revoke", "take a key away at once; with a name, all keys of that name")
    revoked.add_argument("which", metavar="NAME_OR_ID")
    return parser


def _action(actions: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=what, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="F", help="YAML file, see jobs/configs/")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="replace one setting")
    return parser


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
