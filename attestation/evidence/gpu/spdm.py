"""A GPU's attestation report: one SPDM GET_MEASUREMENTS request followed by its signed response.

Layout: DMTF DSP0274 version 1.1, "GET_MEASUREMENTS request message" and "MEASUREMENTS response message"; measurement
blocks by "DMTF measurement specification format". Integers are little-endian, but the signature is r || s big-endian
(ECDSA P-384 over SHA-384 of everything before it, request included). The opaque data is NVIDIA's (`opaque.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from attestation.errors import MalformedEvidence
from attestation.evidence.gpu.opaque import OpaqueField, encode_opaque, parse_opaque

MAX_REPORT_SIZE = 8192
"""Bytes of the longest report that is read: what NVIDIA's management library reserves for one."""

REQUEST_SIZE = 37
NONCE_SIZE = 32
SIGNATURE_SIZE = 96
_VERSION = 0x11
_GET_MEASUREMENTS = 0xE0
_MEASUREMENTS = 0x60
_SIGNATURE_REQUESTED = 0x01
_ALL_MEASUREMENTS = 0xFF
_DMTF = 0x01
_HEADER = 8
_BLOCK_HEADER = 4
_VALUE_HEADER = 3


@dataclass(frozen=True, slots=True)
class MeasurementBlock:
    """One measurement block.

    Attributes:
        index: 1 to 254. A reference manifest counts from 0: its index is one less.
        value_type: DMTFSpecMeasurementValueType; bit 7 says that the value is raw bytes and no digest.
        value: What was measured; a SHA-384 digest in all reports known here.
    """

    index: int
    value_type: int
    value: bytes


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One report, request and response together.

    Attributes:
        request_nonce: The 32 bytes that the requester chose: freshness.
        slot: The certificate slot that was asked to sign.
        response_param1, response_param2: Two bytes of the response that SPDM 1.1 leaves to the responder.
        measurements: In order of their index.
        response_nonce: The 32 bytes that the device chose.
        opaque: NVIDIA's fields in their order.
        signature: r || s, 48 bytes each, big-endian.
        raw: The bytes that were parsed; empty in an object that was built field by field.
    """

    request_nonce: bytes
    slot: int
    response_param1: int
    response_param2: int
    measurements: tuple[MeasurementBlock, ...]
    response_nonce: bytes
    opaque: tuple[OpaqueField, ...]
    signature: bytes
    raw: bytes = b""

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers, as they were received."""
        return self.raw[:-SIGNATURE_SIZE]

    def field(self, kind: int) -> bytes | None:
        """The bytes of the opaque field of this type, or None."""
        return next((field.value for field in self.opaque if field.kind == kind), None)


def parse_gpu_report(raw: bytes) -> GpuReport:
    """Read one report to its last byte. `encode_gpu_report` gives back the same bytes.

    Raises:
        MalformedEvidence: another SPDM version or message, a request for less than all measurements or for none that
            are signed, block indices that do not rise, lengths that do not fit, an opaque field twice, bytes left over.
    """
    if not REQUEST_SIZE + _HEADER + NONCE_SIZE + 2 + SIGNATURE_SIZE <= len(raw) <= MAX_REPORT_SIZE:
        raise _malformed(f"{len(raw)} bytes are no report", "length")
    _expect(raw[0], _VERSION, "request, SPDMVersion")
    _expect(raw[1], _GET_MEASUREMENTS, "request, RequestResponseCode")
    _expect(raw[2], _SIGNATURE_REQUESTED, "request, Param1 (signature requested)")
    _expect(raw[3], _ALL_MEASUREMENTS, "request, Param2 (all measurements)")
    response = raw[REQUEST_SIZE:]
    _expect(response[0], _VERSION, "response, SPDMVersion")
    _expect(response[1], _MEASUREMENTS, "response, RequestResponseCode")
    count = response[4]
    length = int.from_bytes(response[5:8], "little")
    end = _HEADER + length
    if end + NONCE_SIZE + 2 + SIGNATURE_SIZE > len(response):
        raise _malformed("the measurement record is longer than the response", "response, MeasurementRecordLength")
    measurements = _parse_blocks(response[_HEADER:end], count)
    opaque_start = end + NONCE_SIZE + 2
    opaque_length = int.from_bytes(response[opaque_start - 2 : opaque_start], "little")
    if opaque_start + opaque_length + SIGNATURE_SIZE != len(response):
        raise _malformed("the opaque data and the signature do not end where the report ends", "response, OpaqueLength")
    return GpuReport(
        request_nonce=raw[4 : 4 + NONCE_SIZE],
        slot=raw[REQUEST_SIZE - 1],
        response_param1=response[2],
        response_param2=response[3],
        measurements=measurements,
        response_nonce=response[end : end + NONCE_SIZE],
        opaque=parse_opaque(response[opaque_start : opaque_start + opaque_length]),
        signature=response[-SIGNATURE_SIZE:],
        raw=raw,
    )


