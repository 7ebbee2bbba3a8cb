"""Whether NVIDIA has revoked a certificate, from OCSP responses and revocation lists that somebody brought.

Nothing is fetched. What is brought counts for what its signature proves: an OCSP response (RFC 6960) is signed by the
certificate's own issuer, or by a responder whose certificate that issuer signed for OCSP; a list (RFC 5280) is signed
by the issuer. A certificate of which nothing at hand speaks is *unknown*, which is not good. The leaf of a device's
chain is signed inside the chip, which publishes neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache
from hashlib import sha1, sha256, sha384

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from attestation.endorsements.certificates import load_crl, load_positive_certificate
from attestation.endorsements.nvidia import name_of, outside_validity, p384_key, signed_by, verifies
from attestation.errors import MalformedEndorsement

MAX_OCSP_SIZE = 64 << 10
MAX_RESPONSES = 64
MAX_LISTS = 16


class Standing(Enum):
    """What is known of a certificate."""

    GOOD = "good"
    REVOKED = "revoked"
    ON_HOLD = "on hold"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RevocationData:
    """What was brought about revocation: OCSP responses in DER, revocation lists in DER or PEM."""

    ocsp: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is known of one certificate at one moment.

    Attributes:
        name: The certificate's common name.
        standing: The worst that current, well-signed data says; UNKNOWN if there is none.
        remark: Why it is not good, in words.
        faulty: UNKNOWN although something at hand speaks of it, but is stale, or not signed by whom it must be.
    """

    name: str
    standing: Standing
    remark: str
    faulty: bool = False


def revocation_of(
    certificates: Sequence[x509.Certificate],
    data: RevocationData,
    at: datetime,
    *,
    max_age: timedelta | None,
    first: int = 0,
) -> tuple[Revocation, ...]:
    """What `data` says of each certificate of a chain (leaf first) from number `first` to the one below the root.

    The chain's signatures must have been verified. `max_age` bounds how long before `at` data may have been made.

    Raises:
        MalformedEndorsement: a response or a list cannot be read at all, or there are too many.
    """
    if len(data.ocsp) > MAX_RESPONSES or len(data.crls) > MAX_LISTS:
        raise _malformed(f"more than {MAX_RESPONSES} responses or {MAX_LISTS} lists", "revocation data")
    responses = [_load_response(raw) for raw in data.ocsp]
    lists = [load_crl(raw) for raw in data.crls]
    return tuple(
        _standing(certificates[number], certificates[number + 1], responses, lists, at, max_age)
        for number in range(first, len(certificates) - 1)
    )


_SEVERITY = (Standing.REVOKED, Standing.ON_HOLD, Standing.GOOD)


def _standing(
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    responses: Iterable[_Response],
    lists: Iterable[x509.CertificateRevocationList],
    at: datetime,
    max_age: timedelta | None,
) -> Revocation:
    name = name_of(certificate)
    said: list[tuple[Standing, str]] = []
    remarks: list[str] = []
    for found in (
        *(_from_response(response, certificate, issuer, at, max_age) for response in responses),
        *(_from_list(crl, certificate, issuer, at, max_age) for crl in lists),
    ):
        if found is None:
            continue
        if found[0] is Standing.UNKNOWN:
            remarks.append(found[1])
        else:
            said.append(found)
    for standing in _SEVERITY:
        for one, remark in said:
            if one is standing:
                return Revocation(name, standing, remark)
    if remarks:
        return Revocation(name, Standing.UNKNOWN, "; ".join(remarks), faulty=True)
    return Revocation(name, Standing.UNKNOWN, "no OCSP response or list at hand speaks of it")


@dataclass(frozen=True, slots=True)
class _Response:
    """A response with the certificates that came in it."""

    basic: ocsp.OCSPResponse
    certificates: tuple[x509.Certificate, ...]


def _load_response(raw: bytes) -> _Response:
    if len(raw) > MAX_OCSP_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_OCSP_SIZE} that are read", "OCSP response")
    return _parse_response(raw)


@lru_cache(maxsize=64)
def _parse_response(raw: bytes) -> _Response:
    try:
        response = ocsp.load_der_ocsp_response(raw)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise _malformed(f"the responder answered {response.response_status.name}", "OCSP response")
        # Parsed when asked for: a broken part is refused here, and does not surprise whoever needs it first.
        for single in response.responses:
            _ = (single.serial_number, single.hash_algorithm, single.issuer_key_hash, single.issuer_name_hash)
            _ = (single.certificate_status, single.this_update_utc, single.next_update_utc, single.revocation_reason)
        encoded = [certificate.public_bytes(Encoding.DER) for certificate in response.certificates]
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise _malformed("this is no OCSP response in DER", "OCSP response") from error
    return _Response(response, tuple(load_positive_certificate(raw) for raw in encoded))


