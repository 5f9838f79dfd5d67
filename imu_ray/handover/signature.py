"""Signatures of a record, Ed25519 (RFC 8032)."""

from pathlib import Path
from typing import Any

from imu_ray.errors import CheckpointError, ConfigError


def read_private_key(key_file: str | Path) -> Any:
    """An Ed25519 private key: PEM without a password (``openssl genpkey -algorithm ed25519``).

    Raises:
        ConfigError: the extra is not installed, or the file holds no such key.
    """
    kinds, serialization = _library()
    try:
        key = serialization.load_pem_private_key(Path(key_file).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the key {key_file} cannot be read ({error}); {EXPECTED}") from None
    if not isinstance(key, kinds.Ed25519PrivateKey):
        raise ConfigError(f"the key {key_file} is of kind {type(key).__name__}; {EXPECTED}")
    return key


def is_signed(message: bytes, signature: bytes, public_key: str) -> bool:
    """Whether a signature is of this message under a public key, in hex."""
    kinds, _ = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        kinds.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_public_key(path: str | Path) -> str:
    """A public key of a PEM file, in hex.

    Raises:
        CheckpointError: it holds none.
    """
    kinds, serialization = _library()
    try:
        key = serialization.load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the public key {path} cannot be read ({error}); expected PEM") from None
    if not isinstance(key, kinds.Ed25519PublicKey):
        raise CheckpointError(f"the public key {path} is of kind {type(key).__name__}; expected Ed25519")
    return str(key.public_bytes_raw().hex())


EXPECTED = "expected an Ed25519 private key in PEM: openssl genpkey -algorithm ed25519"


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need the extra: pip install imu-ray[sign]") from None
    return ed25519, serialization
