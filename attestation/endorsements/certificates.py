"""Reading vendors' certificates and revocation lists: DER or PEM in, objects out, sizes bounded.

The chain is checked by hand (`chain.py`) and not by a general path builder: AMD's certificates carry serial number zero
and no authority key identifier on the leaf, which general verifiers refuse, and their shape is so narrow that every
name, algorithm and extension can be demanded exactly.
"""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from attestation.errors import MalformedEndorsement

MAX_CERTIFICATE_SIZE = 64 << 10
"""Bytes of one certificate that are read."""

MAX_CRL_SIZE = 4 << 20
"""Bytes of one revocation list that are read."""

MAX_BUNDLE_SIZE = 8 << 20
MAX_BUNDLE_ITEMS = 64

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[^-]{1,6000000}-----END \1-----")
_WARNINGS = threading.Lock()


def split_pem(raw: bytes, label: str) -> tuple[bytes, ...]:
    """The DER (or PEM) items of a file: itself if it is DER, else each PEM block of this label, in order.

    Raises:
        MalformedEndorsement: too large, too many, or PEM without a block of this label.
    """
    if len(raw) > MAX_BUNDLE_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_BUNDLE_SIZE} that are read", label.lower())
    if b"-----BEGIN " not in raw:
        return (raw,)
    blocks = tuple(match.group(0) for match in _PEM.finditer(raw) if match.group(1) == label.encode())
    if not blocks or len(blocks) > MAX_BUNDLE_ITEMS:
        raise _malformed(f"the PEM file holds {len(blocks)} blocks of {label}", label.lower())
    return blocks


@contextmanager
def _strict_names() -> Iterator[None]:
    # A VCEK's serial number is zero, of which pyca/cryptography warns; no other warning is silenced. Of names that
    # break X.520 it only warns, each time they are read: here that is an error, once.
    with _WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Parsed a serial number which wasn't positive")
        warnings.filterwarnings("error", message="Attribute's length must be")
        yield


_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    UserWarning,
)


@lru_cache(maxsize=256)
def _load(raw: bytes) -> x509.Certificate:
    with _strict_names():
        pem = raw.startswith(b"-----")
        certificate = x509.load_pem_x509_certificate(raw) if pem else x509.load_der_x509_certificate(raw)
        # Parsed when asked for: a broken part is refused here, and does not surprise whoever needs it first.
        for part in ("version", "serial_number", "subject", "issuer", "not_valid_before_utc", "not_valid_after_utc"):
            getattr(certificate, part)
        with suppress(x509.DuplicateExtension):  # seen before any is parsed, and judged where extensions are
            certificate.extensions  # noqa: B018
        for signed in ("signature_algorithm_oid", "signature", "tbs_certificate_bytes"):
            getattr(certificate, signed)
        return certificate


def load_certificate(raw: bytes) -> x509.Certificate:
    """Read one certificate, DER or PEM, to its last byte.

    Raises:
        MalformedEndorsement: not exactly one certificate, or more than 64 KiB.
    """
    if len(raw) > MAX_CERTIFICATE_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_CERTIFICATE_SIZE} that are read", "certificate")
    try:
        return _load(raw.strip() if raw.lstrip().startswith(b"-----") else raw)
    except _UNREADABLE as error:
        raise _malformed("this is no X.509 certificate in DER or PEM", "certificate") from error


def load_positive_certificate(raw: bytes) -> x509.Certificate:
    """Read one certificate whose serial number is positive, as RFC 5280 has it and every vendor but AMD keeps it.

    Raises:
        MalformedEndorsement: not exactly one certificate, more than 64 KiB, or a serial number of zero or less.
    """
    certificate = load_certificate(raw)
    if serial_number(certificate) <= 0:
        raise _malformed("the certificate's serial number is not positive", "certificate")
    return certificate


def serial_number(certificate: x509.Certificate) -> int:
    """The serial number, without the warning that `cryptography` gives whenever it reads one that is not positive."""
    with _strict_names():
        return certificate.serial_number


def load_crl(raw: bytes) -> x509.CertificateRevocationList:
    """Read one certificate revocation list, DER or PEM, to its last byte.

    Raises:
        MalformedEndorsement: not exactly one list, or more than 4 MiB.
    """
    if len(raw) > MAX_CRL_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_CRL_SIZE} that are read", "revocation list")
    try:
        with _strict_names():
            crl = x509.load_pem_x509_crl(raw) if raw.startswith(b"-----") else x509.load_der_x509_crl(raw)
            for part in ("issuer", "last_update_utc", "next_update_utc", "signature_algorithm_oid", "signature"):
                getattr(crl, part)
            crl.get_revoked_certificate_by_serial_number(0)  # looks at every entry
        return crl
    except _UNREADABLE as error:
        raise _malformed("this is no X.509 revocation list in DER or PEM", "revocation list") from error


def spki_sha256(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's SubjectPublicKeyInfo in DER, lower-case hex.

    Raises:
        MalformedEndorsement: the key is of a kind that cannot be read.
    """
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _malformed("the certificate's public key cannot be read", "certificate") from error
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _malformed(what: str, where: str) -> MalformedEndorsement:
    return MalformedEndorsement(what, where=where, do="Give certificates and revocation lists as DER or PEM.")
