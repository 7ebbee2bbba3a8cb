"""A consortium of three members with keys, users, images and enrolments, made fresh for each test."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, Signed

from policies.charter import Changes, Lifetimes, amend, files_of, found
from policies.charter.layout import tuf_key
from policies.charter.trust import metadata_bytes
from policies.documents import (
    RESULTS_KEY_SIZE,
    BrokerEntry,
    BundleApproval,
    Consortium,
    Document,
    Enrolment,
    ImageReference,
    Member,
    ReferenceMeasurement,
    User,
    VirtualRoot,
    user_spiffe_id,
)
from policies.keys import public_pem

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")
TRUST_DOMAIN = "virtual.research.example"


def issuer(name: str) -> str:
    """A broker's self-signed P-256 CA certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} issuer")])
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def user(member: str, name: str, *, trust_domain: str = TRUST_DOMAIN, san: str | None = None) -> User:
    """A user with fresh keys; `san` overrides the SPIFFE id in the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    uri = san or user_spiffe_id(trust_domain, member, name)
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
    )
    return User(
        name=name,
        member=member,
        tls_certificate=builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode(),
        signing_key=public_pem(Ed25519PrivateKey.generate()),
        results_key=base64.b64encode(bytes(RESULTS_KEY_SIZE)).decode(),
        rights=("submit", "download"),
    )


def image(name: str, measurement: str = "ab" * 48) -> ImageReference:
    """A virtual image with one measurement, for servers and sites."""
    reference = ReferenceMeasurement(
        measurement=measurement, vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1
    )
    return ImageReference(
        name=name,
        platform="virtual",
        manifest_sha256="cd" * 32,
        svn=1,
        measurements=(reference,),
        roles=("server", "site"),
    )


def enrolment(role: str, name: str, member: str, image_name: str = "demo") -> Enrolment:
    """A place for one guest."""
    return Enrolment.model_validate(
        {"role": role, "name": name, "member": member, "image": image_name, "init_data_sha256": "ef" * 32}
    )


def bundle(digest: str = "12" * 32) -> BundleApproval:
    """An approval for the two sites."""
    return BundleApproval(
        bundle=digest,
        job="hello-pt",
        sites=("borealis", "cygnus"),
        expires=NOW + timedelta(days=30),
    )


RELEASE = b'package sealwright.release\n\nimport rego.v1\n\ndefault allow := false\n\nreasons contains "no" if true\n'


@dataclass
class World:
    """The consortium, its keys, and the store that it founded."""

    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    broker_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    consortium: Consortium = field(init=False)
    store: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in MEMBERS}
        self.consortium = Consortium(
            name="tumour-atlas",
            platform="virtual",
            trust_domain=TRUST_DOMAIN,
            members=tuple(Member(name=name, public_key=public_pem(key)) for name, key in self.keys.items()),
            brokers=(
                BrokerEntry(
                    name="broker-1",
                    member="acme-pharma",
                    url="https://127.0.0.1:8443",
                    signing_key=public_pem(self.broker_key),
                    issuer_certificate=issuer("broker-1"),
                ),
            ),
            threshold=2,
            virtual_roots=(VirtualRoot(product="Milan", ark_spki_sha256="aa" * 32),),
        )

    @property
    def root(self) -> bytes:
        return self.store["metadata/1.root.json"]

    def documents(self) -> tuple[Document, ...]:
        return (
            image("demo"),
            enrolment("server", "server", "acme-pharma"),
            enrolment("site", "borealis", "borealis-hospital"),
            enrolment("site", "cygnus", "cygnus-bio"),
            bundle(),
            user("acme-pharma", "ada"),
        )

    def files(self) -> dict[str, bytes]:
        return {
            **files_of(self.documents()),
            "policies/floor.rego": b"package sealwright.floor\n\nimport rego.v1\n\ndefault allow := true\n",
            "members/borealis-hospital/release/key.data.rego": RELEASE,
        }

    def found(self, *, lifetimes: Lifetimes | None = None) -> World:
        self.store = found(
            self.consortium, self.files(), self.keys.values(), [self.broker_key], NOW, lifetimes=lifetimes
        )
        return self

    def amend(self, changes: Changes, *, by: tuple[str, ...] = MEMBERS[:2], at: datetime = NOW) -> dict[str, bytes]:
        return amend(self.store, changes, [self.keys[name] for name in by], [self.broker_key], at)

    def put(self, *documents: Document) -> Changes:
        return Changes(put=files_of(documents))

    def with_consortium(self, **changes: object) -> Consortium:
        return Consortium.model_validate({**self.consortium.model_dump(), **changes})


def changed(store: Mapping[str, bytes], name: str, raw: bytes) -> dict[str, bytes]:
    """The store with one file replaced."""
    return {**store, name: raw}


def parsed(store: dict[str, bytes], name: str) -> Metadata[Any]:
    return Metadata.from_bytes(store[f"metadata/{name}.json"])


def signed_by(signed: Signed, *keys: Ed25519PrivateKey) -> bytes:
    metadata: Metadata[Any] = Metadata(signed)  # type: ignore[type-var]  # one of TUF's four
    for key in keys:
        keyid = tuf_key(public_pem(key)).keyid
        metadata.signatures[keyid] = Signature(keyid, key.sign(metadata.signed_bytes).hex())
    return metadata_bytes(metadata)


def both(world: World) -> list[Ed25519PrivateKey]:
    return [world.keys[name] for name in MEMBERS[:2]]


def compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
