"""A guest's sealed volume: LUKS2 with authenticated encryption on a disk that its host lends.

It is opened only with a key that has come from brokers, and only with a header that was copied into memory and checked
there. A sector that the host changed does not read: the kernel says EIO. What the host can do unseen is to bring back
older sectors whole; whether the volume's content is the newest, its owner's brokers say (attestation.vaults).

The key goes to cryptsetup on its standard input, never as an argument or a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.luks_header import (
    CIPHER,
    CIPHER_KEY_BITS,
    DATA_AT,
    HEADER,
    ITERATIONS,
    KEYSLOTS,
    METADATA,
    SECTOR,
    check_header,
)
from policies.errors import Refused, Unusable

DISK: Final = "vault"
"""The serial of the disk, and the name of the volume that is opened on it."""
MOUNT_POINT: Final = Path("/run/vault")
KEY_SIZE: Final = 32
FORMAT_SECONDS: Final = 1800.0
"""Every sector is written once before the first use, so that each has a tag."""
OPEN_SECONDS: Final = 120.0

_CRYPTSETUP: Final = "/usr/sbin/cryptsetup"
_MKE2FS: Final = "/usr/sbin/mke2fs"
_MAPPED: Final = Path("/dev/mapper") / DISK
_HEADER_COPY: Final = Path("/run/vault.header")
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_WRONG_KEY: Final = 2


class VolumeRefused(Refused):
    """A sealed volume that does not open, or whose content was changed."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what, where=DISK, do="Bring back the disk as this guest left it; if it is lost, start the volume anew."
        )


@dataclass(frozen=True)
class SealedVolume:
    """An open volume. `close` before the guest powers off."""

    folder: Path
    """Where its file system is mounted."""

    def close(self) -> None:
        """Write everything out, unmount, and take the key out of the kernel. Raises VolumeRefused if it will not."""
        os.sync()
        if _libc().umount2(os.fsencode(self.folder), 0) != 0:
            raise VolumeRefused(f"the sealed volume cannot be unmounted: {os.strerror(ctypes.get_errno())}")
        _cryptsetup(["close", DISK], None, OPEN_SECONDS)
        _HEADER_COPY.unlink(missing_ok=True)


def format_volume(disk: Path, key: bytes) -> None:
    """Make a new volume on `disk` that `key` (32 bytes) opens, with an empty file system. What was there is lost.

    Raises VolumeRefused if the disk cannot be written, Unusable if it is too small.
    """
    line = ["luksFormat", "--type", "luks2", "--batch-mode", "--key-file", "-", "--cipher", CIPHER]
    line += ["--key-size", str(CIPHER_KEY_BITS), "--integrity", "aead", "--sector-size", str(SECTOR)]
    line += ["--hash", "sha256", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(ITERATIONS)]
    line += [
        "--offset",
        str(DATA_AT // 512),
        "--luks2-metadata-size",
        str(METADATA),
        "--luks2-keyslots-size",
        str(KEYSLOTS),
    ]
    if _size(disk) < 16 << 20:
        raise Unusable("the disk for the sealed volume is smaller than 16 MiB", where=DISK, do="Give a larger one.")
    _cryptsetup([*line, str(disk)], key, FORMAT_SECONDS)
    _open(disk, key)
    try:
        # No discard: it would drop the tags. The label's and directory's random parts come from the guest.
        _run([_MKE2FS, "-q", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=0", "-m", "0", str(_MAPPED)], None, 600.0)
    finally:
        _cryptsetup(["close", DISK], None, OPEN_SECONDS)


def open_volume(disk: Path, key: bytes, folder: Path = MOUNT_POINT) -> SealedVolume:
    """Open the volume on `disk` and mount it at `folder`, which is made.

    Raises HeaderRefused for a header that is not as `format_volume` makes it, VolumeRefused for a key that does not
    open it, and for content whose authentication fails.
    """
    _open(disk, key)
    folder.mkdir(mode=0o700, exist_ok=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if _libc().mount(os.fsencode(_MAPPED), os.fsencode(folder), b"ext4", flags, b"errors=remount-ro") != 0:
        number = ctypes.get_errno()
        _cryptsetup(["close", DISK], None, OPEN_SECONDS)
        raise VolumeRefused(f"the sealed volume does not mount, a block of it was changed: {os.strerror(number)}")
    return SealedVolume(folder)


@contextlib.contextmanager
def changed_blocks_refused() -> Iterator[None]:
    """Turn the kernel's EIO, met while the volume is read, into the sentence that says what it means."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise VolumeRefused(
            f"a block of the sealed volume was changed: its authentication fails ({error.filename or 'read'})"
        ) from error


def _open(disk: Path, key: bytes) -> None:
    with disk.open("rb") as file:
        header = file.read(HEADER)
    check_header(header)
    _HEADER_COPY.unlink(missing_ok=True)
    descriptor = os.open(_HEADER_COPY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(header)
    _cryptsetup(
        ["open", "--type", "luks2", "--key-file", "-", "--header", str(_HEADER_COPY), str(disk), DISK],
        key,
        OPEN_SECONDS,
    )


def _size(disk: Path) -> int:
    with disk.open("rb") as file:
        return file.seek(0, os.SEEK_END)


def _cryptsetup(words: Sequence[str], key: bytes | None, seconds: float) -> None:
    if key is not None and len(key) != KEY_SIZE:
        raise Unusable(f"a sealed volume's key has {KEY_SIZE} bytes, not {len(key)}", where=DISK, do="Deposit it anew.")
    Path("/run/cryptsetup").mkdir(mode=0o700, exist_ok=True)
    _run([_CRYPTSETUP, *words], key, seconds)


def _run(line: Sequence[str], key: bytes | None, seconds: float) -> None:
    what = f"{Path(line[0]).name} {line[1]}"
    environment = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C", "DM_DISABLE_UDEV": "1"}
    try:
        done = subprocess.run(
            line, input=key or b"", capture_output=True, timeout=seconds, check=False, env=environment
        )
    except FileNotFoundError:
        raise Unusable(f"this image has no {line[0]}", where=DISK, do="Use an image with sealed volumes.") from None
    except subprocess.TimeoutExpired:
        raise VolumeRefused(f"{what} took longer than {seconds:.0f} s") from None
    if done.returncode == _WRONG_KEY and key is not None:
        raise VolumeRefused("the sealed volume does not open with the key that was released for it")
    if done.returncode != 0:
        words = " ".join(done.stderr.decode(errors="replace").split())
        raise VolumeRefused(f"{what} failed with status {done.returncode}: {words[:300]}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
