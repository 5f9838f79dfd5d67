"""Images that a table names by path, or holds as text."""

import base64
import binascii
import posixpath
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from imu_ray.data.source import reading
from imu_ray.errors import ForgetSetError

DATA_URI = "data:"


@dataclass(frozen=True)
class ImageFiles:
    """Files that the rows of a table name.

    Attributes:
        filesystem: where they are.
        folder: below which they are; paths are relative to it.
        anywhere: whether paths may lead out of it; so they are where a program, and not a file, lists them.
    """

    filesystem: fs.FileSystem
    folder: str
    anywhere: bool = False

    def of_cell(self, cell: Any, row: str) -> Any:
        """The bytes that a cell stands for: a path, ``data:...;base64,...``, or ``bytes`` or ``path`` in a mapping.

        ``row`` is what errors call its row.

        Raises:
            ForgetSetError: the path leads out of the folder, or cannot be read.
        """
        if isinstance(cell, dict):
            held = cell.get("bytes")
            if isinstance(held, str):
                return _decoded(held)
            return held if held is not None or not cell.get("path") else self._read(str(cell["path"]), row)
        if isinstance(cell, str):
            return _decoded(cell.partition(",")[2]) if cell.startswith(DATA_URI) else self._read(cell, row)
        return cell

    def _read(self, path: str, row: str) -> bytes:
        full = posixpath.normpath(posixpath.join(self.folder, path))
        if not (self.anywhere or full.startswith(f"{self.folder.rstrip('/')}/")):
            raise ForgetSetError(
                f"{row} names {path!r}, outside of {self.folder}; expected an image below "
                "it; put the list into the folder that holds the images"
            )
        with reading(f"{full}, the image of {row},", self.filesystem):
            with self.filesystem.open_input_stream(full) as stream:
                content: bytes = stream.read()
            return content


def _decoded(text: str) -> bytes:
    """Bytes from base64; none from what is not, so that the row is a bad one."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
