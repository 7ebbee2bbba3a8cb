"""Reference manifests: a narrow reader of XML, and signatures that cover all of what is read."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import nvidia_world as world
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.endorsements.nvidia import outside_validity, verify_rim
from attestation.errors import MalformedEndorsement
from attestation.evidence.gpu.rim import RimKind, parse_rim

ROOTS = world.profile().rim_roots
RIM = world.vbios_rim()


def checks(raw: bytes) -> set[str]:
    return {failure.check for failure in verify_rim(raw, ROOTS).failures}


def test_a_good_manifest_is_read_and_verified() -> None:
    verified = verify_rim(RIM, ROOTS)
    assert verified.failures == ()
    assert (verified.rim.kind, verified.rim.product, verified.rim.version) == (RimKind.VBIOS, "GH100", world.VBIOS)
    assert dict(verified.rim.golden) == world.VBIOS_GOLDEN
    assert verify_rim(world.driver_rim(), ROOTS).rim.kind is RimKind.DRIVER


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'active="False"', b'active="True"'),
        (b'product="GH100"', b'product="GH200"'),
        (b'colloquialVersion="97.00.A1.00.03"', b'colloquialVersion="97.00.A1.00.04"'),
        (b'index="0"', b'index="77"'),
        (b'tagId="0011"', b'tagId="0012"'),
    ],
)
def test_a_change_anywhere_breaks_the_signature(old: bytes, new: bytes) -> None:
    assert old in RIM
    assert checks(RIM.replace(old, new, 1)) == {"rim-signature"}


def test_a_declaration_of_utf_8_may_stand_before_it() -> None:
    assert checks(b"<?xml version='1.0' encoding='UTF-8'?>" + RIM) == set()


def test_another_signature_value_breaks_it() -> None:
    other = world.make_rim(world.VBIOS, {0: [bytes(48)]})
    value = rb"<ds:SignatureValue>[^<]*</ds:SignatureValue>"
    (mine,) = re.findall(value, other)
    assert checks(re.sub(value, lambda _: mine, RIM)) == {"rim-signature"}


def test_an_ended_signer_is_told_by_the_verifier_at_its_time() -> None:
    chain = world.rim_signer(until=datetime(2025, 8, 24, tzinfo=UTC))
    verified = verify_rim(world.make_rim(world.VBIOS, world.VBIOS_GOLDEN, chain=chain), ROOTS)
    assert verified.failures == (), "the signature is good whatever the time"
    assert outside_validity(verified.certificates, datetime(2025, 1, 15, tzinfo=UTC)) == ()
    (ended,) = outside_validity(verified.certificates, world.AT)
    assert ended.startswith("RIM Signer")


DOCTYPE = b'<!DOCTYPE x [<!ENTITY e "boom">]>'
BOMB = b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;'>]>"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no xml",
        RIM[:-1],
        RIM + b"x",
        DOCTYPE + RIM,
        BOMB + RIM.replace(b"0011", b"&b;"),
        b'<!DOCTYPE x SYSTEM "http://127.0.0.1:1/evil.dtd">' + RIM,
        RIM.replace(b"0011", b"&evil;"),
        RIM.replace(b"><", b"><!-- comment --><", 1),
        RIM.replace(b"><", b"><?php evil ?><", 1),
        RIM.replace(b"0011", b"\xff\xfe"),
        RIM.decode().encode("utf-16"),
        b'<?xml version="1.0" encoding="utf-16"?>' + RIM,
        RIM + b" " * (1 << 18),
        b"<a>" * 3000 + b"</a>" * 3000,
        RIM.replace(b"<Payload>", b"<Payload><x/>"),
        RIM.replace(b"Meta ", b"Meto ").replace(b"/Meta", b"/Meto"),
        re.sub(rb"<ds:Signature .*</ds:Signature>", b"", RIM, flags=re.S),
        RIM.replace(b"ecdsa-sha384", b"ecdsa-sha1"),
        RIM.replace(b"#enveloped-signature", b"#base64"),
        RIM.replace(b'URI=""', b'URI="#part"'),
        RIM.replace(b'alternatives="2"', b'alternatives="1"'),
        RIM.replace(b'alternatives="2"', b'alternatives="3"'),
        RIM.replace(b'alternatives="2"', b'alternatives="999999999"'),
        RIM.replace(b'active="True"', b'active="Maybe"'),
        RIM.replace(b'index="1"', b'index="0"'),
        RIM.replace(b'size="48"', b'size="47"'),
        RIM.replace(b'type="Measurement"', b'type="OpaqueData"'),
        RIM.replace(b'colloquialVersion="97.00.A1.00.03"', b'colloquialVersion="../../etc/passwd"'),
        RIM.replace(b'active="True"', b'active="False"'),
        RIM.replace(b'type="Measurement"', b'type="Measurement" onload="x"', 1),
    ],
)
def test_what_is_no_such_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedEndorsement):
        parse_rim(raw)
    with pytest.raises(MalformedEndorsement):
        verify_rim(raw, ROOTS)


def test_a_signed_manifest_wrapped_into_an_unsigned_one_is_refused() -> None:
    """Signature wrapping: the signed tag hidden inside another whose values are the attacker's."""
    body, signature = re.fullmatch(rb"(.*)(<ds:Signature .*</ds:Signature>)(.*)", RIM, re.S).groups()[:2]  # type: ignore[union-attr]
    inner = body + signature + b"</SoftwareIdentity>"
    evil = body.replace(b'index="0"', b'index="70"', 1)
    for wrapped in (
        evil + inner + b"</SoftwareIdentity>",
        evil
        + signature.replace(b"</ds:KeyInfo>", b"</ds:KeyInfo><ds:Object>" + inner + b"</ds:Object>")
        + b"</SoftwareIdentity>",
        evil + signature + signature + b"</SoftwareIdentity>",
    ):
        with pytest.raises(MalformedEndorsement):
            verify_rim(wrapped, ROOTS)


@given(st.integers(0, len(RIM) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_found(position: int, change: int) -> None:
    raw = bytearray(RIM)
    raw[position] ^= change
    try:
        verified = verify_rim.__wrapped__(bytes(raw), ROOTS)
    except MalformedEndorsement:
        return
    if not verified.failures:
        assert verified.rim.golden == verify_rim(RIM, ROOTS).rim.golden, "only what carries no meaning may change"
        assert (verified.rim.product, verified.rim.version) == ("GH100", world.VBIOS)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(MalformedEndorsement):
        parse_rim(raw)
    with pytest.raises(MalformedEndorsement):
        parse_rim(b'<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd">' + raw)


def test_ever_new_names_do_not_fill_the_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def refuse(number: int) -> None:
        names = "".join(f"<{number:08}-{one:04}-{'n' * 60}/>".replace("<", "<e") for one in range(1000))
        with pytest.raises(MalformedEndorsement):
            parse_rim(f"<SoftwareIdentity>{names}</SoftwareIdentity>".encode())

    for number in range(20):
        refuse(number)
    before = resident()
    for number in range(20, 320):  # 300,000 names of 75 bytes
        refuse(number)
    assert resident() - before < 8 << 20