def _parse_blocks(record: bytes, count: int) -> tuple[MeasurementBlock, ...]:
    blocks: list[MeasurementBlock] = []
    position = 0
    for _ in range(count):
        if position + _BLOCK_HEADER + _VALUE_HEADER > len(record):
            raise _malformed("a block begins outside the record", "measurement record")
        index, specification = record[position], record[position + 1]
        size = int.from_bytes(record[position + 2 : position + 4], "little")
        value = record[position + _BLOCK_HEADER : position + _BLOCK_HEADER + size]
        where = f"measurement block {index}"
        _expect(specification, _DMTF, f"{where}, MeasurementSpecification")
        if not 1 <= index <= 254 or (blocks and index <= blocks[-1].index):
            raise _malformed("block indices do not rise", where)
        if len(value) != size or size <= _VALUE_HEADER:
            raise _malformed("the block does not end inside the record", where)
        if int.from_bytes(value[1:3], "little") != size - _VALUE_HEADER:
            raise _malformed("DMTFSpecMeasurementValueSize does not fit the block", where)
        blocks.append(MeasurementBlock(index, value[0], value[_VALUE_HEADER:]))
        position += _BLOCK_HEADER + size
    if position != len(record):
        raise _malformed("bytes after the last block", "measurement record")
    return tuple(blocks)


def encode_gpu_report(report: GpuReport) -> bytes:
    """The bytes of these fields, the signature as it stands; `report.raw` is not looked at.

    Raises:
        MalformedEvidence: what `parse_gpu_report` would refuse.
    """
    try:
        record = b"".join(
            bytes([block.index, _DMTF])
            + (len(block.value) + _VALUE_HEADER).to_bytes(2, "little")
            + bytes([block.value_type])
            + len(block.value).to_bytes(2, "little")
            + block.value
            for block in report.measurements
        )
        opaque = encode_opaque(report.opaque)
        raw = b"".join(
            (
                bytes([_VERSION, _GET_MEASUREMENTS, _SIGNATURE_REQUESTED, _ALL_MEASUREMENTS]),
                report.request_nonce,
                bytes([report.slot]),
                bytes([_VERSION, _MEASUREMENTS, report.response_param1, report.response_param2]),
                bytes([len(report.measurements)]),
                len(record).to_bytes(3, "little"),
                record,
                report.response_nonce,
                len(opaque).to_bytes(2, "little"),
                opaque,
                report.signature,
            )
        )
    except (ValueError, OverflowError) as error:
        raise _malformed(f"a field does not fit: {error}", "field") from error
    parse_gpu_report(raw)
    return raw


def _expect(value: int, expected: int, where: str) -> None:
    if value != expected:
        raise _malformed(f"0x{value:02x} is not the 0x{expected:02x} known here", where)


def _malformed(what: str, where: str) -> MalformedEvidence:
    return MalformedEvidence(
        what,
        where=f"GPU report (SPDM 1.1): {where}",
        do="Give the report as the device made it, request and response together.",
    )
