"""Why the bot said this: the chain behind one answer, as text and as JSON in the last line.

python -m jobs.why chatcmpl-... --config jobs/configs/demo.yaml
"""

import argparse
import json
import sys

from app.config import load
from app.errors import RayloopError
from app.storage import Storage
from app.why import as_text, why


def main(arguments: list[str] | None = None) -> int:
    """Print the chain; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.why", allow_abbrev=False)
    parser.add_argument("response_id", help="`id` of an answer")
    parser.add_argument("--config", required=True, metavar="F", help="YAML file, see jobs/configs/")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="replace one setting")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config, options.set)
        chain = why(Storage(config.serving.storage_uri or config.storage.uri), options.response_id)
    except RayloopError as error:
        print(f"why: {error}", file=sys.stderr)
        return error.exit_code
    print(as_text(chain))
    print(json.dumps(chain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
