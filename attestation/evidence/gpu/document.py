"""GPU evidence as files and messages carry it: a report with its certificate chain, for one device or for several.

Three forms are read, all JSON: one device as NVIDIA's tools serialise it, or a list of such; `{"evidences": [...]}`, as
`nvattest collect-evidence` prints it; `{"device_evidence_list": [...]}`, as the CoCo attester sends it under `nvidia`.
What such a document says beside report and chain is its sender's word: it is compared with the report, and never
believed.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, read_json_object, unb64
from attestation.errors import MalformedEvidence
from policies.errors import Unusable

MAX_DOCUMENT_SIZE = 1 << 20
MAX_DEVICES = 64
MAX_CHAIN_SIZE = 64 << 10

Architecture = Literal["HOPPER", "BLACKWELL", "LS10"]


class GpuEvidence(BaseModel):
    """One device's evidence.

    Attributes:
        report: The report's bytes (`spdm.parse_gpu_report`).
        chain: The certificate chain, PEM, leaf first.
        arch: The architecture its sender says it has, or None.
        nonce, driver_version, vbios_version: What its sender says the report holds, or None.
        uuid: The sender's name for the device, or None.
        devtools_mode: Whether the driver said that developer tools are enabled; None if nobody asked it. The report
            itself has no field for that (`docs/reference/gpu-evidence.md`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    report: bytes
    chain: bytes = Field(max_length=MAX_CHAIN_SIZE)
    arch: Architecture | None = None
    nonce: bytes | None = None
    driver_version: str | None = Field(default=None, max_length=64)
    vbios_version: str | None = Field(default=None, max_length=64)
    uuid: str | None = Field(default=None, max_length=128)
    devtools_mode: bool | None = None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    evidence: str
    certificate: str
    arch: str | None = Field(default=None, max_length=16)
    nonce: str | None = Field(default=None, max_length=66)
    driver_version: str | None = None
    vbios_version: str | None = None
    uuid: str | None = None
    version: Literal["1.0"] | None = None
    devtools_mode: bool | None = None


def read_gpu_document(raw: bytes) -> tuple[GpuEvidence, ...]:
    """The devices of an evidence document, at least one.

    Raises:
        MalformedEvidence: none of the three forms, a field that is not known, or more than 1 MiB or 64 devices.
    """
    if raw[:256].lstrip()[:1] == b"[":
        raw = b'{"device_evidence_list":' + raw + b"}"
    try:
        document: dict[str, Any] = read_json_object(raw, where="GPU evidence", limit=MAX_DOCUMENT_SIZE)
    except Unusable as error:
        raise _malformed(error.what) from error
    if "evidences" in document:
        entries, rest = document["evidences"], set(document) - {"evidences", "result_code", "result_message"}
    elif "device_evidence_list" in document:
        entries, rest = document["device_evidence_list"], set(document) - {"device_evidence_list"}
    else:
        entries, rest = [document], set()
    if rest or not isinstance(entries, list) or not 1 <= len(entries) <= MAX_DEVICES:
        raise _malformed("it does not list between 1 and 64 devices, or holds fields that are not known")
    return tuple(_read_entry(entry) for entry in entries)


def _read_entry(value: object) -> GpuEvidence:
    try:
        entry = _Entry.model_validate(value)
        arch = entry.arch.upper() if entry.arch is not None else None
        return GpuEvidence.model_validate(
            {
                "report": unb64(entry.evidence, where="GPU evidence, evidence"),
                "chain": unb64(entry.certificate, where="GPU evidence, certificate"),
                "arch": arch,
                "nonce": None if entry.nonce is None else bytes.fromhex(entry.nonce.removeprefix("0x")),
                "driver_version": entry.driver_version,
                "vbios_version": entry.vbios_version,
                "uuid": entry.uuid,
                "devtools_mode": entry.devtools_mode,
            }
        )
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(str(part) for part in item["loc"]) for item in error.errors()}))
        raise _malformed(f"a device's entry is not as it must be: {fields[:200]}") from error
    except Unusable as error:
        raise _malformed(error.what) from error
    except ValueError as error:
        raise _malformed("a device's nonce is no hex") from error


def write_gpu_document(devices: tuple[GpuEvidence, ...]) -> bytes:
    """The `device_evidence_list` form of these devices, compact JSON."""
    entries = [
        {
            key: value
            for key, value in {
                "arch": device.arch,
                "uuid": device.uuid,
                "evidence": b64(device.report),
                "certificate": b64(device.chain),
                "nonce": None if device.nonce is None else device.nonce.hex(),
                "driver_version": device.driver_version,
                "vbios_version": device.vbios_version,
                "devtools_mode": device.devtools_mode,
            }.items()
            if value is not None
        }
        for device in devices
    ]
    return json.dumps({"device_evidence_list": entries}, separators=(",", ":"), sort_keys=True).encode()


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(
        what,
        where="GPU evidence",
        do="Give the evidence document as its collector wrote it, or report and chain apart.",
    )
