"""Accepted conversations as columns."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.conversation import MESSAGES
from app.ingestion.imputation import Imputer
from app.ingestion.quality import Conversation
from app.ingestion.vectorised import ROWS

ACCEPTED = pa.schema([*ROWS, ("imputed", pa.list_(pa.string())), ("masked", pa.int32())])


def table_of(conversations: Sequence[Conversation]) -> pa.Table:
    """Conversations as rows of `ACCEPTED`."""
    columns = [
        messages_of(conversations)
        if field.name == "messages"
        else pa.array([getattr(entry, field.name) for entry in conversations], field.type)
        for field in ACCEPTED
    ]
    return pa.table(columns, schema=ACCEPTED)


def messages_of(conversations: Sequence[Conversation]) -> pa.Array:
    """The messages of all conversations as one column; much faster than Arrow's way from a list of dicts."""
    messages = [message for conversation in conversations for message in conversation.messages]
    ends = np.cumsum([0, *(len(conversation.messages) for conversation in conversations)])
    fields = [
        pa.array([message["role"] for message in messages], pa.string()),
        pa.array([message["content"] for message in messages], pa.string()),
        pa.array([message.get("intent") for message in messages], pa.string()),
    ]
    struct = pa.StructArray.from_arrays(fields, fields=list(MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), struct)


def filled(rows: pa.Table, imputer: Imputer, arrived: pa.ChunkedArray) -> tuple[pa.Table, np.ndarray]:
    """Rows with what `imputer` fills in whatever the text is, and which rows need nothing else filled in.

    Args:
        rows: `ACCEPTED` rows without the columns `imputed` and `masked`.
        imputer: What it does record by record, this does to the same effect.
        arrived: (rows,) timestamps: when each was written, null where that is not known.

    Returns:
        The rows with the column `imputed`, and (rows,) bool: False for one that `imputer` has to look at itself.
    """
    settings = imputer.settings
    lacks = {
        "channel": (pc.equal(rows["channel"], "unknown"), settings.channel),
        "language": (pc.is_null(rows["language"]), settings.languages[0] if len(settings.languages) == 1 else None),
        "started_at": (
            pc.and_(pc.is_null(rows["started_at"]), pc.is_valid(arrived)), arrived if settings.started_at else None,
        ),
    }  # fmt: skip
    flags = {}
    for name, (lacking, value) in lacks.items():
        if value is not None:
            kind = rows[name].type
            known = value.cast(kind) if isinstance(value, pa.ChunkedArray) else pa.scalar(value, kind)
            column = pc.if_else(lacking, known, rows[name])
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
            flags[name] = lacking
    right = np.ones(rows.num_rows, bool)
    if len(settings.languages) > 1:
        right &= ~lacks["language"][0].to_numpy()
    if imputer.intent_model is not None:
        right &= pc.is_valid(rows["intent"]).to_numpy()
    return rows.append_column("imputed", _names(flags, rows.num_rows)), right


def _names(flags: Mapping[str, pa.ChunkedArray], count: int) -> pa.Array:
    """For each row, the names of the flags that are set in it."""
    names = np.array([*flags], dtype=object)
    marked = (
        np.stack([flag.to_numpy().astype(bool) for flag in flags.values()], axis=1) if flags else np.empty((count, 0))
    )
    ends = np.concatenate([[0], np.cumsum(marked.sum(axis=1, dtype=np.int32))])
    chosen = np.broadcast_to(names, marked.shape)[marked.astype(bool)]
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(chosen, pa.string()))


def documents(messages: pa.ListArray) -> pa.Array:
    """The text of each conversation, a line a message: what is compared and checked."""
    contents = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(messages.value_lengths().fill_null(0))]), pa.int32()),
        messages.flatten().field("content"),
    )
    return pc.binary_join(contents, "\n")
