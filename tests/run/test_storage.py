"""Local directories and object stores behave alike."""

import os
import stat
from pathlib import Path

import pytest
from pyarrow import fs

from imu_ray import CheckpointError
from imu_ray.run.storage import PART, LocalStorage, open_storage


@pytest.fixture(params=["path", "file URI", "s3"])
def storage(request, tmp_path):
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_uri"))
    return open_storage(tmp_path / "run" if request.param == "path" else f"file://{tmp_path}/run")


def test_what_is_written_is_read_back_and_listed(storage):
    assert storage.entries() == []
    storage.write("manifest.json", lambda path: path.write_text("one"))
    storage.write("state/ascent", lambda path: path.write_text("two"))
    storage.write("manifest.json", lambda path: path.write_text("three"))
    assert sorted(storage.entries()) == ["manifest.json", "state"]
    with storage.fetch("manifest.json") as path:
        assert path.read_text() == "three"
    with storage.fetch("state/ascent") as path:
        assert path.read_text() == "two"
    with storage.fetch("state/none") as path:
        assert path is None


def test_a_write_that_fails_leaves_what_was_there(storage):
    storage.write("state/ascent", lambda path: path.write_text("good"))

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        storage.write("state/ascent", fail)
    with storage.fetch("state/ascent") as path:
        assert path.read_text() == "good"
    listing = storage.filesystem.get_file_info(fs.FileSelector(storage.root, recursive=True))
    assert not [entry for entry in listing if PART in entry.base_name]


def test_an_interrupt_as_soon_as_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    touch = Path.touch

    def interrupted(path, **options):
        touch(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LocalStorage(tmp_path).write("state/a", lambda path: path.write_text("new"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_removed_folder_is_gone_and_removing_nothing_is_no_error(storage):
    storage.write("state/ascent", lambda path: path.write_text("one"))
    storage.write("kept", lambda path: path.write_text("two"))
    storage.remove("state")
    storage.remove("state")
    assert storage.entries() == ["kept"]


def test_only_the_owner_reads_local_files(tmp_path):
    storage = open_storage(tmp_path / "run")
    storage.write("state/ascent", lambda path: path.write_text("one"))
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("run", "run/state", "run/state/ascent")]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("uri", ["ftp://host/path", "s4://bucket/path"])
def test_a_uri_that_nothing_serves_is_refused(uri):
    with pytest.raises(CheckpointError, match="expected an absolute path or a URI"):
        open_storage(uri)


def test_a_place_that_cannot_be_made_is_refused(tmp_path, s3_uri):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_storage(tmp_path / "file" / "run").check_writable()
    with pytest.raises(CheckpointError, match="cannot be written"):
        open_storage(s3_uri.replace("bucket", "no-such-bucket")).check_writable()


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("a\0b", "null byte")])
def test_a_path_that_no_file_system_takes_is_refused(name, reason, tmp_path):
    with pytest.raises(CheckpointError, match=f"cannot be made: .*{reason}"):
        open_storage(tmp_path / name).check_writable()
