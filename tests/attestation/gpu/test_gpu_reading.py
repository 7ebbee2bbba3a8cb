"""The readers of GPU evidence: exact round trips, and nothing but their own error for everything else."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import replace

import nvidia_world as world
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.canonical import b64
from attestation.endorsements.nvidia import resolve_device_chain
from attestation.errors import MalformedEndorsement, MalformedEvidence
from attestation.evidence.gpu import opaque
from attestation.evidence.gpu.document import GpuEvidence, read_gpu_document, write_gpu_document
from attestation.evidence.gpu.opaque import OpaqueField
from attestation.evidence.gpu.spdm import GpuReport, MeasurementBlock, encode_gpu_report, parse_gpu_report
from attestation.verifier.gpu.facts import read_facts

DEVICE = world.make_device()
GOOD = world.sign_report(DEVICE, world.gpu_fields())

blocks = st.lists(
    st.builds(MeasurementBlock, st.integers(1, 254), st.integers(0, 255), st.binary(min_size=1, max_size=64)),
    max_size=8,
    unique_by=lambda block: block.index,
).map(lambda found: tuple(sorted(found, key=lambda block: block.index)))

fields = st.lists(
    st.builds(OpaqueField, st.integers(0, 65535), st.binary(max_size=40)),
    max_size=8,
    unique_by=lambda field: field.kind,
).map(tuple)

reports = st.builds(
    GpuReport,
    request_nonce=st.binary(min_size=32, max_size=32),
    slot=st.integers(0, 255),
    response_param1=st.integers(0, 255),
    response_param2=st.integers(0, 255),
    measurements=blocks,
    response_nonce=st.binary(min_size=32, max_size=32),
    opaque=fields,
    signature=st.binary(min_size=96, max_size=96),
)


@given(reports)
def test_a_report_survives_the_round_trip(report: GpuReport) -> None:
    raw = encode_gpu_report(report)
    assert replace(parse_gpu_report(raw), raw=b"") == report
    assert parse_gpu_report(raw).signed + report.signature == raw


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_another_report_or_none(position: int, change: int) -> None:
    raw = bytearray(GOOD)
    raw[position] ^= change
    try:
        parsed = parse_gpu_report(bytes(raw))
    except MalformedEvidence:
        return
    assert encode_gpu_report(parsed) == bytes(raw), "every byte that is let through has its meaning"


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_refused_or_read(raw: bytes) -> None:
    for candidate in (raw, GOOD[:37] + raw, GOOD[: 37 + 8] + raw):
        try:
            report = parse_gpu_report(candidate)
        except MalformedEvidence:
            continue
        read_facts(report, None)


@given(
    st.lists(st.builds(OpaqueField, st.sampled_from([int(one) for one in opaque.FieldType]), st.binary(max_size=20)))
)
def test_facts_never_fail(found: list[OpaqueField]) -> None:
    report = replace(parse_gpu_report(GOOD), opaque=tuple(found))
    for model in ("GH100", "LS_10", None):
        facts = read_facts(report, model)
        json.dumps(facts.as_claims())
        assert all(isinstance(problem, str) for problem in facts.problems)


def patched(offset: int, value: bytes) -> bytes:
    return GOOD[:offset] + value + GOOD[offset + len(value) :]


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b"", "length"),
        (GOOD + b"\0", "OpaqueLength"),
        (GOOD[:-1], "OpaqueLength"),
        (GOOD + bytes(8192), "length"),
        (patched(0, b"\x12"), "request, SPDMVersion"),
        (patched(1, b"\xe1"), "request, RequestResponseCode"),
        (patched(2, b"\x00"), "Param1"),
        (patched(3, b"\x01"), "Param2"),
        (patched(37, b"\x12"), "response, SPDMVersion"),
        (patched(38, b"\x7f"), "response, RequestResponseCode"),
        (patched(41, b"\x3f"), "measurement record"),
        (patched(41, b"\x41"), "measurement record"),
        (patched(42, b"\xff\xff\xff"), "MeasurementRecordLength"),
        (patched(45, b"\x00"), "block 0"),
        (patched(45, b"\x02"), "block 2"),
        (patched(46, b"\x02"), "MeasurementSpecification"),
        (patched(47, b"\xff\xff"), "block 1"),
        (patched(50, b"\x2f"), "block 1"),
    ],
)
def test_a_broken_report_names_its_place(raw: bytes, where: str) -> None:
    with pytest.raises(MalformedEvidence) as caught:
        parse_gpu_report(raw)
    assert where in str(caught.value)


def test_an_opaque_field_twice_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="twice"):
        opaque.parse_opaque(opaque.encode_opaque((OpaqueField(3, b"1"), OpaqueField(3, b"2"))))
    with pytest.raises(MalformedEvidence, match="more than 64"):
        opaque.parse_opaque(opaque.encode_opaque(tuple(OpaqueField(kind, b"") for kind in range(65))))
    with pytest.raises(MalformedEvidence, match="outside"):
        opaque.parse_opaque(b"\x03\0\x05\0abc")
    with pytest.raises(MalformedEvidence, match="after the last"):
        opaque.parse_opaque(b"\x03\0")


def test_versions_in_their_written_form() -> None:
    assert opaque.vbios_version(bytes.fromhex("009f009601000000")) == "96.00.9F.00.01"
    assert opaque.vbios_version(b"96.10.73.00.01") == "96.10.73.00.01"
    for bad in (b"", b"96.10", b"\xff" * 8, b"96.10.73.00.0G"):
        with pytest.raises(MalformedEvidence):
            opaque.vbios_version(bad)
    with pytest.raises(MalformedEvidence):
        opaque.text(b"550\0.90")
    with pytest.raises(MalformedEvidence):
        opaque.text(b"550 90")


def test_the_forms_of_a_document() -> None:
    entry = {"arch": "HOPPER", "evidence": b64(GOOD), "certificate": b64(DEVICE.pem)}
    one = {**entry, "nonce": world.NONCE.hex(), "version": "1.0", "driver_version": "1.2", "vbios_version": "9"}
    forms = (
        one,
        {"evidences": [one], "result_code": 0, "result_message": "Ok"},
        {"device_evidence_list": [{**entry, "arch": "Hopper", "uuid": "GPU-1"}]},
        [one],
    )
    for form in forms:
        (device,) = read_gpu_document(json.dumps(form).encode())
        assert (device.report, device.chain, device.arch) == (GOOD, DEVICE.pem, "HOPPER")


def test_a_document_survives_the_round_trip() -> None:
    devices = (
        GpuEvidence(report=GOOD, chain=DEVICE.pem),
        GpuEvidence(report=GOOD, chain=DEVICE.pem, arch="LS10", nonce=world.NONCE, uuid="x", devtools_mode=False),
    )
    assert read_gpu_document(write_gpu_document(devices)) == devices


@pytest.mark.parametrize(
    "document",
    [
        "{}",
        "[]",
        "[1]",
        '[{"evidence": "AA==", "certificate": "AA=="}], "device_evidence_list": []',
        "null",
        '{"evidences": []}',
        '{"evidences": {}}',
        '{"evidences": [1], "more": 1}',
        '{"device_evidence_list": [{"evidence": "AA==", "certificate": "AA==", "arch": "AMPERE"}]}',
        '{"device_evidence_list": [{"evidence": "AA=", "certificate": "AA=="}]}',
        '{"device_evidence_list": [{"evidence": "AA==", "certificate": "AA==", "trust": true}]}',
        '{"evidence": "AA==", "evidence": "AAA=", "certificate": "AA=="}',
        '{"evidence": "AA==", "certificate": "AA==", "nonce": "0xzz"}',
        '{"evidence": "AA==", "certificate": "AA==", "devtools_mode": "yes"}',
        '{"evidence": "AA==", "certificate": "AA==", "version": "2.0"}',
    ],
)
def test_other_documents_are_refused(document: str) -> None:
    with pytest.raises(MalformedEvidence):
        read_gpu_document(document.encode())


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["evidence", "certificate", "arch", "nonce", "evidences", "device_evidence_list", "x"]),
                inner,
            )
        ),
        max_leaves=10,
    )
)
def test_any_json_is_refused_or_read(value: object) -> None:
    with contextlib.suppress(MalformedEvidence):
        read_gpu_document(json.dumps(value).encode())


def test_a_certificate_without_a_positive_serial_number_is_refused() -> None:
    """`cryptography` only warns of one, each time it is read."""
    leaf = DEVICE.chain[0].public_bytes(world.Encoding.DER)
    serial = DEVICE.chain[0].serial_number
    size = (serial.bit_length() + 8) // 8
    negative = leaf.replace(serial.to_bytes(size, "big"), b"\x80" + bytes(size - 2) + b"\x01", 1)
    assert negative != leaf
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(negative) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(MalformedEndorsement, match="not positive"):
        resolve_device_chain(pem)
