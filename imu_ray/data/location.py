"""A path or URI, and the files that lie there."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from imu_ray.data.source import reading
from imu_ray.errors import ForgetSetError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PREVIEWS = "Thumbs.db"  # what Windows leaves in folders of images, those of Market-1501 among them


@dataclass(frozen=True)
class Location:
    """A file, or a folder and all files below it.

    Attributes:
        name: as the caller gave it.
        filesystem: where it is.
        path: on that file system.
        files: full paths in order; of a single file, its own.
    """

    name: str
    filesystem: fs.FileSystem
    path: str
    files: tuple[str, ...]

    @classmethod
    def open(cls, name: str, role: str) -> "Location":
        """List what lies at a path or URI; ``ForgetSetError`` when that is nothing."""
        _check_name(name)
        with reading(f"the {role} {name}"):
            local = (fs.LocalFileSystem(), str(Path(name).absolute()))
            filesystem, path = fs.FileSystem.from_uri(name) if "://" in name else local
        with reading(f"the {role} {name}", filesystem):
            kind = filesystem.get_file_info(path).type
            if kind == fs.FileType.NotFound:
                expected = "expected a file or a folder that is there; mend the path"
                raise ForgetSetError(f"the {role} {name} does not exist; {expected}")
            if kind == fs.FileType.File:
                return cls(name, filesystem, path, (path,))
            if isinstance(filesystem, fs.LocalFileSystem):
                return cls(name, filesystem, path, tuple(sorted(_below(path))))
            listing = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
            return cls(name, filesystem, path, tuple(sorted(entry.path for entry in listing if entry.is_file)))

    @property
    def is_local(self) -> bool:
        """Whether it is on a local or mounted path."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.files != (self.path,)

    def ending_in(self, *suffixes: str) -> list[str]:
        """Files with one of these suffixes, in whatever case."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    def images(self) -> list[str]:
        """Paths of the images below a local folder; any other file is refused, but for hidden ones."""
        found = []
        for path in (file[len(self.path) :].lstrip("/") for file in self.files):
            if path.lower().endswith(IMAGE_SUFFIXES):
                found.append(path)
            elif path.rpartition("/")[2] != PREVIEWS and not any(part.startswith(".") for part in path.split("/")):
                raise ForgetSetError(
                    f"{self.path}/{path} is no image that is read ({', '.join(IMAGE_SUFFIXES)}); expected images only, "
                    "so that no row is passed over; convert it or take it out"
                )
        return found


def _below(folder: str) -> Iterator[str]:
    """All files below a local folder; a link to a folder, and what would make its reader wait for ever, is refused."""
    if not os.path.isdir(folder):
        raise ForgetSetError(f"{folder} is a pipe, socket or device; expected a file or a folder; name another")
    with os.scandir(folder) as entries:
        for entry in entries:
            _check_name(entry.path)
            if entry.is_dir():
                if entry.is_symlink():
                    reason = "which is not followed; expected folders of files; copy or mount it"
                    raise ForgetSetError(f"{entry.path} is a link to a folder, {reason}")
                yield from _below(entry.path)
            elif entry.is_file():
                yield entry.path
            else:
                kind = "a pipe, socket, device or broken link"
                raise ForgetSetError(f"{entry.path} is {kind}; expected a file; remove it")


def _check_name(path: str) -> None:
    if "\0" in path or path.encode(errors="ignore").decode() != path:
        expected = "expected a name that can stand in the record; rename it"
        raise ForgetSetError(f"{path!r} is not UTF-8, or holds a NUL; {expected}")
