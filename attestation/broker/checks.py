"""Checks of what guests and owners send, apart from any session: deposits, certificate requests, others' EARs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.broker.journal import digest
from attestation.canonical import parse_time
from attestation.ear import Ear, verify_ear
from attestation.ears import verify_ears
from attestation.jws import ed25519_public_key, read_jws, read_jws_header
from attestation.messages import DEPOSIT_TYPE, MAX_SECRET, Deposit, check_message, value_commitment
from attestation.split import OVERHEAD, parse_share, share_complaint
from policies.charter import Charter
from policies.errors import Refused, Unusable
from policies.vaults import vault_place

DEPOSIT_SKEW: Final = timedelta(minutes=5)


def check_deposit(
    token: str, resource: str, salt: bytes, value: bytes, broker: str, charter: Charter, at: datetime
) -> tuple[Deposit | None, tuple[str, ...]]:
    """What a deposit says, and every reason against it. Raises Unusable for what is no deposit."""
    content, found = check_deposit_token(token, resource, broker, charter, at)
    reasons = [*found]
    most = MAX_SECRET + (OVERHEAD if content is not None and content.generation else 0)
    if len(value) > most:
        reasons.append(f"the value has {len(value)} bytes, more than {most}")
    if content is not None and value_commitment(salt, value) != content.commitment:
        reasons.append("the value is not the one that was signed")
    if content is not None and content.generation:
        reasons += _share_reasons(content, value, charter)
    return content, tuple(reasons)


def _share_reasons(content: Deposit, value: bytes, charter: Charter) -> tuple[str, ...]:
    """What is against a share's bytes: those of the charter's own generation are known by their commitment."""
    split = charter.split(content.resource)
    if split is not None and split.generation == content.generation:
        complaint = share_complaint(split, content.broker, value)
        return () if complaint is None else (complaint,)
    try:
        share = parse_share(value)
    except Unusable as error:
        return (error.what,)
    if share.generation != content.generation:
        return (f"the share is of generation {share.generation}, the deposit of {content.generation}",)
    return ()


def check_deposit_token(
    token: str, resource: str, broker: str, charter: Charter, at: datetime
) -> tuple[Deposit | None, tuple[str, ...]]:
    """What an owner signed, and every reason against it, the value apart. Raises Unusable for what is no deposit."""
    member_name = read_jws_header(token, typ=DEPOSIT_TYPE)
    owner = resource.partition("/")[0]
    member = charter.consortium.member(owner)
    if member is None or member_name != owner:
        return None, (f"{resource} belongs to {owner}; the deposit is signed by {member_name}",)
    try:
        content = check_message(Deposit, read_jws(token, ed25519_public_key(member.public_key), typ=DEPOSIT_TYPE))
    except Refused:
        return None, (f"the deposit's signature is not {owner}'s",)
    reasons = []
    if content.resource != resource:
        reasons.append(f"the deposit is of {content.resource}, not {resource}")
    if content.broker != broker:
        reasons.append(f"the deposit is for the broker {content.broker}, not {broker}")
    if content.charter != charter.id:
        reasons.append("the deposit is under another charter")
    reasons += _split_reasons(content, charter)
    if vault_place(resource) is not None:
        reasons.append(f"{resource} is a vault's key, which its guest makes and deposits")
    if abs(parse_time(content.time, where="deposit") - at) > DEPOSIT_SKEW:
        reasons.append(f"the deposit was signed at {content.time}, not within {DEPOSIT_SKEW} of now")
    return content, tuple(reasons)


def _split_reasons(content: Deposit, charter: Charter) -> tuple[str, ...]:
    """What the charter's word on how a resource is split has against a deposit of it, whole or in part.

    Shares of a later generation than the charter's are kept beside it: they come first, the charter follows.
    """
    split = charter.split(content.resource)
    if split is None:
        return ()
    if content.generation == 0:
        return (f"{content.resource} is split over {', '.join(split.brokers)}: no broker keeps it whole",)
    if content.generation < split.generation:
        return (f"the share is of generation {content.generation}, older than the charter's ({split.generation})",)
    if content.generation == split.generation and content.broker not in split.brokers:
        return (f"the charter gives {content.broker} no share of {content.resource}",)
    return ()


def check_csr(csr: bytes, ear: Ear) -> EllipticCurvePublicKey:
    """The TLS key of a PKCS#10 request, if the request is signed by it and the EAR is about it. Raises Refused."""
    do = "Sign the request with the TLS key that was attested."
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unusable("this is no PKCS#10 request", where="csr", do=do) from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1) or not valid:
        raise Refused("the request is not signed by a key on P-256", where="csr", do=do)
    if ear.keys.get("tls") != digest(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)):
        raise Refused("the request is for another key than the attested one", where="csr", do=do)
    return key


def check_ears(own: Ear, others: Sequence[str], charter: Charter, at: datetime) -> tuple[Ear, ...]:
    """`own` and the EARs of other brokers, if all of them hold, are about one guest and are enough. Raises EarRefused.

    None that does not hold is left out silently: what a broker puts into a certificate it has checked.
    """
    for token in others:
        verify_ear(token, charter, at)
    return verify_ears([own.token, *others], charter, at)
