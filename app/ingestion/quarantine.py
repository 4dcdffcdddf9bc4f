"""The table of refused records."""

import pyarrow as pa

EXCERPT_CHARS = 1_000
"""What is kept of a refused record."""

QUARANTINE = pa.schema(
    [
        ("source", pa.string()),  # URI
        ("position", pa.int64()),  # of the record in the source: see app/ingestion/sources.py
        ("reason", pa.string()),  # the rule it breaks
        ("detail", pa.string()),  # where in the record; never its text
        ("raw", pa.string()),  # its beginning, personal data masked
        ("raw_bytes", pa.int64()),  # its whole length
        ("refusal_hash", pa.string()),  # of source, position, reason and content, 64 hex digits
        ("id_hash", pa.string()),  # of its conversation id, if it could be read: see app/conversation.py
    ]
)
