"""Private keys in files: PEM PKCS#8, one key a file, readable by its owner alone.

Member, broker and user signing keys are Ed25519 (RFC 8032). The file's mode is checked on the opened file, so that a
file swapped after the check is not read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from policies.errors import UnusableKey

KEY_FILE_LIMIT = 16 * 1024
"""Bytes; an Ed25519 key in PEM is 119."""


def write_secret(path: Path, content: bytes) -> None:
    """Write `content` to `path` with mode 0600, whole or not at all (temporary file, fsync, rename)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_secret(path: Path, limit: int = KEY_FILE_LIMIT) -> bytes:
    """Return the content of a secret file, at most `limit` bytes.

    Raises UnusableKey if the file is missing, not a regular file, larger than `limit`, not ours, or open to others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnusableKey(
            f"the key file cannot be opened: {error.strerror}", where=str(path), do="Name the file that holds the key."
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableKey("this is not a regular file", where=str(path), do="Name the file that holds the key.")
        if status.st_mode & 0o077:
            raise UnusableKey(
                f"others may read this key (mode {stat.S_IMODE(status.st_mode):04o})",
                where=str(path),
                do=f"Run `chmod 600 {path}`; if others had access to it, replace the key.",
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise UnusableKey("this key belongs to another user", where=str(path), do="Copy it to a file of your own.")
        if status.st_size > limit:
            raise UnusableKey("this is too large to be a key", where=str(path), do="Name the file that holds the key.")
        return os.read(descriptor, limit)
    finally:
        os.close(descriptor)


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """Return `key` as PEM PKCS#8, unencrypted: for a file of mode 0600 only."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def generate_ed25519(path: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 key and keep it at `path` (mode 0600). Raises UnusableKey rather than overwrite a file."""
    if path.exists():
        raise UnusableKey(
            "there is a file already", where=str(path), do="Choose another name, or move the old key away."
        )
    key = Ed25519PrivateKey.generate()
    write_secret(path, private_pem(key))
    return key


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in `path`.

    Raises UnusableKey if the file cannot be used (see `read_secret`) or holds anything but one Ed25519 key.
    """
    raw = read_secret(path)
    try:
        key = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UnusableKey(
            "this is not an unencrypted private key in PEM", where=str(path), do="Make one with `seal charter key`."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UnusableKey("this key is not Ed25519", where=str(path), do="Make one with `seal charter key`.")
    return key


def public_pem(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Return the public half in PEM (SubjectPublicKeyInfo)."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def load_public_pem(text: str) -> Ed25519PublicKey:
    """Return the Ed25519 public key in `text`. Raises ValueError if it holds anything else, or in another form."""
    try:
        key = load_pem_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("not a public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 public key")
    if public_pem(key) != text:
        raise ValueError("PEM in another form than its own (spaces, comments or trailing bytes)")
    return key


def fingerprint(public_key_pem: str) -> str:
    """Return the SHA-256 of the raw 32 bytes of an Ed25519 key as hex: what people compare by telephone."""
    raw = load_public_pem(public_key_pem).public_bytes(Encoding.Raw, PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()
