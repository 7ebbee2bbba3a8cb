"""Making a user's keys and kit: what `fl.environments.kit` opens."""

from __future__ import annotations

import json
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
from policies.charter import Charter
from policies.documents import Right, ServerAddress, User, user_spiffe_id
from policies.keys import private_pem, public_pem, write_secret

CERTIFICATE_DAYS: Final = 365
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


def write_user_kit(
    folder: Path,
    keys: UserKeys,
    charter: Charter,
    root: bytes,
    server: ServerAddress,
    *,
    model_key: bytes | None = None,
) -> None:
    """Write the kit of a user of `charter` (whose first root is `root`) to a new folder, keys 0600."""
    folder.mkdir(mode=0o700, parents=True)
    lines = [f"member = {_quoted(keys.member)}", f"user = {_quoted(keys.name)}", f"charter = {_quoted(charter.id)}"]
    for broker in charter.consortium.brokers:
        lines += ["", "[[brokers]]", f"name = {_quoted(broker.name)}", f"url = {_quoted(broker.url)}"]
    lines += ["", "[server]", f"name = {_quoted(server.name)}", f"address = {_quoted(server.address)}", ""]
    (folder / "kit.toml").write_text("\n".join(lines), "utf-8")
    (folder / "root.json").write_bytes(root)
    (folder / "tls.pem").write_text(keys.tls_certificate, "ascii")
    tls_key = keys.tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_secret(folder / "tls.key", tls_key)
    write_secret(folder / "signing.key", private_pem(keys.signing_key))
    write_secret(folder / "results.key", keys.results_key.private_bytes())
    if model_key is not None:
        write_secret(folder / "model.key", model_key)


def _quoted(text: str) -> str:
    return json.dumps(text)
