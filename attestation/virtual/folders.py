"""Reading and writing the virtual platform's folders: bounded, and whole (keys: `policies.keys`)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from asn1crypto import pem

from attestation.errors import PlatformUnusable

MAX_DOCUMENT = 1 << 20


def read_bounded(path: Path, limit: int = MAX_DOCUMENT) -> bytes:
    """Return all bytes of a file, opened once. Raises PlatformUnusable if it is missing or larger than `limit`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise PlatformUnusable(
            f"{path.name} cannot be read: {(error.strerror or 'unknown error').lower()}",
            where=str(path),
            do="Check the path.",
        ) from error
    if len(data) > limit:
        raise PlatformUnusable(f"{path.name} is larger than {limit} bytes", where=str(path), do="Check the path.")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside the target first, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def armor(kind: str, der: bytes) -> bytes:
    """Return the PEM text of a DER object (`kind` is what its BEGIN line says)."""
    text: bytes = pem.armor(kind, der)
    return text


def unarmor(kind: str, text: bytes) -> bytes:
    """Return the DER of the one PEM object in `text`. Raises PlatformUnusable if it is none, or of another kind.

    Done without a certificate parser: libraries warn about the serial number zero that every VCEK has.
    """
    try:
        found, _, der = pem.unarmor(text)
    except ValueError as error:
        raise PlatformUnusable(f"this is no PEM file of a {kind.lower()}", where=kind, do="Create it again.") from error
    if found != kind:
        raise PlatformUnusable(f"this is a {found.lower()}, not a {kind.lower()}", where=kind, do="Create it again.")
    data: bytes = der
    return data
