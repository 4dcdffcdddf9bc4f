"""Every error an operator can meet, and the exit code it ends a job with.

    RayloopError                 exit 1
    ├── ConfigError              exit 2   the configuration is wrong
    ├── ClusterError                      no cluster, or not enough of one
    ├── StorageError                      a location that cannot be read or written
    ├── SourceError                       a source that is missing or unreadable
    │   └── SourceUnavailable             ... and may be back soon
    ├── TableError                        a table or table version that is not there
    │   └── TableNotFound                 ... the table as a whole
    ├── RegistryError                     a model version or alias that is not there
    ├── ResponseNotFound                  an id that no answer carries
    ├── AccessError                       an API key that is not there, or cannot become what was asked
    ├── ModelError                        a model folder that cannot be loaded safely
    ├── StageRefused                      a stage did its work and its gate said no
    ├── StageFailed                       a stage could not do its work
    │   └── TableChanged                  ... since another writer was faster; it can be tried again
    └── RequestError             an HTTP status, a code and the offending parameter

Each class hands every constructor argument, positionally, to `Exception.__init__`, and builds its
sentence in `__str__`: an error that crosses a process boundary is pickled by its arguments, and one
that cannot be rebuilt reaches the caller as something else.
"""


class RayloopError(Exception):
    """What happened, with the value; and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}" if self.remedy else self.what


class ConfigError(RayloopError):
    """One or more settings are wrong; all of them are listed."""

    exit_code = 2


class ClusterError(RayloopError):
    """The Ray cluster is missing, or cannot hold what was asked of it."""


class StorageError(RayloopError):
    """A location under the storage root cannot be read or written."""


class SourceError(RayloopError):
    """An ingestion source is missing or unreadable."""


class SourceUnavailable(SourceError):
    """A source does not answer; trying again may help."""


class TableError(RayloopError):
    """A table, or a version of it, does not exist or is damaged."""


class TableNotFound(TableError):
    """There is no table of that name; or no catalog yet."""


class RegistryError(RayloopError):
    """A run, model version or alias does not exist."""


class ResponseNotFound(RayloopError):
    """No answer with that id was ever given."""


class AccessError(RayloopError):
    """An API key does not exist, or is not in the state that was asked for."""


class ModelError(RayloopError):
    """A model folder is missing, damaged, or not safe to load."""


class StageFailed(RayloopError):
    """A stage could not do its work."""


class TableChanged(StageFailed):
    """Another writer changed a table meanwhile; what was to be added was not."""


class TableFilesGone(TableChanged):
    """Files of a table were removed meanwhile, by maintenance or for good; what was to be added was not."""


class StageRefused(RayloopError):
    """A stage did its work and its gate refused the result; `figures` say by how much."""

    def __init__(self, what: str, remedy: str = "", figures: dict[str, object] | None = None) -> None:
        super().__init__(what, remedy)
        self.args = (what, remedy, figures)
        self.figures = figures or {}


class RequestError(RayloopError):
    """A request that is refused, in OpenAI's terms: status, type, code and parameter."""

    def __init__(self, status: int, what: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(what)
        self.args = (status, what, code, param)
        self.status = status
        self.code = code
        self.param = param
