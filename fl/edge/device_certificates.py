"""Device certificates: what a token says (`fl.edge.tokens`), as an X.509 certificate by the same issuer's key.

For fleets whose devices have certificates anyway. It stands where the token stands, within the sealed message: a load
balancer that ends TLS would see, and could not pass on, a certificate of TLS. The message is signed by the
certificate's key over a random id of its own, which is the proof of possession.

The form (RFC 5280), and nothing else: version 3, signed by Ed25519; issuer `CN=NAME`, subject `CN=DEVICE` (32 hex
digits); a P-256 key; critical basicConstraints (no CA) and keyUsage (digitalSignature); subjectAltName of the URIs
`sealwright-charter:ID` and, for each job, `sealwright-job:PATTERN`.
"""

from __future__ import annotations

import re
import warnings
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from attestation.canonical import unb64
from attestation.jws import ed25519_public_key
from fl.edge.tokens import Device, device_of, refused
from policies.devices import is_job_pattern
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from policies.charter import Charter
    from policies.devices import DeviceIssuer

MAX_JOBS: Final = 16
_CHARTER: Final = "sealwright-charter:"
_JOB: Final = "sealwright-job:"
_DEVICE: Final = re.compile(r"[0-9a-f]{32}")
_EXTENSIONS: Final = {
    ExtensionOID.BASIC_CONSTRAINTS: True,
    ExtensionOID.KEY_USAGE: True,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME: False,
}
"""What a certificate has, and whether it is critical."""
_AMISS: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What parsing raises for one that is malformed."""
_SIGNATURE: Final = b"\x03\x41\x00"
"""Before an Ed25519 signature: a BIT STRING of 64 bytes, no bit of which is unused; the parser does not look."""
_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def issue_certificate(
    issuer: DeviceIssuer,
    signing_key: Ed25519PrivateKey,
    charter: str,
    key: EllipticCurvePublicKey,
    device: str,
    at: datetime,
    *,
    jobs: tuple[str, ...] = ("*",),
    seconds: int | None = None,
) -> str:
    """A certificate for the device with the random id `device` (32 hex digits), as the base64 of its DER."""
    names = [x509.UniformResourceIdentifier(f"{_CHARTER}{charter}")]
    names += [x509.UniformResourceIdentifier(f"{_JOB}{job}") for job in jobs]
    begins = at.replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(_named(issuer.name))
        .subject_name(_named(device))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(seconds=issuer.token_seconds if seconds is None else seconds))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_USAGE, critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signing_key, None)
    )
    return b64encode(certificate.public_bytes(Encoding.DER)).decode()


def read_certificate(text: str, charter: Charter, at: datetime) -> Device:
    """The device that a certificate (base64 of DER) is about, under `charter` at `at`. Raises Refused with every
    reason."""
    try:
        found = _certificate(text)
    except SealwrightError as error:
        raise refused(f"the certificate is none: {error.what}") from error
    issuer = charter.device_issuer(found.issuer)
    if issuer is None:
        raise refused(f"the certificate is by {found.issuer!r:.80}, which lets no devices into this charter")
    if not _is_signed(text, issuer.signing_key):
        raise refused("the certificate's signature is not its issuer's")
    return device_of(
        issuer,
        charter,
        at,
        what="certificate",
        names_charter=found.charter,
        device=found.device,
        key=found.key,
        jobs=found.jobs,
        issued=int(found.begins.timestamp()),
        ends=int(found.ends.timestamp()),
    )


@dataclass(frozen=True, slots=True)
class _Certificate:
    """What a well-formed certificate says. Nobody has vouched for it yet."""

    issuer: str
    device: str
    key: EllipticCurvePublicKey
    charter: str
    jobs: tuple[str, ...]
    begins: datetime
    ends: datetime


@lru_cache(maxsize=4096)
def _certificate(text: str) -> _Certificate:
    """Read a certificate of exactly our form. Raises Refused."""
    parsed = _parsed(text)
    try:
        found, key = parsed.extensions, parsed.public_key()
        if {one.oid: one.critical for one in found} != _EXTENSIONS or parsed.version is not x509.Version.v3:
            raise ValueError("it has not exactly the extensions that it should have")
        if found.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("it is an authority's")
        if found.get_extension_for_class(x509.KeyUsage).value != _USAGE:
            raise ValueError("its key has another use")
        if parsed.signature_algorithm_oid != SignatureAlgorithmOID.ED25519:
            raise ValueError("it is not signed by Ed25519")
        if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
            raise ValueError("the device's key is not on P-256")
        names = list(found.get_extension_for_class(x509.SubjectAlternativeName).value)
        uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
        charters = [uri.removeprefix(_CHARTER) for uri in uris if uri.startswith(_CHARTER)]
        jobs = tuple(uri.removeprefix(_JOB) for uri in uris if uri.startswith(_JOB))
        if len(charters) != 1 or not 1 <= len(jobs) <= MAX_JOBS or len(names) != 1 + len(jobs):
            raise ValueError("its names are not one charter and 1 to 16 jobs")
        device = _common_name(parsed.subject)
        if not _DEVICE.fullmatch(device) or not all(map(is_job_pattern, jobs)):
            raise ValueError("its device or a job is no name")
        begins, ends = parsed.not_valid_before_utc, parsed.not_valid_after_utc
        return _Certificate(_common_name(parsed.issuer), device, key, charters[0], jobs, begins, ends)
    except _AMISS as error:
        raise refused(f"the certificate is malformed: {error}"[:200]) from error


@lru_cache(maxsize=4096)
def _is_signed(text: str, signing_key: str) -> bool:
    """Whether `signing_key` has signed a well-formed certificate: checked once, as a token's signature is."""
    parsed = _parsed(text)
    try:
        ed25519_public_key(signing_key).verify(parsed.signature, parsed.tbs_certificate_bytes)
    except InvalidSignature:
        return False
    return True


def _parsed(text: str) -> x509.Certificate:
    raw = unb64(text, where="certificate")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CryptographyDeprecationWarning)  # what is let pass still, and is amiss
            parsed = x509.load_der_x509_certificate(raw)
        if parsed.public_bytes(Encoding.DER) != raw or not raw.endswith(_SIGNATURE + parsed.signature):
            raise ValueError("it is not in DER")
    except _AMISS as error:
        raise refused("it cannot be read") from error
    return parsed


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _common_name(name: x509.Name) -> str:
    attributes = list(name)
    if len(attributes) != 1 or attributes[0].oid != NameOID.COMMON_NAME:
        raise ValueError("a name in it is not a common name alone")
    return str(attributes[0].value)
