"""Azure's wrapper and the TPM's quote: read to the last byte, or refused."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_hcl import Paravisor

from attestation.errors import MalformedEvidence
from attestation.evidence.azure_json import parse_azure_evidence
from attestation.evidence.hcl import parse_hcl_report
from attestation.evidence.report import REPORT_SIZE, Product
from attestation.evidence.tpm_quote import parse_tpm_quote
from attestation.virtual.chip import Chip


@pytest.fixture(scope="module")
def paravisor(virtual_chips: Mapping[Product, Chip]) -> Paravisor:
    return Paravisor(virtual_chips[Product.MILAN], rsa.generate_private_key(65537, 2048))


def test_the_blob_is_read(paravisor: Paravisor) -> None:
    hcl = parse_hcl_report(paravisor.blob())
    assert len(hcl.report) == REPORT_SIZE
    assert hcl.attestation_key[0] == paravisor.key.public_key().public_numbers().n
    assert hcl.configuration["secure-boot"] is True
    assert hcl.digest == hcl.report[0x50:0x90]


def put(offset: int, value: int) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        return raw[:offset] + struct.pack("<I", value) + raw[offset + 4 :]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:1200],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw + b"\x01",
        lambda raw: raw + bytes(1 << 17),
        lambda raw: b"X" + raw[1:],
        put(4, 3),  # version
        put(16, 1),  # status
        put(20, 1),  # reserved
        put(0x4C0, 0),  # size of the request data
        put(0x4C4, 2),  # its version
        put(0x4C8, 4),  # TDX
        put(0x4CC, 9),  # hash
        put(0x4D0, 1 << 31),  # size of the variable data
        put(0x4D0, 4),
    ],
)
def test_a_blob_that_contradicts_itself_is_refused(paravisor: Paravisor, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_hcl_report(change(paravisor.blob()))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("keys"),
        lambda document: document["keys"].append(document["keys"][0]),
        lambda document: document["keys"][0].update(kty="EC"),
        lambda document: document["keys"][0].update(n="AQAB"),
        lambda document: document["keys"][0].update(n="*"),
        lambda document: document["keys"][0].update(n=7),
        lambda document: document["keys"][0].update(e="Aw"),
        lambda document: document["keys"][0].update(n="A" * 5000),
        lambda document: document.update({"vm-configuration": {"a": {}}}),
    ],
)
def test_variable_data_without_one_sound_key_is_refused(paravisor: Paravisor, change: Callable[[Any], Any]) -> None:
    document = json.loads(paravisor.variable_data())
    change(document)
    with pytest.raises(MalformedEvidence):
        parse_hcl_report(paravisor.blob(variable_data=json.dumps(document).encode()))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"keys": 1}', b"\xff", b'{"keys": [], "keys": []}'])
def test_variable_data_that_is_no_object_is_refused(paravisor: Paravisor, raw: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_hcl_report(paravisor.blob(variable_data=raw))


def test_the_quote_is_read(paravisor: Paravisor) -> None:
    quote = paravisor.quote(b"nonce")
    assert quote.extra_data == b"nonce"
    assert quote.selection == tuple(range(24))
    assert quote.firmware_version == 0x2020031200120003


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\0" + raw[1:],
        lambda raw: raw[:4] + b"\x80\x17" + raw[6:],  # a certification, not a quote
        lambda raw: raw.replace(b"\x00\x0b\x03", b"\x00\x04\x03"),  # SHA-1
        lambda raw: raw.replace(b"\x00\x00\x00\x01\x00\x0b", b"\x00\x00\x00\x02\x00\x0b"),
        lambda raw: raw.replace(b"\x00\x05nonce", b"\x00\x60nonce"),
    ],
)
def test_a_message_that_is_no_quote_is_refused(paravisor: Paravisor, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_tpm_quote(change(paravisor.message(b"nonce")), bytes(256), paravisor.pcrs)


@pytest.mark.parametrize("pcrs", [(), (bytes(32),) * 23, (bytes(32),) * 25, (bytes(20),) * 24])
def test_registers_are_24_of_32_bytes(paravisor: Paravisor, pcrs: tuple[bytes, ...]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_tpm_quote(paravisor.message(b"nonce"), bytes(256), pcrs)


@given(st.binary(max_size=2000))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_hcl_report(b"HCLA" + raw)
    with pytest.raises(MalformedEvidence):
        parse_tpm_quote(b"\xff\x54\x43\x47\x80\x18" + raw, bytes(256), (bytes(32),) * 24)


def lists(paravisor: Paravisor) -> dict[str, Any]:
    quote = paravisor.quote(b"nonce")
    return {
        "report": list(paravisor.blob()),
        "quote": {
            "message": list(quote.message),
            "signature": list(quote.signature),
            "pcrs": [list(pcr) for pcr in quote.pcrs],
        },
        "vcek": "-----BEGIN CERTIFICATE-----",
    }


def texts(paravisor: Paravisor, version: int = 1) -> dict[str, Any]:
    quote = paravisor.quote(b"nonce")
    return {
        "version": version,
        "hcl_report": base64.urlsafe_b64encode(paravisor.blob()).decode(),
        "tpm_quote": {
            "message": quote.message.hex(),
            "signature": quote.signature.hex(),
            "pcrs": [pcr.hex() for pcr in quote.pcrs],
        },
        "vcek": base64.urlsafe_b64encode(b"certificate").decode().rstrip("="),
    }


def test_both_json_forms_are_read(paravisor: Paravisor) -> None:
    quote = paravisor.quote(b"nonce")
    for document in (lists(paravisor), texts(paravisor), texts(paravisor, 2)):
        evidence = parse_azure_evidence(document)
        assert evidence.hcl.attestation_key == parse_hcl_report(paravisor.blob()).attestation_key
        assert evidence.quote is not None
        assert evidence.quote.message[:50] == quote.message[:50]
        assert evidence.quote.pcrs == paravisor.pcrs


@pytest.mark.parametrize("form", [lists, texts])
def test_a_json_form_with_a_field_too_many_or_too_few_is_refused(
    paravisor: Paravisor, form: Callable[[Paravisor], dict[str, Any]]
) -> None:
    document = form(paravisor)
    for name in document:
        with pytest.raises(MalformedEvidence):
            parse_azure_evidence({key: value for key, value in document.items() if key != name})
        with pytest.raises(MalformedEvidence):
            parse_azure_evidence({**document, name: None})
    with pytest.raises(MalformedEvidence):
        parse_azure_evidence({**document, "more": 1})


@pytest.mark.parametrize(
    ("name", "value"), [("version", 3), ("hcl_report", "SENMQQ"), ("hcl_report", "*"), ("vcek", "*")]
)
def test_a_text_form_that_is_not_what_it_says_is_refused(paravisor: Paravisor, name: str, value: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_azure_evidence({**texts(paravisor), name: value})
