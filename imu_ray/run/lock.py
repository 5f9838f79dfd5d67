"""One run at a time in a place: a file lock where the operating system has them, else a claim that is renewed."""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from imu_ray.errors import CheckpointError
from imu_ray.events import event

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what a mount without file locks answers
# Seconds between renewals of a claim, and without one after which its run counts as dead.
RENEW_SECONDS, DEAD_SECONDS = 10.0, 45.0


def in_use(place: object, owner: str) -> CheckpointError:
    """The error for a place that another run holds."""
    return CheckpointError(
        f"run_dir {place} is in use by {owner}; expected one run at a time in a directory; wait until it has ended, or "
        "choose another"
    )


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` by a lock on a file in it, which the operating system releases however this process ends.

    It holds across hosts where the mount's file locks do (those of NFS do). Nothing is left that was not there before.

    Raises:
        CheckpointError: another run holds it.
        OSError: of ``NO_LOCKS``.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = _lock(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # of the first that is not empty
            for place in missing:
                place.rmdir()


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode()
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise in_use(path.parent, owner or "another run") from None
            path.unlink(missing_ok=True)
            raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _owner().encode())
            return descriptor
        os.close(descriptor)  # of a run that ended, and removed it, between the two calls


class Claim:
    """An object in ``root`` which says that a run works there, renewed by a thread as long as the run lives.

    Stores have no lock, and pyarrow has no conditional write. Every run therefore writes its claim first and lists the
    others after it, so that of two runs at least one sees the other, on any store that lists what was written (S3 and
    GCS do). Of two that begin together the later one gives up. No clocks are compared: a claim is alive if it changes
    while it is watched. One that does not for ``DEAD_SECONDS`` is that of a killed run and is removed. A run that could
    not renew its own for so long, or meets another that holds the place, has ``lost`` it and must write no more; a
    write that is under way at that moment is not called back.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem, self.root = filesystem, root
        self.name = f"{LOCK}-{time.time_ns():020d}-{uuid.uuid4().hex}"
        self.holds, self.renewals = False, 0
        self.lost, self.ended = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Hold the place; the event is set when it is lost. ``CheckpointError`` when another run holds it."""
        thread = threading.Thread(target=self._renew_until_ended, daemon=True)
        try:
            self._write()
            thread.start()
            for other in sorted(self._claims() - {self.name}):
                self._outlive(other)
            self.holds = True
            self._renew()
            if self.lost.is_set():
                raise in_use(self.root, "another run, which took this one for dead")
            yield self.lost
        finally:
            self.ended.set()
            if thread.ident is not None:
                thread.join()
            self._remove(self.name)

    def _outlive(self, other: str) -> None:
        """Wait until another claim is withdrawn, or is dead; ``CheckpointError`` when it is alive and comes first."""
        seen, since = self._read(other), time.monotonic()
        event("claimed by another run; waiting to see whether it is alive", run_dir=self.root, claim=seen)
        while time.monotonic() - since < DEAD_SECONDS:
            found = self._read(other)
            if found is None:
                return
            if found not in ("", seen):  # a file system may show a claim that is half written
                if other < self.name or found.startswith("holds"):
                    raise in_use(self.root, found.split(", ")[1])
                seen, since = found, time.monotonic()
            time.sleep(RENEW_SECONDS / 4)
        self._remove(other)

    def _renew_until_ended(self) -> None:
        renewed = time.monotonic()
        while not self.lost.is_set() and not self.ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # the network may come back in time
                self._renew()
                renewed = time.monotonic()
            if time.monotonic() - renewed > DEAD_SECONDS:
                self.lost.set()

    def _renew(self) -> None:
        claims = self._claims()
        others = [self._read(other) or "" for other in claims - {self.name}] if self.holds else []
        if self.name not in claims or any(other.startswith("holds") for other in others):
            self.lost.set()
        else:
            self._write()

    def _claims(self) -> set[str]:
        listing = self.filesystem.get_file_info(fs.FileSelector(self.root))
        return {entry.base_name for entry in listing if entry.base_name.startswith(f"{LOCK}-")}

    def _read(self, name: str) -> str | None:
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as file:
                return str(file.read().decode())
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self.renewals += 1
        with self.filesystem.open_output_stream(f"{self.root}/{self.name}") as file:
            file.write(f"{'holds' if self.holds else 'asks'}, {_owner()}, {self.renewals}".encode())

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.filesystem.delete_file(f"{self.root}/{name}")
