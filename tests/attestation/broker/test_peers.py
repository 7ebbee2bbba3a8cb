"""Whom a peer takes for a guest or a user: each part of a credential that could be another's, or old."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from attestation.broker.keys import Issuer, create_issuer, load_issuer
from attestation.canonical import b64
from attestation.ear import (
    CharterReference,
    EarDocument,
    Subject,
    SubmoduleAppraisal,
    parse_ear_document,
    sign_ear,
    verify_ear,
)
from attestation.errors import EarRefused, PeerRefused
from attestation.hybrid import HybridPrivateKey
from attestation.identity import appraise_peer, appraise_user
from policies.charter import Charter
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import User
from policies.errors import Unusable
from policies.keys import public_pem

Credential = Callable[..., bytes]
NORTH = Subject(role="site", name="north", member="borealis-hospital", image="site-image")


@pytest.fixture
def charter(world: Any) -> Charter:
    found: Charter = world.charter()
    return found


@pytest.fixture
def at(charter: Charter) -> datetime:
    return charter.expires - timedelta(hours=20)


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def ear_document(
    world: Any, charter: Charter, key: ec.EllipticCurvePrivateKey, at: datetime, **changes: Any
) -> EarDocument:
    """The EAR that an honest broker gives site/north over this key; `changes` to any field."""
    claims = {
        "measurement": "01" * 48,
        "host_data": sha256(world.init_data["site/north"]).hexdigest(),
        "chip_id": "00" * 64,
        **changes.pop("claims", {}),
    }
    honest: dict[str, Any] = {
        "eat_profile": "urn:sealwright:ear:1",
        "iat": int(at.timestamp()),
        "exp": int(at.timestamp()) + 60,
        "iss": "one",
        "nonce": "n",
        "charter": changes.pop("reference", CharterReference(id=charter.id, version=charter.version)),
        "platform": "virtual",
        "subject": NORTH,
        "keys": {"tls": sha256(spki(key)).hexdigest()},
        "submods": {
            "cpu0": SubmoduleAppraisal(
                status=changes.pop("status", "affirming"), vector={}, policy="p", evidence=claims
            )
        },
    }
    return EarDocument(**{**honest, **changes})


@pytest.fixture
def credential(world: Any, charter: Charter, key: ec.EllipticCurvePrivateKey, at: datetime) -> Credential:
    """Makes a certificate over `key`; `ear_key`, `issuer` and the EAR's fields may be another's."""
    own = load_issuer(world.folder / "one/keys/issuer.pem", world.entries[0].issuer_certificate)

    def make(
        *,
        issuer: Issuer = own,
        ear_key: Ed25519PrivateKey | None = None,
        role: str = "site",
        name: str = "north",
        seconds: int = 86_400,
        issued: datetime | None = None,
        over: ec.EllipticCurvePrivateKey = key,
        **ear: Any,
    ) -> bytes:
        token = sign_ear(ear_document(world, charter, key, at, **ear), ear_key or world.broker_key())
        return issuer.guest_certificate(
            over.public_key(),
            trust_domain="virtual.trial",
            role=role,
            name=name,
            ears=[token],
            at=issued or at,
            seconds=seconds,
        )

    return make


def refusal(certificate: bytes, charter: Charter, at: datetime, **more: Any) -> str:
    with pytest.raises(PeerRefused) as refused:
        appraise_peer(certificate, charter, at, **more)
    return "\n".join(refused.value.reasons)


def test_an_honest_guest_is_taken(credential: Credential, charter: Charter, at: datetime) -> None:
    peer = appraise_peer(credential(), charter, at, role="site")
    assert (peer.spiffe_id, peer.member) == ("spiffe://virtual.trial/site/north", "borealis-hospital")
    assert peer.ear.expires_at == at + timedelta(seconds=60)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys": {"tls": "0" * 64}}, "another TLS key"),
        ({"keys": {}}, "another TLS key"),
        ({"status": "warning"}, "is warning, not affirming"),
        ({"status": "none"}, "is none, not affirming"),
        ({"platform": "hardware"}, "about a hardware guest"),
        ({"exp": 2_000_000_000_0}, "lives longer than the charter allows"),
        ({"reference": CharterReference(id="0" * 64, version=1)}, "another charter"),
        ({"iss": "two"}, "no broker of this charter"),
        ({"subject": NORTH.model_copy(update={"name": "south"})}, "the certificate names site/north"),
        ({"subject": NORTH.model_copy(update={"member": "cygnus-bio"})}, "is borealis-hospital's place"),
        ({"subject": NORTH.model_copy(update={"image": "server-image"})}, "enrolled with the image"),
        ({"claims": {"measurement": "03" * 48}}, "no approved image's"),
        ({"claims": {"measurement": "02" * 48}}, "it runs server-image"),
        ({"claims": {"host_data": "0" * 64}}, "enrolled with other init-data"),
        ({"role": "server", "name": "hub"}, "the certificate names server/hub"),
        ({"role": "site", "name": "a/b"}, "exactly one name"),
        ({"seconds": 90_000}, "lives longer than the charter allows"),
        ({"ear_key": Ed25519PrivateKey.generate()}, "signature is not broker one's"),
        ({"over": ec.generate_private_key(ec.SECP256R1())}, "another TLS key"),
    ],
)
def test_each_part_that_is_anothers_is_refused(
    credential: Credential, charter: Charter, at: datetime, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(credential(**changes), charter, at)


def test_another_issuer_is_refused(credential: Credential, charter: Charter, at: datetime, tmp_path: Any) -> None:
    stranger = load_issuer(tmp_path / "k.pem", create_issuer(tmp_path / "k.pem", "one", at))
    assert "issued by no broker" in refusal(credential(issuer=stranger), charter, at)


def test_time_ends_it(credential: Credential, charter: Charter, at: datetime) -> None:
    certificate = credential()
    assert "the EAR ended" in refusal(certificate, charter, at + timedelta(seconds=60))
    assert "from the future" in refusal(certificate, charter, at - timedelta(seconds=90))
    late = refusal(credential(issued=at - timedelta(days=2)), charter, at)
    assert "not now" in late


def test_the_wrong_role_is_refused(credential: Credential, charter: Charter, at: datetime) -> None:
    assert "has the role site, not server" in refusal(credential(), charter, at, role="server")


def test_a_newer_ear_in_band_counts_if_it_is_about_the_same_key(
    world: Any, credential: Credential, charter: Charter, at: datetime, key: ec.EllipticCurvePrivateKey
) -> None:
    later = at + timedelta(seconds=50)
    newer = sign_ear(ear_document(world, charter, key, later), world.broker_key())
    after = at + timedelta(seconds=80)
    assert appraise_peer(credential(), charter, after, ears=[newer]).ear.token == newer
    other = sign_ear(ear_document(world, charter, ec.generate_private_key(ec.SECP256R1()), later), world.broker_key())
    assert "another TLS key" in refusal(credential(), charter, after, ears=[other])


def test_a_withdrawn_place_is_refused(world: Any, credential: Credential, charter: Charter, at: datetime) -> None:
    certificate = credential()
    emptied = dataclasses.replace(
        charter, documents={path: doc for path, doc in charter.documents.items() if "site/north" not in path}
    )
    assert "not enrolled" in refusal(certificate, emptied, at)


def test_what_is_no_credential_is_refused(charter: Charter, at: datetime, key: ec.EllipticCurvePrivateKey) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    plain = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    words = refusal(plain, charter, at)
    assert "carries no EAR" in words
    assert "exactly one name" in words
    for raw in (b"", b"\x30\x00", plain + b"\0", b"\0" * 200_000):
        assert refusal(raw, charter, at)


def test_any_flipped_bit_of_a_credential_is_noticed(credential: Credential, charter: Charter, at: datetime) -> None:
    certificate = credential()
    for position in range(0, len(certificate), 7):
        changed = bytearray(certificate)
        changed[position] ^= 1 << (position % 8)
        assert refusal(bytes(changed), charter, at)


def test_an_ear_has_one_form(world: Any, charter: Charter, at: datetime, key: ec.EllipticCurvePrivateKey) -> None:
    document = ear_document(world, charter, key, at)
    token = sign_ear(document, world.broker_key())
    assert verify_ear(token, charter, at).document == document
    payload = document.model_dump(mode="json", by_alias=True)
    for change in ({"more": 1}, {"iat": "1"}, {"submods": {}}, {"keys": {"tls": "A"}}, {"nonce": None}):
        with pytest.raises(Unusable):
            parse_ear_document({**copy.deepcopy(payload), **change})
    with pytest.raises(EarRefused):
        verify_ear(token, charter, at + timedelta(hours=1))


def test_users_are_who_the_charter_says(world: Any, charter: Charter, at: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = self_signed(key, "spiffe://virtual.trial/user/acme-pharma/ada", at)
    user = User(
        name="ada",
        member="acme-pharma",
        tls_certificate=certificate.public_bytes(Encoding.PEM).decode(),
        signing_key=public_pem(Ed25519PrivateKey.generate()),
        results_key=b64(HybridPrivateKey.generate().public_bytes()),
        rights=("submit",),
    )
    world.change(Changes(put=files_of([user])))
    named = world.charter()
    assert appraise_user(certificate.public_bytes(Encoding.DER), named, at) == user
    again = self_signed(key, "spiffe://virtual.trial/user/acme-pharma/ada", at)
    with pytest.raises(PeerRefused, match="no user"):
        appraise_user(again.public_bytes(Encoding.DER), named, at)
    with pytest.raises(PeerRefused, match="not now"):
        appraise_user(certificate.public_bytes(Encoding.DER), named, at + timedelta(days=30))


def self_signed(key: ec.EllipticCurvePrivateKey, uri: str, at: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ada")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=10))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )
