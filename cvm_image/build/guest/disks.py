"""Init-data as the host passes them in: a small raw disk with a header of its own."""

from __future__ import annotations

import struct
from pathlib import Path

from . import system

MAGIC = b"SEALINIT"
HEADER = struct.Struct(">8sI")
MAX_INIT_DATA = 64 * 1024


def find_disk(serial: str) -> Path:
    """The device of the disk with this serial. Raises ValueError if the host attached none."""
    found = system.disks_by_serial().get(serial)
    if found is None:
        raise ValueError(f"the host attached no disk with the serial {serial}")
    return found


def read_init_data(path: Path) -> bytes:
    """Read init-data from the disk or file at `path`: magic, length (big-endian), bytes; the rest must be zero.

    Raises ValueError for another form: HOST_DATA binds the bytes, so there is one way to read them.
    """
    with path.open("rb") as file:
        raw = file.read(HEADER.size + MAX_INIT_DATA + 512)
    if len(raw) < HEADER.size:
        raise ValueError("the init-data disk is too short")
    magic, length = HEADER.unpack_from(raw)
    if magic != MAGIC or not 0 < length <= MAX_INIT_DATA or len(raw) < HEADER.size + length:
        raise ValueError("the init-data disk does not hold init-data")
    if any(raw[HEADER.size + length :]):
        raise ValueError("something follows the init-data on their disk")
    return raw[HEADER.size : HEADER.size + length]


def write_init_data(content: bytes) -> bytes:
    """The raw disk that carries `content`: whole sectors. Raises ValueError if it is empty or too large."""
    if not 0 < len(content) <= MAX_INIT_DATA:
        raise ValueError(f"init-data have 1 to {MAX_INIT_DATA} bytes, not {len(content)}")
    raw = HEADER.pack(MAGIC, len(content)) + content
    return raw + bytes(-len(raw) % 512)
