"""Azure's wrapper of an SNP report: the report of the paravisor (HCL), and the keys of the virtual TPM that it runs.

REPORT_DATA is the digest of the variable data, which holds the TPM's attestation key; so the report vouches for the
key, and the key for what the TPM quotes. The blob itself is made once a boot: it is fresh only with a quote.

Layout: Azure's "attestation report format" for confidential VMs: a header of 32 bytes, the report at 0x20, request data
of 20 bytes at 0x4C0, the variable data (JSON) after it, zeros to the end.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attestation.canonical import read_json_object
from attestation.errors import MalformedEvidence
from attestation.evidence.report import REPORT_SIZE
from attestation.evidence.tpm_quote import TpmQuote
from policies.errors import Unusable

MAGIC = b"HCLA"
MAX_HCL_SIZE = 64 << 10

_HEADER = struct.Struct("<4s7I")  # signature, version, report size, request type, status, 3 reserved
_REQUEST = struct.Struct("<5I")  # size, version, report type, hash type, size of the variable data
_REPORT_AT = 0x20
_REQUEST_AT = _REPORT_AT + REPORT_SIZE
_VARIABLE_AT = _REQUEST_AT + _REQUEST.size
_REPORT_TYPE_SNP = 2
_HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
_AK = "HCLAkPub"


@dataclass(frozen=True, slots=True)
class HclReport:
    """What the blob holds.

    Attributes:
        report: The SNP report, 1184 bytes.
        variable_data: The JSON whose digest the report carries.
        digest: That digest as REPORT_DATA must have it: 64 bytes, zero after the digest.
        attestation_key: Modulus and exponent of the TPM's RSA attestation key.
        configuration: What the paravisor says of the VM (`vm-configuration`), e.g. `secure-boot`.
        user_data: The 64 bytes that the guest put in, in hex, or None.
    """

    report: bytes
    variable_data: bytes
    digest: bytes
    attestation_key: tuple[int, int]
    configuration: Mapping[str, Any]
    user_data: str | None


@dataclass(frozen=True, slots=True)
class HclEvidence:
    """A guest's evidence on Azure: the blob, a quote by the key in it (None: no freshness), the VEK (DER or PEM)."""

    hcl: HclReport
    quote: TpmQuote | None = None
    vek: bytes | None = None


def parse_hcl_report(raw: bytes) -> HclReport:
    """Read the blob to its last byte.

    Raises:
        MalformedEvidence: not such a blob, not around an SNP report, sizes that contradict each other, bytes after the
            data that are not zero, or variable data without exactly one RSA attestation key.
    """
    if not _VARIABLE_AT < len(raw) <= MAX_HCL_SIZE:
        raise _malformed(f"{len(raw)} bytes are too few or too many")
    magic, version, _, _, status, *reserved = _HEADER.unpack_from(raw)
    if magic != MAGIC or version not in {1, 2} or status or any(reserved):
        raise _malformed("the header is not of a known version")
    size, request_version, report_type, hash_type, length = _REQUEST.unpack_from(raw, _REQUEST_AT)
    if report_type != _REPORT_TYPE_SNP:
        raise _malformed(f"hardware report of type {report_type}, not SNP")
    if request_version != 1 or hash_type not in _HASHES or size != _REQUEST.size + length:
        raise _malformed("the request data is not of a known version")
    end = _VARIABLE_AT + length
    if end > len(raw) or any(raw[end:]):
        raise _malformed("the variable data ends outside the blob, or is not followed by zeros")
    variable_data = raw[_VARIABLE_AT:end]
    document = _object(variable_data)
    return HclReport(
        report=raw[_REPORT_AT:_REQUEST_AT],
        variable_data=variable_data,
        digest=hashlib.new(_HASHES[hash_type], variable_data).digest().ljust(64, b"\0"),
        attestation_key=_attestation_key(document),
        configuration=_configuration(document),
        user_data=document["user-data"] if isinstance(document.get("user-data"), str) else None,
    )


def _object(raw: bytes) -> dict[str, Any]:
    try:
        return read_json_object(raw, where="HCL report", limit=MAX_HCL_SIZE)
    except Unusable as error:
        raise _malformed(f"the variable data: {error.what}") from error


def _attestation_key(document: Mapping[str, Any]) -> tuple[int, int]:
    keys = document.get("keys")
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == _AK] if isinstance(keys, list) else []
    if len(found) != 1 or found[0].get("kty") != "RSA":
        raise _malformed(f"the variable data does not hold one RSA key {_AK}")
    modulus, exponent = _number(found[0].get("n")), _number(found[0].get("e"))
    if not 2048 <= modulus.bit_length() <= 4096 or exponent != 65537:
        raise _malformed(f"{_AK} has {modulus.bit_length()} bits and exponent {exponent}")
    return modulus, exponent


def _number(text: Any) -> int:
    if not isinstance(text, str) or len(text) > 1024:
        raise _malformed(f"a part of {_AK} is no base64url text")
    try:
        return int.from_bytes(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True), "big")
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"a part of {_AK} is no base64url") from error


def _configuration(document: Mapping[str, Any]) -> dict[str, Any]:
    configuration = document.get("vm-configuration", {})
    if not isinstance(configuration, dict) or not all(
        isinstance(value, str | bool | int) for value in configuration.values()
    ):
        raise _malformed("vm-configuration is no flat object")
    return configuration


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="HCL report", do="Read it from the TPM's NV index 0x01400001 unchanged.")
