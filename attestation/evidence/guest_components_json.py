"""SNP evidence as Confidential Containers' guest components send it: a report taken apart into JSON fields.

The signature covers bytes, so the 1184 bytes are rebuilt here, reserved ones zero, TCBs in the product's layout; any
field that this changes, adds or drops makes the signature fail. It is the one case in which bytes are rebuilt.

Source: the `sev` crate's serialisation of ATTESTATION_REPORT, as sent by guest-components' SNP attester.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attestation.errors import MalformedEvidence
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    VLEK_GUID,
    encode_certificate_table,
)
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product, Report, encode_report, product_of
from attestation.evidence.tcb import Tcb, encode_tcb

MAX_CERTIFICATE_SIZE = 64 << 10
_GUIDS = {"VCEK": VCEK_GUID, "VLEK": VLEK_GUID, "ASK": ASK_GUID, "ARK": ARK_GUID, "CRL": CRL_GUID}
_RENAMED = frozenset({"sig_algo", "plat_info", "current", "committed", "signature"})

_Byte = Annotated[int, Field(ge=0, le=0xFF)]
_Unsigned32 = Annotated[int, Field(ge=0, lt=1 << 32)]
_Unsigned64 = Annotated[int, Field(ge=0, lt=1 << 64)]
_Bytes16 = Annotated[list[_Byte], Field(min_length=16, max_length=16)]
_Bytes32 = Annotated[list[_Byte], Field(min_length=32, max_length=32)]
_Bytes48 = Annotated[list[_Byte], Field(min_length=48, max_length=48)]
_Bytes64 = Annotated[list[_Byte], Field(min_length=64, max_length=64)]
_Bytes72 = Annotated[list[_Byte], Field(min_length=72, max_length=72)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Tcb(_Part):
    fmc: _Byte | None = None
    bootloader: _Byte
    tee: _Byte
    snp: _Byte
    microcode: _Byte


class _Firmware(_Part):
    major: _Byte
    minor: _Byte
    build: _Byte


class _Signature(_Part):
    r: _Bytes72
    s: _Bytes72


class _Report(_Part):
    version: Annotated[int, Field(ge=2, le=5)]
    guest_svn: _Unsigned32
    policy: _Unsigned64
    family_id: _Bytes16
    image_id: _Bytes16
    vmpl: _Unsigned32
    sig_algo: _Unsigned32
    current_tcb: _Tcb
    plat_info: _Unsigned64
    key_info: _Unsigned32
    report_data: _Bytes64
    measurement: _Bytes48
    host_data: _Bytes32
    id_key_digest: _Bytes48
    author_key_digest: _Bytes48
    report_id: _Bytes32
    report_id_ma: _Bytes32
    reported_tcb: _Tcb
    cpuid_fam_id: _Byte | None = None
    cpuid_mod_id: _Byte | None = None
    cpuid_step: _Byte | None = None
    chip_id: _Bytes64
    committed_tcb: _Tcb
    current: _Firmware
    committed: _Firmware
    launch_tcb: _Tcb
    launch_mit_vector: _Unsigned64 | None = None
    current_mit_vector: _Unsigned64 | None = None
    signature: _Signature

    @model_validator(mode="after")
    def _fields_of_version(self) -> Self:
        cpuid = (self.cpuid_fam_id, self.cpuid_mod_id, self.cpuid_step)
        if any((value is not None) != (self.version >= 3) for value in cpuid):
            raise ValueError("CPUID fields belong to version 3 and later, and all of them")
        mitigations = (self.launch_mit_vector, self.current_mit_vector)
        if any((value is not None) != (self.version >= 5) for value in mitigations):
            raise ValueError("mitigation vectors belong to version 5, and both of them")
        return self


class _Certificate(_Part):
    cert_type: Literal["VCEK", "VLEK", "ASK", "ARK", "CRL"]
    data: Annotated[list[_Byte], Field(min_length=1, max_length=MAX_CERTIFICATE_SIZE)]


class _Evidence(_Part):
    attestation_report: _Report
    cert_chain: Annotated[list[_Certificate], Field(max_length=8)] | None = None


def parse_guest_components(document: Mapping[str, Any]) -> SnpEvidence:
    """Rebuild the report's bytes and the certificate table from a decoded JSON object.

    Raises:
        MalformedEvidence: an unknown, missing or ill-typed field, or fields that no report of its version has.
    """
    try:
        evidence = _Evidence.model_validate(dict(document))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "evidence"
        raise _malformed(f"{field}: {first['msg'].removeprefix('Value error, ')}") from error
    report = _rebuild(evidence.attestation_report)
    certificates = evidence.cert_chain or []
    table = encode_certificate_table((_GUIDS[one.cert_type], bytes(one.data)) for one in certificates)
    return SnpEvidence(report=report, certificates=table if certificates else b"")


def _rebuild(fields: _Report) -> bytes:
    product = _product(fields)

    def tcb(part: _Tcb) -> bytes:
        return encode_tcb(Tcb(part.bootloader, part.tee, part.snp, part.microcode, part.fmc), product)

    same: dict[str, Any] = {}
    for name in _Report.model_fields:
        value = getattr(fields, name)
        if isinstance(value, _Tcb):
            same[name] = tcb(value)
        elif name not in _RENAMED:
            same[name] = bytes(value) if isinstance(value, list) else value
    return encode_report(
        Report(
            signature_algo=fields.sig_algo,
            platform_info=fields.plat_info,
            current_build=fields.current.build,
            current_minor=fields.current.minor,
            current_major=fields.current.major,
            committed_build=fields.committed.build,
            committed_minor=fields.committed.minor,
            committed_major=fields.committed.major,
            signature_r=int.from_bytes(bytes(fields.signature.r), "little"),
            signature_s=int.from_bytes(bytes(fields.signature.s), "little"),
            **same,
        )
    )


def _product(fields: _Report) -> Product:
    """The product whose TCB layout the sender read: by CPUID, and Turin if and only if there is an FMC level."""
    turin = fields.current_tcb.fmc is not None
    if fields.cpuid_fam_id is None or fields.cpuid_mod_id is None:
        return Product.TURIN if turin else Product.MILAN  # Milan and Genoa share a layout
    product = product_of(fields.cpuid_fam_id, fields.cpuid_mod_id)
    if product is None:
        raise _malformed(f"CPUID family {fields.cpuid_fam_id}, model {fields.cpuid_mod_id} is of no known product")
    return product


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="SNP evidence in JSON", do="Send it as guest-components does.")
