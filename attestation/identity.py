"""Who a peer is: an attested guest by its credential, or a user whom the charter names.

A guest's credential is an X.509 certificate over its own P-256 key, issued by a broker, that carries the EARs of k
brokers over that key in an extension. A relying party checks the EARs and the charter itself; the issuer's signature
alone opens nothing, nor does one broker's EAR where the charter asks for more. The certificate lives a day, the EARs a
minute: they are a lease, renewed by newer ones that the guest shows in band (docs/adr/0014-leases-of-a-minute.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.canonical import format_time
from attestation.ear import SKEW, Ear
from attestation.ears import lease_end, unpack_ears, verify_ears
from attestation.errors import EarRefused, PeerLapsed, PeerRefused
from attestation.hybrid import HybridPrivateKey
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from policies.charter import Charter
    from policies.documents import User

EAR_EXTENSION: Final = x509.ObjectIdentifier("1.3.6.1.4.1.59999.1.1")
"""The certificate extension that holds the EARs as `attestation.ears.pack_ears` writes them."""
DNS_SUFFIX: Final = "sealwright.internal"
MAX_CERTIFICATE: Final = 128 * 1024
"""Bytes of the largest certificate that is read."""


def spiffe_id(trust_domain: str, role: str, name: str) -> str:
    """`spiffe://<trust domain>/<role>/<name>`."""
    return f"spiffe://{trust_domain}/{role}/{name}"


def dns_name(role: str, name: str) -> str:
    """The DNS name in the certificate of `name` in `role` (URI names alone fail ordinary host-name checks)."""
    return f"{name}.{role}.{DNS_SUFFIX}"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a guest is, with its private keys: for its own use inside the guest. It never prints its keys."""

    spiffe_id: str
    role: str
    name: str
    tls_key_pem: str = field(repr=False)
    certificate_pem: str
    """The leaf, then its issuer."""
    sign_key: Ed25519PrivateKey = field(repr=False)
    kem_key: HybridPrivateKey = field(repr=False)
    ears: tuple[str, ...]
    """The EARs of the newest attestation, as tokens: those of at least k brokers."""
    lease_ends: datetime
    """When too few of them are left."""

    @property
    def dns_name(self) -> str:
        """The certificate's DNS name."""
        return dns_name(self.role, self.name)

    @property
    def certificate_der(self) -> bytes:
        """The leaf in DER."""
        return x509.load_pem_x509_certificates(self.certificate_pem.encode())[0].public_bytes(Encoding.DER)


@dataclass(frozen=True, slots=True)
class Peer:
    """An attested guest whose credential and place were checked."""

    role: str
    name: str
    member: str
    ears: tuple[Ear, ...]
    """Those that held: of at least k brokers."""
    spiffe_id: str
    good_until: datetime
    """When its lease ends, if it shows no newer EARs, or its certificate."""

    @property
    def ear(self) -> Ear:
        """One of its EARs; as far as they speak of the guest, all say the same."""
        return self.ears[0]


def appraise_peer(
    certificate_der: bytes,
    charter: Charter,
    at: datetime,
    *,
    role: str | None = None,
    ears: Sequence[str] | None = None,
) -> Peer:
    """Check the guest behind a certificate (from a TLS handshake that proved its key) against `charter` at `at`.

    `role` is the role it must have. `ears` are newer EARs over the same key, presented in band; without them those in
    the certificate count. Checked: issuer, validity, names, EARs (of k distinct brokers, each by signature, time,
    charter, affirming; all over this key and one guest), and that its enrolment and image still stand in this charter.
    Raises PeerRefused with every reason: PeerLapsed if there is nothing against it but that its lease has ended.
    """
    certificate = _load_certificate(certificate_der)
    reasons = [*_issuance_reasons(certificate, charter, at)]
    names = _names(certificate, charter.consortium.trust_domain, reasons)
    key_digest = _key_digest(certificate, reasons)
    tokens = _certificate_ears(certificate, reasons) if ears is None else tuple(ears)
    verified: tuple[Ear, ...] = ()
    lapsed = False
    if tokens:
        try:
            verified = verify_ears(tokens, charter, at)
        except EarRefused as error:
            lapsed = error.lapsed and not reasons
            reasons += error.reasons
    if verified:
        subject = verified[0].subject
        if names is not None and names != (subject.role, subject.name):
            reasons.append(f"the certificate names {'/'.join(names)}, its EARs {subject.role}/{subject.name}")
        if key_digest is not None and verified[0].keys.get("tls") != key_digest:
            reasons.append("the EARs are about another TLS key than the certificate's")
        if role is not None and subject.role != role:
            reasons.append(f"the peer has the role {subject.role}, not {role}")
        reasons += enrolment_reasons(verified[0], charter)
    elif ears is not None and not tokens:
        reasons.append("the peer shows no EARs")
    if reasons or not verified or names is None:
        kind = PeerLapsed if lapsed else PeerRefused
        raise kind(tuple(reasons), who="/".join(names) if names else "peer")
    subject = verified[0].subject
    return Peer(
        subject.role,
        subject.name,
        subject.member,
        verified,
        spiffe_id(charter.consortium.trust_domain, subject.role, subject.name),
        min(lease_end(verified, charter), certificate.not_valid_after_utc),
    )


