"""A user's keys: made on the user's own machine, in a folder that becomes the `local/` of the user's kit.

Only the request travels: the public halves, as the member puts them into the charter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from attestation.canonical import b64
from attestation.hybrid import HybridPrivateKey
from policies.documents import Right, User, parse_document, user_spiffe_id
from policies.errors import MalformedDocument, Unusable
from policies.keys import private_pem, public_pem, write_secret

CERTIFICATE_DAYS: Final = 365
REQUEST: Final = "request.json"
_BACKDATED: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class UserKeys:
    """A person's three keys: for TLS (with its self-signed certificate), for signing jobs, and for opening results."""

    member: str
    name: str
    tls_key: ec.EllipticCurvePrivateKey = field(repr=False)
    tls_certificate: str
    signing_key: Ed25519PrivateKey = field(repr=False)
    results_key: HybridPrivateKey = field(repr=False)

    def document(self, *, rights: Iterable[Right]) -> User:
        """The user as its member puts it into the charter."""
        return User(
            name=self.name,
            member=self.member,
            tls_certificate=self.tls_certificate,
            signing_key=public_pem(self.signing_key),
            results_key=b64(self.results_key.public_bytes()),
            rights=tuple(rights),
        )


def create_user_keys(trust_domain: str, member: str, name: str, at: datetime) -> UserKeys:
    """Make a person's keys; the certificate carries the one name that the charter will know it by."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{member}/{name}"[:64])])
    uri = x509.UniformResourceIdentifier(user_spiffe_id(trust_domain, member, name))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _BACKDATED)
        .not_valid_after(at + timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
    return UserKeys(member, name, key, pem, Ed25519PrivateKey.generate(), HybridPrivateKey.generate())


def write_user_keys(folder: Path, keys: UserKeys, *, model_key: bytes | None = None) -> None:
    """Write a person's keys into a new folder (0700), each in a file of mode 0600.

    `model_key`, 32 bytes, is what first models are sealed under: for those who submit jobs. Raises Unusable if the
    folder is there already.
    """
    if folder.exists():
        raise Unusable("there is something already", where=str(folder), do="Name a new folder.")
    folder.mkdir(mode=0o700, parents=True)
    (folder / "tls.pem").write_text(keys.tls_certificate, "ascii")
    tls_key = keys.tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_secret(folder / "tls.key", tls_key)
    write_secret(folder / "signing.key", private_pem(keys.signing_key))
    write_secret(folder / "results.key", keys.results_key.private_bytes())
    if model_key is not None:
        write_secret(folder / "model.key", model_key)
    (folder / REQUEST).write_bytes(keys.document(rights=()).to_bytes())


def user_of_request(raw: bytes, where: str, *, member: str, name: str, rights: Iterable[Right]) -> User:
    """The user that a request asks for, with the rights that the plan gives. Raises MalformedDocument for another's."""
    asked = parse_document(User, raw, where)
    if (asked.member, asked.name) != (member, name):
        raise MalformedDocument(
            f"this is the request of {asked.member}/{asked.name}, not of {member}/{name}",
            where=where,
            do="Name the right file.",
        )
    return asked.model_copy(update={"rights": tuple(rights)})
