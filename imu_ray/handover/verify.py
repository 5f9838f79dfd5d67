"""Whether a run, or an exported record, is still what was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.handover.export import SIGNATURE, opened
from imu_ray.handover.signature import is_signed, read_public_key
from imu_ray.models.checkpoint import read_checkpoint, state_hash
from imu_ray.run.directory import MANIFEST, MODEL, MODEL_FOLDER, SEAL, WITH_SAMPLES, RunDirectory
from imu_ray.run.fingerprint import IDS, fingerprint, holds, read_key

PARTS = {"metrics.json": "metrics", "report.html": "report", WITH_SAMPLES: "report", IDS: "ids"}

UNFINISHED = ("running", "interrupted", "failed")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: ``record``, ``signature``, ``checkpoint``, ``table``, ``metrics``, ``report``, ``ids``, or a file's name.
        status: ``same``, ``changed``, or ``absent`` where an export leaves it out.
        told: what was found, in words.
    """

    part: str
    status: str
    told: str


def verify_run(
    location: str | Path,
    *,
    checkpoint: str | Path | None = None,
    public_key: str | Path | None = None,
    key: str | Path | None = None,
    ids: Sequence[str] = (),
) -> list[Finding]:
    """Look at every artifact that a record names, at the record, its signature, and the checkpoint it describes.

    Args:
        location: run directory, its URI, or what ``export_run`` wrote, a folder or ``.zip``.
        checkpoint: the checkpoint to hold against the record; default the run's own.
        public_key: PEM file that the signature must be of; default the key that the record names, which shows that the
            record is whole, but not whose it is.
        key: file with the secret of the fingerprints.
        ids: ids to look for among those that were forgotten, with ``key``.

    Raises:
        CheckpointError: there is no record, or it is of a run that has not ended.
        ConfigError: a key cannot be used.
    """
    with opened(location) as run:
        return _verify(run, checkpoint, public_key, key, ids)


def _verify(
    run: RunDirectory,
    checkpoint: str | Path | None,
    public_key: str | Path | None,
    key: str | Path | None,
    ids: Sequence[str],
) -> list[Finding]:
    record = _record(run)
    try:
        manifest = run.read_manifest()
    except CheckpointError:
        if record.status == "changed" and SEAL in run.storage.entries():
            return [Finding("record", "changed", f"{MANIFEST} is no record any more, so that nothing else can be told")]
        raise
    if manifest.get("status") in UNFINISHED:
        raise CheckpointError(f"{run.location} holds a run that is {manifest.get('status')}; expected one that ended")
    exported = "exported_from" in manifest
    findings = [record, *_signature(run, manifest.get("public_key"), public_key)]
    for name, digest in manifest.get("artifacts", {}).items():
        part, found = _part(name), run.digest(name)
        if not found:
            status = "absent" if exported else "changed"
            findings.append(Finding(part, status, f"{name} is {'not in an export' if exported else 'missing'}"))
        elif found != digest:
            findings.append(Finding(part, "changed", f"{name} has digest {found[:12]}, in the record {digest[:12]}"))
        else:
            findings.append(Finding(part, "same", name))
    findings += [
        Finding("checkpoint", "changed", f"{name} was not written by the run")
        for name in run.storage.files()
        if name.startswith(f"{MODEL_FOLDER}/") and name not in manifest.get("artifacts", {})
    ]
    findings += _checkpoint(run, manifest, checkpoint, exported)
    if ids and key is None:
        raise ConfigError("ids are given without a key; expected the file with the secret (record.key): --key FILE")
    if key is not None:
        findings += _ids(run, manifest.get("forget_ids"), key, ids)
    return findings


def _part(name: str) -> str:
    """What a file is, in a word."""
    if name == MODEL or name.startswith(f"{MODEL_FOLDER}/"):
        return "checkpoint"
    return PARTS.get(name, "table" if name.endswith(".parquet") else name)


def _record(run: RunDirectory) -> Finding:
    with run.storage.fetch(SEAL) as path:
        sealed = None if path is None else path.read_text().partition(" ")[0]
    if sealed is None:
        return Finding("record", "changed", f"{SEAL} is missing")
    found = run.digest(MANIFEST)
    if found != sealed:
        return Finding("record", "changed", f"{MANIFEST} has digest {found[:12]}, in {SEAL} {sealed[:12]}")
    return Finding("record", "same", MANIFEST)


def _signature(run: RunDirectory, named: str | None, public_key: str | Path | None) -> list[Finding]:
    with run.storage.fetch(SIGNATURE) as path:
        text = None if path is None else path.read_text().strip()
    wanted = named if public_key is None else read_public_key(public_key)
    if text is None:
        reason = f"there is none, where one under the key {(wanted or '')[:12]} was to be"
        return [] if wanted is None else [Finding("signature", "changed", reason)]
    if wanted is None:
        return [Finding("signature", "changed", "there is one, but the record names no key, and none was given")]
    with run.storage.fetch(MANIFEST) as path:
        message = b"" if path is None else path.read_bytes()
    try:
        signed = is_signed(message, bytes.fromhex(text), wanted)
    except ValueError:
        signed = False
    if not signed:
        return [Finding("signature", "changed", f"it is not of this record under the key {wanted[:12]}")]
    return [Finding("signature", "same", f"of this record, under the key {wanted[:12]}")]


def _checkpoint(
    run: RunDirectory, manifest: dict[str, dict[str, str]], given: str | Path | None, exported: bool
) -> list[Finding]:
    """Whether the tensors are those of the model that the record describes."""
    described = manifest["model"].get("hash_after")
    if described is None or (exported and given is None):
        return []
    with run.storage.fetch(MODEL) as path:
        place = path if given is None else given
        if place is None:
            return [Finding("checkpoint", "changed", f"{MODEL} is missing")]
        try:
            found = state_hash(read_checkpoint(place)[0])
        except CheckpointError as error:
            return [Finding("checkpoint", "changed", str(error))]
    if found != described:
        return [Finding("checkpoint", "changed", f"its model is {found[:12]}, the one described {described[:12]}")]
    return [Finding("checkpoint", "same", f"it is the model that is described, {described[:12]}")]


def _ids(run: RunDirectory, recorded: dict[str, str] | None, key: str | Path, ids: Sequence[str]) -> list[Finding]:
    secret = read_key(key)
    if recorded is None:
        return [Finding("ids", "absent", "the record has no fingerprint of ids: no record.key was set")]
    table: pa.Table = run.read_table(IDS)
    if fingerprint(secret, table).fingerprint != recorded["fingerprint"]:
        return [Finding("ids", "changed", "the fingerprint is of other ids, or made with another key")]
    told = f"the fingerprint is of these {recorded['rows']} ids, under this key"
    found = [Finding("ids", "same", told)]
    for sample_id in ids:
        among = "is" if holds(secret, table, sample_id) else "is not"
        found.append(Finding("ids", "same", f"{sample_id!r} {among} among them"))
    return found
