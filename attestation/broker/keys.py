"""The issuer's key: credentials of guests, and the broker's own TLS certificate."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from attestation.ears import pack_ears
from attestation.identity import EAR_EXTENSION, dns_name, spiffe_id
from policies.errors import UnusableKey
from policies.keys import read_secret, write_secret

ISSUER_YEARS: Final = 10
SERVER_DAYS: Final = 7
_BACKDATED: Final = timedelta(minutes=1)


def create_issuer(path: Path, broker: str, at: datetime) -> str:
    """Make the issuer's P-256 key at `path` (0600) and return its self-signed CA certificate (PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{broker} broker issuer")])
    certificate = (
        _builder(name, name, key.public_key(), at, timedelta(days=365 * ISSUER_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


class Issuer:
    """Issues certificates under the broker's issuer certificate."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.certificate_pem = certificate.public_bytes(Encoding.PEM).decode("ascii")

    def guest_certificate(
        self,
        public_key: ec.EllipticCurvePublicKey,
        *,
        trust_domain: str,
        role: str,
        name: str,
        ears: Sequence[str],
        at: datetime,
        seconds: int,
    ) -> bytes:
        """A guest's credential in DER: its own TLS key, its names, its EARs."""
        uri = x509.UniformResourceIdentifier(spiffe_id(trust_domain, role, name))
        return (
            self._leaf(f"{role}/{name}"[:64], public_key, at, timedelta(seconds=seconds))
            .add_extension(x509.SubjectAlternativeName([uri, x509.DNSName(dns_name(role, name))]), critical=False)
            .add_extension(x509.UnrecognizedExtension(EAR_EXTENSION, pack_ears(ears)), critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )

    def server_certificate(
        self, public_key: ec.EllipticCurvePublicKey, name: str, roles: Sequence[str], at: datetime
    ) -> bytes:
        """The TLS certificate of `name` in these roles (`broker`, `witness`) in DER, for SERVER_DAYS."""
        names = [x509.DNSName(dns_name(role, name)) for role in roles]
        return (
            self._leaf(f"{roles[0]}/{name}"[:64], public_key, at, timedelta(days=SERVER_DAYS))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )

    def _leaf(
        self, subject: str, public_key: ec.EllipticCurvePublicKey, at: datetime, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer_key = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            _builder(name, self._certificate.subject, public_key, at, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        )


def load_issuer(path: Path, certificate_pem: str) -> Issuer:
    """Read the issuer's key, which must be that of its certificate in the charter. Raises UnusableKey."""
    do = "Use the key that `seal broker init` made together with this broker's entry in the charter."
    try:
        key = load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError) as error:
        raise UnusableKey("this is no private key in PEM", where=str(path), do=do) from error
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UnusableKey("this is not the key of the broker's issuer certificate", where=str(path), do=do)
    return Issuer(key, certificate)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, at: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    start = at.replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(start + lifetime)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
