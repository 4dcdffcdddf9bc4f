"""Why the bot said this: answer -> variant -> model version -> run -> table version -> sources.

python -m jobs.why <response-id> --config F        or        GET /v1/why/<response-id>
"""

import dataclasses
from typing import Any

from app import lineage, traffic
from app.errors import ModelError, ResponseNotFound, StorageError
from app.storage import Storage


def why(storage: Storage, response_id: str) -> dict[str, Any]:
    """The chain behind an answer, outermost first, from the traffic log and the model folder's lineage alone.

    Where the model folder can no longer tell, `model.missing` says why and the chain ends there.

    Raises:
        ResponseNotFound: No such response was ever given.
        StorageError: The traffic log cannot be read.
    """
    exchange, feedback = traffic.find(storage, response_id)
    if exchange is None:
        raise ResponseNotFound(
            f"there is no response {response_id!r} in {storage.uri('traffic')}",
            "give the `id` of a response that this service answered",
        )
    chain: dict[str, Any] = {
        "response_id": exchange.response_id,
        "answer": {
            "received_at": exchange.received_at,
            "question": exchange.messages[-1]["content"] if exchange.messages else "",
            "reply": exchange.reply,
            "intent": exchange.intent,
            "intent_confidence": exchange.intent_confidence,
            "reply_confidence": exchange.reply_confidence,
            "handover": exchange.handover,
            "status": exchange.status,
        },
        "feedback": [
            {name: value for name, value in dataclasses.asdict(given).items() if name != "response_id"}
            for given in feedback
        ],
        "variant": exchange.variant,
        "model": {"version": exchange.model_version, "uri": exchange.model_uri},
    }
    try:
        origin = lineage.read(exchange.model_uri)
    except (ModelError, StorageError) as error:
        chain["model"]["missing"] = str(error)
        return chain
    parent = "trained_from" if origin.stage == "train" and origin.parent else "compressed_from"
    chain["model"] |= {"stage": origin.stage, parent: origin.parent}
    chain["run"] = {
        "run_id": origin.run_id,
        "job_id": origin.job_id,
        "created_at": origin.created_at,
        "config_digest": origin.config_digest,
        "code_version": origin.code_version,
    }
    chain["table"] = {"table": origin.table, "snapshot_id": origin.snapshot_id}
    chain["sources"] = origin.sources
    return chain


def as_text(chain: dict[str, Any], indent: str = "") -> str:
    """The chain as indented lines that a person reads from top to bottom."""
    lines = []
    for name, value in chain.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", as_text(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}{'' if value else '  none'}")
            lines += [f"{indent}  - {_inline(item)}" for item in value]
        else:
            lines.append(f"{indent}{name}  {'none' if value is None else value}")
    return "\n".join(lines)


def _inline(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return ", ".join(f"{name}: {value}" for name, value in item.items() if value is not None)