def _from_response(
    response: _Response,
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    at: datetime,
    max_age: timedelta | None,
) -> tuple[Standing, str] | None:
    single = next((one for one in response.basic.responses if _is_about(one, certificate, issuer)), None)
    if single is None:
        return None
    problem = _response_problem(response, issuer, at) or _time_problem(
        single.this_update_utc, single.next_update_utc, at, max_age
    )
    if problem is not None:
        return Standing.UNKNOWN, f"OCSP response: {problem}"
    if single.certificate_status is ocsp.OCSPCertStatus.GOOD:
        return Standing.GOOD, ""
    if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        return _revoked(single.revocation_reason)
    return Standing.UNKNOWN, "the OCSP responder does not know it"


def _is_about(single: ocsp.OCSPSingleResponse, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    key = p384_key(issuer)
    digest = {hashes.SHA1: sha1, hashes.SHA256: sha256, hashes.SHA384: sha384}.get(type(single.hash_algorithm))
    if key is None or digest is None or single.serial_number != certificate.serial_number:
        return False
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    name = issuer.subject.public_bytes()
    return single.issuer_key_hash == digest(point).digest() and single.issuer_name_hash == digest(name).digest()


def _response_problem(response: _Response, issuer: x509.Certificate, at: datetime) -> str | None:
    """Why the response's signature counts for nothing, or None."""
    for signer in (issuer, *response.certificates):
        if not _signature_is_by(response.basic, signer):
            continue
        if signer == issuer:
            return None
        if signer.issuer != issuer.subject or not signed_by(signer, issuer):
            return f"its responder {name_of(signer)} was not appointed by {name_of(issuer)}"
        try:
            usage = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (ValueError, x509.DuplicateExtension, x509.ExtensionNotFound):
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        if ExtendedKeyUsageOID.OCSP_SIGNING not in usage:
            return f"its responder {name_of(signer)} has no certificate for OCSP"
        if outside_validity((signer,), at):
            return f"its responder's certificate is not valid at {at:%Y-%m-%d}"
        return None
    return f"its signature is neither by {name_of(issuer)} nor by a responder it appointed"


def _signature_is_by(response: ocsp.OCSPResponse, signer: x509.Certificate) -> bool:
    key = p384_key(signer)
    algorithm = response.signature_hash_algorithm
    if key is None or not isinstance(algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
        return False
    try:
        key.verify(response.signature, response.tbs_response_bytes, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


def _from_list(
    crl: x509.CertificateRevocationList,
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    at: datetime,
    max_age: timedelta | None,
) -> tuple[Standing, str] | None:
    if crl.issuer != issuer.subject:
        return None
    problem = _time_problem(crl.last_update_utc, crl.next_update_utc, at, max_age)
    if not verifies(issuer, crl.signature, crl.tbs_certlist_bytes):
        problem = f"its signature is not by {name_of(issuer)}"
    try:
        if any(one.critical for one in crl.extensions):
            problem = "it has critical extensions (a partial list?)"
    except (ValueError, x509.DuplicateExtension):
        problem = "its extensions cannot be read"
    if problem is not None:
        return Standing.UNKNOWN, f"revocation list: {problem}"
    entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
    if entry is None:
        return Standing.GOOD, ""
    try:
        reason = entry.extensions.get_extension_for_class(x509.CRLReason).value
    except (ValueError, x509.DuplicateExtension, x509.ExtensionNotFound):
        return _revoked(None)
    return _revoked(reason.reason)


def _revoked(reason: x509.ReasonFlags | None) -> tuple[Standing, str]:
    if reason is x509.ReasonFlags.certificate_hold:
        return Standing.ON_HOLD, "revoked for now (certificate hold)"
    return Standing.REVOKED, f"revoked{'' if reason is None else f' ({reason.value})'}"


def _time_problem(since: datetime, until: datetime | None, at: datetime, max_age: timedelta | None) -> str | None:
    if at < since:
        return f"it was made later, at {since:%Y-%m-%dT%H:%M:%SZ}"
    if until is not None and at > until:
        return f"it ended at {until:%Y-%m-%dT%H:%M:%SZ}"
    if max_age is not None and at - since > max_age:
        return f"it is from {since:%Y-%m-%dT%H:%M:%SZ}, older than {max_age}"
    return None


def _malformed(what: str, where: str) -> MalformedEndorsement:
    return MalformedEndorsement(what, where=where, do="Give OCSP responses as DER, revocation lists as DER or PEM.")
