"""Fingerprints of the ids to forget, which only who has the key can make: HMAC-SHA256 (RFC 2104)."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from imu_ray.errors import ConfigError
from imu_ray.run.record import IdsRecord

IDS = "forget_ids.parquet"
LEAST = 16  # bytes of a key


def read_key(path: str | Path) -> bytes:
    """The secret that a file holds, without white space around it.

    Raises:
        ConfigError: it cannot be read, or is too short to be one.
    """
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"record.key {path} cannot be read: {error.strerror}; expected a file with a secret"
        ) from None
    if len(key) < LEAST:
        raise ConfigError(
            f"record.key {path} holds {len(key)} bytes; expected {LEAST} at least, because ids can be guessed: "
            "openssl rand -hex 32 makes one"
        )
    return key


def id_hmac(key: bytes, sample_id: str) -> bytes:
    """The fingerprint of one id, 32 bytes."""
    return hmac.digest(key, sample_id.encode(), hashlib.sha256)


def fingerprint_table(key: bytes, ids: Iterable[str]) -> pa.Table:
    """The fingerprints of all ids, ``hmac``, sorted: their order says nothing of that of the rows."""
    hmacs = pa.array((id_hmac(key, sample_id) for sample_id in ids), pa.binary(32))
    return pa.table({"hmac": hmacs.take(pc.sort_indices(hmacs))})


def fingerprint(key: bytes, table: pa.Table) -> IdsRecord:
    """The fingerprint of a set of ids, from those of the single ones."""
    whole = hmac.new(key, digestmod=hashlib.sha256)
    for value in table["hmac"].to_pylist():
        whole.update(value)
    return IdsRecord(rows=len(table), fingerprint=whole.hexdigest())


def holds(key: bytes, table: pa.Table, sample_id: str) -> bool:
    """Whether an id is among those of the table."""
    return bool(pc.is_in(pa.scalar(id_hmac(key, sample_id), pa.binary(32)), table["hmac"].combine_chunks()).as_py())
