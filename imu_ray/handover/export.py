"""The record of a run to hand on: manifest, figures and report, without the table of samples and without an id."""

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imu_ray.errors import CheckpointError
from imu_ray.handover.signature import read_private_key
from imu_ray.run.directory import MANIFEST, RunDirectory
from imu_ray.run.fingerprint import IDS

SIGNATURE = "manifest.sig"
HANDED_ON = ("metrics.json", "report.html", IDS)


def export_run(location: str | Path, out: str | Path, sign_key: str | Path | None = None) -> Path:
    """Write what may leave of a finished run: its record, ``metrics.json``, ``report.html`` and fingerprints of ids.

    The record names no sample (``without_ids``). It lists the digests of all artifacts, of those that stay too, so
    that a signature covers them.

    Args:
        location: run directory or its URI.
        out: a new folder, or a ``.zip`` file.
        sign_key: Ed25519 private key (PEM) that the record is signed with; the public key stands in the record.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the run has not ended, or ``out`` is there.
        ConfigError: the key cannot be used.
    """
    run, out = RunDirectory(location), Path(out).absolute()
    manifest = run.read_manifest()
    if manifest.get("status") != "complete":
        raise CheckpointError(f"{run.location} holds a run that is {manifest.get('status')}; expected one that ended")
    if out.exists():
        raise CheckpointError(f"{out} is there; expected a new folder or .zip file")
    record = without_ids(manifest) | {"exported_from": run.digest(MANIFEST)}
    key = None if sign_key is None else read_private_key(sign_key)
    if key is not None:
        record["public_key"] = key.public_key().public_bytes_raw().hex()
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out.parent) as made:
        folder = RunDirectory(Path(made) / "record")
        folder.write_text(MANIFEST, text)
        folder.seal()
        for name in HANDED_ON:
            with run.storage.fetch(name) as path:
                if path is not None:
                    folder.write(name, lambda target, path=path: shutil.copyfile(path, target))  # type: ignore[misc]
        if key is not None:
            folder.write_text(SIGNATURE, key.sign(text.encode()).hex() + "\n")
        place = Path(made) / "record"
        if out.suffix == ".zip":
            place = _zipped(place)
        place.replace(out)
    return out


@contextlib.contextmanager
def opened(location: str | Path) -> Iterator[RunDirectory]:
    """A run directory, its URI, or what ``export_run`` wrote, a folder or ``.zip``.

    Raises:
        CheckpointError: the archive cannot be read.
    """
    if not str(location).endswith(".zip"):
        yield RunDirectory(location)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(location) as archive:
                for name in archive.namelist():
                    (Path(folder) / Path(name).name).write_bytes(archive.read(name))  # an export has no folders
        except (OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{location} cannot be read: {error}; expected what imu-ray export wrote") from None
        yield RunDirectory(folder)


def without_ids(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without ids (its settings name none), and without that by which samples or ids can be guessed.

    Of bad rows the reasons stay. Digests that were made without a key go, and a condition on columns.
    """
    record = json.loads(json.dumps(manifest))
    record["config"]["forget_set"].pop("where", None)
    record.pop("inputs", None)
    forget = record.get("forget_set") or {}
    forget.pop("fingerprint", None)
    for samples in filter(None, [forget, *record.get("evaluation", {}).values()]):
        samples["bad_rows"] = [{"reason": row["reason"]} for row in samples["bad_rows"]]
        for name in ("ids_digest", "where"):
            (samples.get("selection") or {}).pop(name, None)
    if record.get("influence"):
        record["influence"].pop("ids", None)
    return record  # type: ignore[no-any-return]


def _zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in sorted(folder.iterdir()):
            archive.write(each, each.name)
    path.chmod(0o600)
    return path
