"""Certificates let devices in as tokens do, and a revoked device is let in by neither; each refusal by its attack."""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from edge_world import EdgeWorld, found_edge
from federation_world import now
from hypothesis import given, settings
from hypothesis import strategies as st
from test_edge_gateway_service import asking

from fl.edge.credentials import read_credential
from fl.edge.device_certificates import issue_certificate
from fl.edge.kits.python import GatewayConnection
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.errors import Refused


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def connection(world: EdgeWorld) -> Iterator[GatewayConnection]:
    with world.serving(world.gateway(world.branch())) as (url, _):
        made = GatewayConnection(url, timeout=10.0)
        yield made
        made.close()


KEY = ec.generate_private_key(ec.SECP256R1())


def certified(world: EdgeWorld, name: str | None = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "issuer": world.issuer,
        "signing_key": world.issuer_key,
        "charter": world.federation.charter().id,
        "key": KEY.public_key(),
        "device": name or secrets.token_hex(16),
        "at": now(),
    }
    return issue_certificate(**{**arguments, **changes})


def rebuilt(
    world: EdgeWorld, *, drop: type[x509.ExtensionType] | None = None, signer: Any = None, **put: x509.ExtensionType
) -> str:
    """A certificate as it is issued, with extensions left out or in their place, signed by the issuer's own key."""
    good = x509.load_der_x509_certificate(b64decode(certified(world)))
    builder = (
        x509.CertificateBuilder()
        .issuer_name(good.issuer)
        .subject_name(good.subject)
        .public_key(KEY.public_key())
        .serial_number(7)
        .not_valid_before(good.not_valid_before_utc)
        .not_valid_after(good.not_valid_after_utc)
    )
    others = {type(one): one for one in put.values()}
    for extension in good.extensions:
        if type(extension.value) is not drop:
            value = others.pop(type(extension.value), extension.value)
            builder = builder.add_extension(value, critical=extension.critical)
    for value in others.values():
        builder = builder.add_extension(value, critical=True)
    made = builder.sign(signer or world.issuer_key, None if signer is None else hashes.SHA256())
    return b64encode(made.public_bytes(Encoding.DER)).decode()


def test_a_certificate_lets_its_device_in_and_nobody_else(world: EdgeWorld, connection: GatewayConnection) -> None:
    assert asking(world, connection, certified(world), KEY).status == "OK"
    assert asking(world, connection, certified(world, jobs=("sleep-*",)), KEY).status == "NO_JOB"
    named = certified(world, "ab" * 16, jobs=("heart-*", "sleep"))
    device = read_credential(named, world.federation.charter(), now())
    assert (device.name, device.jobs, device.key) == ("phones/" + "ab" * 16, ("heart-*", "sleep"), KEY.public_key())
    thief = ec.generate_private_key(ec.SECP256R1())
    answer = asking(world, connection, named, thief)
    assert (answer.status, answer.job) == ("INVALID_REQUEST", None)
    assert "not signed by the device" in answer.message


def test_what_its_issuer_did_not_sign_or_may_not_sign_is_refused(
    world: EdgeWorld, connection: GatewayConnection
) -> None:
    others = world.issuer.model_copy(update={"name": "others"})
    authority = x509.BasicConstraints(ca=True, path_length=None)
    more = x509.InhibitAnyPolicy(0)
    two = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"sealwright-charter:{'0' * 64}")] * 2)
    mail = x509.SubjectAlternativeName([x509.RFC822Name("a@example.org")])
    attacks = [
        (certified(world, signing_key=Ed25519PrivateKey.generate()), "signature is not its issuer's"),
        (certified(world, issuer=others), "lets no devices into this charter"),
        (certified(world, at=now() - timedelta(days=100)), "not good now"),
        (certified(world, at=now() + timedelta(days=1)), "not good now"),
        (certified(world, seconds=world.issuer.token_seconds + 1), "longer than its issuer may"),
        (certified(world, charter="0" * 64), "for another charter"),
        (certified(world, key=ec.generate_private_key(ec.SECP384R1()).public_key()), "not on P-256"),
        (certified(world, device="anna"), "no name"),
        (certified(world, jobs=("heart rate",)), "no name"),
        (certified(world, jobs=tuple(f"job-{number}" for number in range(17))), "1 to 16 jobs"),
        (rebuilt(world, authority=authority), "an authority's"),
        (rebuilt(world, more=more), "exactly the extensions"),
        (rebuilt(world, drop=x509.KeyUsage), "exactly the extensions"),
        (rebuilt(world, names=two), "one charter and 1 to 16 jobs"),
        (rebuilt(world, names=mail), "one charter and 1 to 16 jobs"),
        (rebuilt(world, signer=KEY), "cannot be read"),
        (certified(world)[:-4], "cannot be read"),
        ("not base64", "certificate is none"),
    ]
    for certificate, said in attacks:
        answer = asking(world, connection, certificate, KEY)
        assert (answer.status, answer.job) == ("INVALID_REQUEST", None)
        assert said in answer.message, (said, answer.message)


def test_a_name_of_several_parts_is_refused(world: EdgeWorld) -> None:
    good = x509.load_der_x509_certificate(b64decode(certified(world)))
    parts = [*good.subject, x509.NameAttribute(NameOID.ORGANIZATION_NAME, "acme-pharma")]
    builder = x509.CertificateBuilder(
        good.issuer,
        x509.Name(parts),
        KEY.public_key(),
        7,
        good.not_valid_before_utc,
        good.not_valid_after_utc,
        list(good.extensions),
    )
    made = builder.sign(world.issuer_key, None)
    with pytest.raises(Refused, match="common name alone"):
        read_credential(b64encode(made.public_bytes(Encoding.DER)).decode(), world.federation.charter(), now())


def test_a_revoked_device_is_let_in_by_nothing_it_has(world: EdgeWorld, connection: GatewayConnection) -> None:
    """Its token and its certificate are good in all else; as soon as the gateway follows the charter they are not."""
    lost, kept = secrets.token_hex(16), secrets.token_hex(16)
    shown = {name: (world.token(KEY, name), certified(world, name)) for name in (lost, kept)}
    for credentials in shown.values():
        assert [asking(world, connection, one, KEY).status for one in credentials] == ["OK", "OK"]
    try:
        revoked = world.issuer.model_copy(update={"revoked": (lost,)})
        world.federation.change(Changes(put=files_of([revoked])))
        for credential in shown[lost]:
            answer = asking(world, connection, credential, KEY)
            assert (answer.status, answer.job) == ("INVALID_REQUEST", None)
            assert "the device was revoked" in answer.message
        assert [asking(world, connection, one, KEY).status for one in shown[kept]] == ["OK", "OK"]
    finally:
        world.federation.change(Changes(put=files_of([world.issuer])))


def test_no_changed_bit_of_a_certificate_passes(world: EdgeWorld) -> None:
    raw, charter, at = bytearray(b64decode(certified(world))), world.federation.charter(), now()
    passed = []
    for place in range(8 * len(raw)):
        raw[place // 8] ^= 1 << place % 8
        with suppress(Refused):
            read_credential(b64encode(bytes(raw)).decode(), charter, at)
            passed.append(place)
        raw[place // 8] ^= 1 << place % 8
    assert passed == []
    assert read_credential(b64encode(bytes(raw)).decode(), charter, at).key == KEY.public_key()


@given(st.text(max_size=200).filter(lambda text: "." not in text))
@settings(max_examples=100, deadline=None)
def test_what_is_no_certificate_is_refused_and_nothing_else(world: EdgeWorld, text: str) -> None:
    with pytest.raises(Refused):
        read_credential(text, world.federation.charter(), now())
