"""The header of a sealed volume: what cryptsetup wrote in a guest is taken, and nothing that a host makes of it."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.luks_header import HEADER, KEYSLOTS, METADATA, HeaderRefused, check_header

WRITTEN: dict[str, Any] = json.loads(
    """
{
  "keyslots": {
    "0": {
      "type": "luks2",
      "key_size": 16,
      "af": {
        "type": "luks1",
        "stripes": 4000,
        "hash": "sha256"
      },
      "area": {
        "type": "raw",
        "offset": "32768",
        "size": "65536",
        "encryption": "aes-xts-plain64",
        "key_size": 64
      },
      "kdf": {
        "type": "pbkdf2",
        "hash": "sha256",
        "iterations": 1000,
        "salt": "CmMp03sse6+mQlbcyIuNx2TRN1IXqG4tEW1zSJWKx9c="
      }
    }
  },
  "tokens": {},
  "segments": {
    "0": {
      "type": "crypt",
      "offset": "1048576",
      "size": "dynamic",
      "iv_tweak": "0",
      "encryption": "aegis128-random",
      "sector_size": 4096,
      "integrity": {
        "type": "aead",
        "journal_encryption": "none",
        "journal_integrity": "none"
      }
    }
  },
  "digests": {
    "0": {
      "type": "pbkdf2",
      "keyslots": [
        "0"
      ],
      "segments": [
        "0"
      ],
      "hash": "sha256",
      "iterations": 1000,
      "salt": "LktfYwYmqZ4BK1kqApOQgTDPd09NCdkT2duSstwqhyw=",
      "digest": "m95/udbK4PBsPVP8C6vuD95ypWZyQbc7bPM8KDhMxjA="
    }
  },
  "config": {
    "json_size": "12288",
    "keyslots_size": "262144"
  }
}
"""
)
"""What cryptsetup 2.7.5 wrote in a booted guest (`appliance.sealed_volume.format_volume`)."""


def header(document: dict[str, Any] | bytes, *, second: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """Both copies with this metadata and checksums that hold, and an area for the wrapped key."""
    copies = [_copy(document, 0, **fields), _copy(document if second is None else second, 1, **fields)]
    return b"".join(copies) + bytes(KEYSLOTS)


def _copy(document: dict[str, Any] | bytes, number: int, *, sequence: int = 3, version: int = 2) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document, separators=(",", ":")).encode()
    magic = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")[number]
    binary = struct.pack(
        ">6sHQQ48s32s64s40s48sQ184s64s",
        *(magic, version, METADATA, sequence, b"", b"sha256", b"s" * 64, b"uuid", b"", number * METADATA, b"", b""),
    )
    raw = binary.ljust(4096, b"\0") + text.ljust(METADATA - 4096, b"\0")
    digest = hashlib.sha256(raw).digest().ljust(64, b"\0")
    return raw[:448] + digest + raw[512:]


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = copy.deepcopy(WRITTEN)
    change(document)
    return document


def test_what_cryptsetup_wrote_is_taken() -> None:
    check_header(header(WRITTEN))


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "null cipher": (lambda d: d["segments"]["0"].update(encryption="cipher_null-ecb"), "segments.0.encryption"),
    "no integrity": (lambda d: d["segments"]["0"].pop("integrity"), "segments.0"),
    "integrity without keys": (lambda d: d["segments"]["0"]["integrity"].update(type="none"), "integrity.type"),
    "key wrapped by nothing": (
        lambda d: d["keyslots"]["0"]["area"].update(encryption="cipher_null-ecb"),
        "keyslots.0.area.encryption",
    ),
    "a second key": (lambda d: d["keyslots"].update({"1": d["keyslots"]["0"]}), "keyslots"),
    "a linear segment": (lambda d: d["segments"]["0"].update(type="linear"), "segments.0.type"),
    "a second segment": (lambda d: d["segments"].update({"1": d["segments"]["0"]}), "segments"),
    "other place": (lambda d: d["segments"]["0"].update(offset="2097152"), "segments.0.offset"),
    "a token": (lambda d: d["tokens"].update({"0": {"type": "systemd-tpm2", "keyslots": ["0"]}}), "tokens"),
    "a requirement": (lambda d: d["config"].update(requirements=["online-reencrypt"]), "config"),
    "a flag": (lambda d: d["segments"]["0"].update(flags=["backup-final"]), "segments.0"),
    "endless work": (lambda d: d["digests"]["0"].update(iterations=2**40), "digests.0.iterations"),
    "another function": (lambda d: d["keyslots"]["0"]["kdf"].update(type="argon2id"), "keyslots.0.kdf.type"),
    "a short salt": (lambda d: d["keyslots"]["0"]["kdf"].update(salt="AAAA"), "keyslots.0.kdf.salt"),
    "a smaller key": (lambda d: d["keyslots"]["0"].update(key_size=0), "keyslots.0.key_size"),
    "a truth for a number": (lambda d: d["keyslots"]["0"]["af"].update(stripes=True), "af.stripes"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_header_of_the_host_s_making_is_refused_by_name(name: str) -> None:
    change, place = ATTACKS[name]
    with pytest.raises(HeaderRefused, match=place.replace(".", r"\.")):
        check_header(header(changed(change)))


def test_copies_checksums_sizes_and_forms_are_checked() -> None:
    good = header(WRITTEN)
    weak = changed(lambda d: d["segments"]["0"].update(encryption="cipher_null-ecb"))
    for raw, why in (
        (good[:-1], "bytes instead of"),
        (bytes(HEADER), "no LUKS2 header"),
        (good[:500] + b"x" + good[501:], "checksum"),
        (good[:5000] + b"x" + good[5001:], "checksum"),
        (header(WRITTEN, second=weak), "copies differ"),
        (header(WRITTEN, version=1), "no LUKS2 header"),
        (header(WRITTEN, sequence=0), "sequence"),
        (header(b"[]"), "no object"),
        (header(b"{"), "no JSON"),
        (header(b'{"config": {}, "config": {}}'), "no JSON"),
        (header(b"{}\0{}"), "follows"),
        (header(b"[" * 9000), "no JSON"),
    ):
        with pytest.raises(HeaderRefused, match=why):
            check_header(raw)


@given(st.integers(0, 2 * METADATA - 1), st.integers(1, 255))
def test_any_changed_byte_of_the_metadata_is_refused(position: int, flip: int) -> None:
    raw = bytearray(header(WRITTEN))
    raw[position] ^= flip
    with pytest.raises(HeaderRefused):
        check_header(bytes(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["keyslots", "tokens", "segments", "digests", "config"]), JSON)
def test_any_other_part_is_refused(part: str, value: Any) -> None:
    document = {**WRITTEN, part: value}
    if value == WRITTEN[part]:
        check_header(header(document))
        return
    with pytest.raises(HeaderRefused):
        check_header(header(document))
