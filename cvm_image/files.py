"""Reading an image folder's files and its builder's key, bounded, with an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.evidence.launch import MAX_CMDLINE, MAX_FIRMWARE, MAX_INITRD, MAX_KERNEL
from cvm_image.errors import UnusableImage
from policies.keys import load_public_pem


class Measured(TypedDict):
    """The bytes that the launch measurement is made of."""

    firmware: bytes
    kernel: bytes
    initrd: bytes
    cmdline: bytes


def read_measured(folder: Path) -> Measured:
    """Return the measured files of an image folder. Raises UnusableImage if one is missing or too large."""
    return Measured(
        firmware=read_file(folder / "firmware.fd", MAX_FIRMWARE),
        kernel=read_file(folder / "kernel", MAX_KERNEL),
        initrd=read_file(folder / "initrd", MAX_INITRD),
        cmdline=read_file(folder / "cmdline", MAX_CMDLINE),
    )


def read_file(path: Path, limit: int) -> bytes:
    """Return the bytes of a file, at most `limit`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        reason = (error.strerror or "unknown error").lower()
        raise UnusableImage(f"{path.name} cannot be read: {reason}", where=str(path), do="Check the path.") from error
    if len(data) > limit:
        raise UnusableImage(f"{path.name} is larger than {limit} bytes", where=str(path), do="Check the path.")
    return data


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Return the Ed25519 public key in a PEM file. Raises UnusableImage for anything else."""
    try:
        return load_public_pem(read_file(path, 16384).decode("ascii"))
    except ValueError as error:
        raise UnusableImage(
            f"this is no builder's public key: {error}", where=str(path), do="Give an Ed25519 public key in PEM."
        ) from error
