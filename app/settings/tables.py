"""`versions`, `maintenance`, `export` and `forget`: what is done with tables besides adding rows to them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.settings.section import Count, Natural, Positive, Section

TagName = Annotated[str, Field(pattern=r"^[0-9]*[a-z._-][a-z0-9._-]*$", max_length=64)]
"""Not digits alone, which would be a snapshot id."""
VersionRef = int | str
"""A snapshot id or a tag."""


class VersionsConfig(Section):
    """Versions of a table: list, tag, go back, compare."""

    action: Literal["list", "tag", "delete_tag", "rollback", "diff"] = "list"
    """What `jobs.versions` does."""
    table: str | None = None
    """Table, as namespace.name; none: `ingestion.table`."""
    version: VersionRef | None = None
    """Version to tag, to go back to or to compare; none: the newest."""
    tag: TagName | None = None
    """Tag to set or delete: small letters, digits, dot, underscore, hyphen."""
    move: bool = False
    """Whether a tag that names another version already is moved."""
    old: VersionRef | None = None
    """diff: version to compare with; none: the one that `version` was made from."""

    @model_validator(mode="after")
    def _complete(self) -> "VersionsConfig":
        if self.action in ("tag", "delete_tag") and self.tag is None:
            raise ValueError(f"{self.action} needs `tag`")
        if self.action == "rollback" and self.version is None:
            raise ValueError("rollback needs `version`, a snapshot id or a tag")
        return self


class MaintenanceConfig(Section):
    """Small files, old versions and files that no version needs."""

    tables: tuple[str, ...] = ()
    """Tables, as namespace.name; none: `ingestion.table` and `ingestion.quarantine_table`."""
    steps: tuple[Literal["compact", "expire", "orphans"], ...] = ("compact", "expire", "orphans")
    """What `jobs.maintain` does, in this order."""
    target_file_bytes: Count = 128 << 20
    """Size that small data files are put together to; one of less than three quarters of it is small."""
    min_small_files: Annotated[int, Field(ge=2)] = 8
    """Fewer small files are left as they are."""
    expire_days: Positive = 30.0
    """Age from which a version may go, unless a tag, a model version or `keep_versions` holds it."""
    keep_versions: Natural = 10
    """Newest versions that stay, whatever their age."""
    orphan_hours: Positive = 24.0
    """Age from which a file that no version needs is removed. It must be longer than any ingest takes."""


class ExportConfig(Section):
    """A table version, or a model version, as plain files."""

    what: Literal["table", "model", "adapter"] = "table"
    """model: the folder of `inputs.model_version`, adapters merged in; adapter: its adapters alone, see
    `training.method`. The settings below but `uri` are of tables."""
    uri: str | None = None
    """Folder to write to, empty or not there: local (relative to RAYLOOP_HOME), s3://, gs://, abfs:// or hdfs://; none:
    one of its own under exports/ in `storage.uri`."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """jsonl is what ingestion reads as it is."""
    table: str | None = None
    """Table, as namespace.name; none: `ingestion.table`."""
    version: VersionRef | None = None
    """Snapshot id or tag; none: the newest."""
    columns: tuple[str, ...] = ()
    """Columns to write; none: all in Parquet, those of a conversation record in JSONL."""
    shard_bytes: Count = 256 << 20
    """A file is ended when it has this size."""

    @model_validator(mode="after")
    def _of_tables(self) -> "ExportConfig":
        given = sorted(self.model_fields_set & {"format", "table", "version", "columns", "shard_bytes"})
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.what != "table" and changed:
            raise ValueError(f"what={self.what} copies a model's files as they are: leave out {', '.join(changed)}")
        return self


class ForgetConfig(Section):
    """Conversations that are to be gone from every version."""

    ids_uri: str | None = None
    """File with one conversation id a line. They are not given here, since settings are written into receipts."""
