"""The header of a sealed volume, read strictly: LUKS2 as this project writes it, and no other.

The header lies on the host's disk, unauthenticated: a host may hand over one that names a null cipher, so that any key
opens it, or a cipher without integrity (CVE-2025-59054, CVE-2025-58356). So a guest copies the header into its own
memory once, checks the copy, and opens the volume with the copy alone. What can differ between two honest headers is
salts, digests and the wrapped key; the rest is fixed here. Source: LUKS2 On-Disk Format Specification 1.1.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from typing import Any, Final

from policies.errors import Refused

CIPHER: Final = "aegis128-random"
"""AEGIS-128 with a random IV of 128 bits for each sector that is written."""
CIPHER_KEY_BITS: Final = 128
SECTOR: Final = 4096
METADATA: Final = 16 * 1024
"""Bytes of one of the header's two copies; the JSON follows the first 4,096."""
KEYSLOTS: Final = 256 * 1024
HEADER: Final = 2 * METADATA + KEYSLOTS
"""Bytes of the two copies and the wrapped key."""
DATA_AT: Final = 1 << 20
"""Where the volume's data begin."""
ITERATIONS: Final = 1000
"""Of PBKDF2: what opens the volume is a random key of 256 bits, which needs no stretching."""

_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_MAGICS: Final = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
_CHECKSUM_AT: Final = 448
_JSON_AT: Final = 4096
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{40,96}={0,2}")


class HeaderRefused(Refused):
    """A header that is not one of ours."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the sealed volume's header is refused: {why}",
            where="vault",
            do="Bring back the disk as this guest left it; if it is lost, start the volume anew.",
        )


def check_header(raw: bytes) -> None:
    """Check the first HEADER bytes of a volume. Raises HeaderRefused with what is not as this project writes it."""
    if len(raw) != HEADER:
        raise HeaderRefused(f"{len(raw)} bytes instead of {HEADER}")
    first, second = (_copy(raw[number * METADATA :][:METADATA], number) for number in (0, 1))
    if first != second:
        raise HeaderRefused("its two copies differ")
    sequence, document = first
    if not 0 < sequence < 1 << 32:
        raise HeaderRefused("its sequence number is out of bounds")
    _check_document(document)


def _copy(raw: bytes, number: int) -> tuple[int, dict[str, Any]]:
    """Sequence number and metadata of one copy, its checksum seen to hold."""
    magic, version, size, sequence, _, algorithm, _, _, _, offset, _, digest = _BINARY.unpack_from(raw)
    if (magic, version) != (_MAGICS[number], 2):
        raise HeaderRefused("it is no LUKS2 header")
    if size != METADATA or offset != number * METADATA or algorithm.rstrip(b"\0") != b"sha256":
        raise HeaderRefused("it has another size, place or checksum")
    cleared = raw[:_CHECKSUM_AT] + bytes(64) + raw[_CHECKSUM_AT + 64 :]
    if digest != hashlib.sha256(cleared).digest().ljust(64, b"\0"):
        raise HeaderRefused("its checksum does not hold")
    text, _, rest = raw[_JSON_AT:].partition(b"\0")
    if rest.strip(b"\0"):
        raise HeaderRefused("something follows its metadata")
    try:
        document = json.loads(text, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError):
        raise HeaderRefused("its metadata are no JSON") from None
    if not isinstance(document, dict):
        raise HeaderRefused("its metadata are no object")
    return sequence, document


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


class _Base64:
    """Stands for a salt, or a digest: base64, bounded."""


class _Count:
    """Stands for a number of iterations that a guest can bear."""


_BYTES, _ROUNDS = _Base64(), _Count()
_EXPECTED: Final[dict[str, Any]] = {
    "keyslots": {
        "0": {
            "type": "luks2",
            "key_size": CIPHER_KEY_BITS // 8,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {
                "type": "raw",
                "offset": str(2 * METADATA),
                "size": str(64 * 1024),
                "encryption": "aes-xts-plain64",
                "key_size": 64,
            },
            "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": ITERATIONS, "salt": _BYTES},
        }
    },
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": str(DATA_AT),
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": CIPHER,
            "sector_size": SECTOR,
            "integrity": {"type": "aead", "journal_encryption": "none", "journal_integrity": "none"},
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2",
            "keyslots": ["0"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": _ROUNDS,
            "salt": _BYTES,
            "digest": _BYTES,
        }
    },
    "config": {"json_size": str(METADATA - _JSON_AT), "keyslots_size": str(KEYSLOTS)},
}


def _check_document(document: dict[str, Any]) -> None:
    _compare(document, _EXPECTED, "")


def _compare(found: Any, expected: Any, at: str) -> None:
    """Raise HeaderRefused, naming the place, where `found` is not what a header of ours has there."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            raise HeaderRefused(f"its fields at {at or 'the top'} are not {', '.join(expected) or 'none'}")
        for name, value in expected.items():
            _compare(found[name], value, f"{at}.{name}".strip("."))
    elif isinstance(expected, _Base64):
        if not isinstance(found, str) or not _BASE64.fullmatch(found):
            raise HeaderRefused(f"{at} is no base64 of its size")
    elif isinstance(expected, _Count):
        if type(found) is not int or not ITERATIONS <= found <= 10_000_000:
            raise HeaderRefused(f"{at} is out of bounds")
    elif type(found) is not type(expected) or found != expected:
        raise HeaderRefused(f"{at} is {json.dumps(found)[:80]}, not {json.dumps(expected)}")
