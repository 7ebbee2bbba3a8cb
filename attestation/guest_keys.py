"""The keys that a guest makes for itself at its start and has attested, each for one purpose."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from attestation.canonical import digests
from attestation.hybrid import HybridPrivateKey


class GuestKeys:
    """A guest's private keys: `tls` (P-256), `sign` (Ed25519), `kem` (ML-KEM-768 with X25519)."""

    def __init__(self) -> None:
        self.tls = ec.generate_private_key(ec.SECP256R1())
        self.sign = Ed25519PrivateKey.generate()
        self.kem = HybridPrivateKey.generate()
        spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        self.public = {
            "kem": self.kem.public_bytes(),
            "sign": self.sign.public_key().public_bytes(*spki),
            "tls": self.tls.public_key().public_bytes(*spki),
        }
        """The public keys by purpose, as REPORT_DATA binds them (attestation.binding)."""
        self.digests = digests(self.public)
        """Their SHA-256 in hex, as EARs have them."""

    def certificate_request(self) -> bytes:
        """A PKCS#10 request in DER that proves possession of the TLS key; the broker knows the names."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self.tls, hashes.SHA256()).public_bytes(Encoding.DER)

    def tls_pem(self) -> str:
        """The TLS key in PEM."""
        return self.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")
