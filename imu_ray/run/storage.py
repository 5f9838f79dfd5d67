"""Where a run keeps its files: a local (or mounted) directory, or a URI such as ``s3://bucket/path``.

Both write under a temporary name and rename, so that a reader never sees half a file.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from imu_ray.errors import CheckpointError
from imu_ray.run.lock import LOCK, NO_LOCKS, Claim, locked_folder

PART = ".part-"
PASSING = (PART, LOCK)  # names of what stands here only while something runs, or because it was killed


def open_storage(location: str | Path) -> "Storage":
    """The storage behind a path or a URI; ``CheckpointError`` when no file system serves the URI."""
    if "://" not in str(location):
        return LocalStorage(Path(location).absolute())
    try:
        filesystem, root = fs.FileSystem.from_uri(str(location))
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{location} cannot be opened ({error}); expected an absolute path or a URI that pyarrow reads (s3://, "
            "gs://, hdfs://, file://)"
        ) from None
    return LocalStorage(Path(root)) if isinstance(filesystem, fs.LocalFileSystem) else RemoteStorage(filesystem, root)


def open_folder(location: str | Path) -> tuple["LocalStorage | RemoteStorage", str]:
    """The storage of the folder that a single file is in, which may be of others too, and the file's name."""
    storage = open_storage(location)
    folder, _, name = storage.root.rpartition("/")
    if isinstance(storage, LocalStorage):
        return LocalStorage(Path(folder or "/"), private=False), name
    return RemoteStorage(storage.filesystem, folder), name


def below(location: str | Path, *names: str) -> str:
    """The location of something below a path or URI, before the URI's query."""
    path, mark, query = str(location).partition("?") if "://" in str(location) else (str(location), "", "")
    return "/".join([path.rstrip("/"), *names]) + mark + query


class LocalStorage:
    """Files by relative name below a directory.

    Directories have mode 0700 (one that is not ``private`` keeps its own) and files 0600: sample ids stand in them.
    """

    filesystem = fs.LocalFileSystem()

    def __init__(self, path: Path, private: bool = True) -> None:
        self.path, self.root, self.private = path, str(path), private

    def check_writable(self) -> None:
        """Refuse, with ``CheckpointError``, a place that cannot be made."""
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # too long a name, a null byte, a folder of someone else
            name, reason = str(self.path)[:80], error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"run_dir {name!r} cannot be made: {reason}; expected a path that can be") from None
        ancestor = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            reason = "not writable" if ancestor.is_dir() else "a file"
            why = f"{ancestor} is {reason}; expected a path under a writable directory"
            raise CheckpointError(f"run_dir {self.path} cannot be made: {why}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[threading.Event]:
        """Keep other runs out, by a file lock or, where there are none, a claim; the event is set when it is lost."""
        self.check_writable()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_folder(self.path))
                lost = threading.Event()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                lost = stack.enter_context(Claim(self.filesystem, self.root).held())
            yield lost

    def entries(self) -> list[str]:
        """Names directly below, without those of ``PASSING``; empty when there is no such place."""
        return _lasting(entry.name for entry in self.path.iterdir()) if self.path.exists() else []

    def files(self) -> list[str]:
        """Names of all files below, however deep."""
        found = (path for path in self.path.rglob("*") if path.is_file())
        return sorted(_lasting(path.relative_to(self.path).as_posix() for path in found))

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """``fill`` gets a temporary path next to the target; what it wrote appears under ``name`` when complete."""
        target = self.path / name
        self._make()
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Named before it is made, so that an interrupt at any moment finds it.
        temporary = target.parent / f"{PART}{uuid.uuid4().hex}"
        try:
            temporary.touch(mode=0o600, exist_ok=False)
            fill(temporary)
            temporary.chmod(0o600)
            _sync(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A temporary folder, from which a file is moved without being copied."""
        self._make()
        return tempfile.TemporaryDirectory(prefix=PART, dir=self.path)

    def _make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.private:
            self.path.chmod(0o700)  # also when it was made beforehand

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path | None]:
        """A path with the contents of ``name``, or None when there is no such file."""
        path = self.path / name
        yield path if path.is_file() else None

    def remove(self, name: str) -> None:
        """Remove a folder and all below it, if it is there."""
        shutil.rmtree(self.path / name, ignore_errors=True)


class RemoteStorage:
    """The same on a prefix of a file system that pyarrow reaches; who may read it is for the bucket's policy to say."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/")

    def check_writable(self) -> None:
        """Refuse a place where a file cannot be made and removed."""
        probe = f"{self.root}/{PART}probe"
        try:
            self.filesystem.create_dir(self.root)
            with self.filesystem.open_output_stream(probe):
                pass
            self.filesystem.delete_file(probe)
        except OSError as error:
            raise CheckpointError(
                f"run_dir {self.root} cannot be written: {error}; expected a URI and credentials with which every node "
                "can; check them"
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[threading.Event]:
        """Hold the prefix by a claim."""
        self.check_writable()
        with Claim(self.filesystem, self.root).held() as lost:
            yield lost

    def entries(self) -> list[str]:
        """Names directly below."""
        listing = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return _lasting(entry.base_name for entry in listing)

    def files(self) -> list[str]:
        """Names of all files below, however deep."""
        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=True)
        found = (entry.path for entry in self.filesystem.get_file_info(selector) if entry.type == fs.FileType.File)
        return sorted(_lasting(path[len(self.root) + 1 :] for path in found))

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Make the file here, upload it under a temporary name and move it."""
        target = f"{self.root}/{name}"
        folder, _, last = target.rpartition("/")
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / last
            path.touch(mode=0o600)
            fill(path)
            self.filesystem.create_dir(folder)
            # An upload that breaks off may leave a short object, so it is never made under the final name.
            part = f"{folder}/{PART}{os.path.basename(here)}-{last}"
            with path.open("rb") as source, self.filesystem.open_output_stream(part) as sink:
                shutil.copyfileobj(source, sink)
            self.filesystem.move(part, target)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A temporary folder here."""
        return tempfile.TemporaryDirectory()

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path | None]:
        """A downloaded copy."""
        path = f"{self.root}/{name}" if name else self.root
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            yield None
            return
        with tempfile.TemporaryDirectory() as here:
            copy = Path(here) / path.rpartition("/")[2]
            with self.filesystem.open_input_stream(path) as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            yield copy

    def remove(self, name: str) -> None:
        """Remove a folder."""
        with contextlib.suppress(OSError):
            self.filesystem.delete_dir(f"{self.root}/{name}")


Storage = LocalStorage | RemoteStorage


def _lasting(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.rpartition("/")[2].startswith(PASSING)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
