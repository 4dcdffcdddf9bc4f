"""How Iceberg reaches files: through the filesystems of everything else, with the same environment."""

from pyiceberg.io import FileIO, InputFile, OutputFile
from pyiceberg.io.pyarrow import PyArrowFile

from app.filesystems import open_uri

BUFFER_BYTES = 1 << 20


class StoreIO(FileIO):
    """pyiceberg's FileIO for `py-io-impl`: takes no address and no secret from a catalog's properties."""

    def new_input(self, location: str) -> PyArrowFile:
        """A file to read."""
        filesystem, path = open_uri(location)
        return PyArrowFile(location=location, path=path, fs=filesystem, buffer_size=BUFFER_BYTES)

    def new_output(self, location: str) -> PyArrowFile:
        """A file to write."""
        return self.new_input(location)

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: It is not there.
        """
        uri = location if isinstance(location, str) else location.location
        filesystem, path = open_uri(uri)
        filesystem.delete_file(path)