def enrolment_reasons(ear: Ear, charter: Charter) -> tuple[str, ...]:
    """Why the place that `ear` names does not (or no longer) stand in `charter`; empty if it does."""
    subject, claims = ear.subject, ear.claims
    place = f"{subject.role}/{subject.name}"
    enrolment = charter.enrolment(subject.role, subject.name)
    if enrolment is None:
        return (f"{place} is not enrolled in charter version {charter.version}",)
    reasons = []
    if enrolment.member != subject.member:
        reasons.append(f"{place} is {enrolment.member}'s place, not {subject.member}'s")
    if enrolment.init_data_sha256 != claims.get("host_data"):
        reasons.append(f"{place} is enrolled with other init-data")
    if enrolment.chips is not None and _whole_chip(claims.get("chip_id")) not in map(_whole_chip, enrolment.chips):
        reasons.append(f"{place} is not enrolled on this chip")
    measurement = claims.get("measurement")
    image = charter.image_by_measurement(measurement) if isinstance(measurement, str) else None
    if image is None:
        reasons.append(f"the measurement of {place} is no approved image's")
    else:
        if image.name != enrolment.image or image.name != subject.image:
            reasons.append(f"{place} is enrolled with the image {enrolment.image}, it runs {image.name}")
        if subject.role not in image.roles:
            reasons.append(f"the image {image.name} is not approved for the role {subject.role}")
    return tuple(reasons)


def _whole_chip(chip: object) -> str:
    """A chip id as 64 bytes in hex: Turin's has 8, padded with zeros in a report."""
    return str(chip).ljust(128, "0")


def appraise_user(certificate_der: bytes, charter: Charter, at: datetime) -> User:
    """The user whose certificate (from a TLS handshake that proved its key) this is. Raises PeerRefused.

    A user's certificate is in the charter byte for byte, so no issuer and no name in it needs to be believed.
    """
    certificate = _load_certificate(certificate_der)
    for user in charter.users():
        if x509.load_pem_x509_certificate(user.tls_certificate.encode()).public_bytes(Encoding.DER) == certificate_der:
            reasons = [*_validity_reasons(certificate, at)]
            expected = f"spiffe://{charter.consortium.trust_domain}/user/{user.member}/{user.name}"
            if _uris(certificate) != [expected]:
                reasons.append(f"the certificate does not carry the name {expected}")
            if reasons:
                raise PeerRefused(tuple(reasons), who=f"user {user.member}/{user.name}")
            return user
    raise PeerRefused((f"no user of charter version {charter.version} has this certificate",), who="user")


def _load_certificate(der: bytes) -> x509.Certificate:
    if len(der) > MAX_CERTIFICATE:
        raise PeerRefused((f"the certificate has {len(der)} bytes, more than {MAX_CERTIFICATE}",), who="peer")
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.public_key()
        if certificate.extensions is None or certificate.public_bytes(Encoding.DER) != der:
            raise ValueError("it is not in its own DER form")
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise PeerRefused((f"the certificate cannot be read: {error}",), who="peer") from error
    return certificate


def _issuance_reasons(certificate: x509.Certificate, charter: Charter, at: datetime) -> list[str]:
    reasons = _validity_reasons(certificate, at)
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    if lifetime > timedelta(seconds=charter.consortium.credential_seconds) + 2 * SKEW:
        reasons.append("the certificate lives longer than the charter allows")
    if not any(_issued_by(certificate, broker.issuer_certificate) for broker in charter.consortium.brokers):
        reasons.append("the certificate is issued by no broker of this charter")
    try:
        if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            reasons.append("the certificate is an authority's")
    except x509.ExtensionNotFound:
        reasons.append("the certificate does not say that it is no authority's")
    return reasons


def _validity_reasons(certificate: x509.Certificate, at: datetime) -> list[str]:
    if not certificate.not_valid_before_utc - SKEW <= at <= certificate.not_valid_after_utc:
        first, last = format_time(certificate.not_valid_before_utc), format_time(certificate.not_valid_after_utc)
        return [f"the certificate is valid from {first} to {last}, not now"]
    return []


def _issued_by(certificate: x509.Certificate, issuer_pem: str) -> bool:
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(issuer_pem.encode()))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _names(certificate: x509.Certificate, trust_domain: str, reasons: list[str]) -> tuple[str, str] | None:
    uris = _uris(certificate)
    prefix = f"spiffe://{trust_domain}/"
    parts = uris[0].removeprefix(prefix).split("/") if len(uris) == 1 and uris[0].startswith(prefix) else []
    if len(parts) != 2:
        reasons.append(f"the certificate does not carry exactly one name {prefix}ROLE/NAME")
        return None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if names.get_values_for_type(x509.DNSName) != [dns_name(parts[0], parts[1])]:
        reasons.append(f"the certificate's DNS name is not {dns_name(parts[0], parts[1])}")
    return parts[0], parts[1]


def _key_digest(certificate: x509.Certificate, reasons: list[str]) -> str | None:
    key = certificate.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        reasons.append("the certificate's key is not on P-256")
        return None
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _certificate_ears(certificate: x509.Certificate, reasons: list[str]) -> tuple[str, ...]:
    """The EARs in a certificate, unchecked."""
    try:
        extension = certificate.extensions.get_extension_for_oid(EAR_EXTENSION).value
    except x509.ExtensionNotFound:
        reasons.append("the certificate carries no EAR")
        return ()
    try:
        return unpack_ears(extension.value if isinstance(extension, x509.UnrecognizedExtension) else b"")
    except SealwrightError as error:
        reasons.append(error.what)
        return ()
