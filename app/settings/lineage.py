"""`lineage`: where catalogues of data are told what each job read and wrote."""

from urllib.parse import urlsplit

from pydantic import field_validator

from app.settings.section import Section


class LineageConfig(Section):
    """OpenLineage events of every job that runs."""

    openlineage_uri: str | None = None
    """Where they go: http(s)://host[:port][/path] of a server that takes `POST api/v1/lineage` (a key for it in
    OPENLINEAGE_API_KEY), or a local file that lines are added to (relative to RAYLOOP_HOME); none: nowhere."""
    namespace: str = "rayloop"
    """Namespace of the jobs."""

    @field_validator("openlineage_uri")
    @classmethod
    def _reachable(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        address = urlsplit(uri)
        if "://" in uri and address.scheme not in ("http", "https", "file"):
            raise ValueError("it is http://, https://, file:// or a local path")
        if address.scheme in ("http", "https") and not address.hostname:
            raise ValueError("it names no host")
        if address.username is not None or address.query:
            raise ValueError("it must hold no secret: put the server's key into OPENLINEAGE_API_KEY")
        return uri
