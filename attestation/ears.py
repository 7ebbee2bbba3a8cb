"""The EARs of several brokers over one guest: the form in which they travel, and whether they are enough.

A charter asks for the EARs of k distinct brokers (`Consortium.broker_threshold`) over the same keys of the same guest
in the same place, so that no broker alone can vouch for anybody. Further EARs do no harm; those that do not hold do
not count; two that hold and disagree are refused.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from attestation.canonical import b64url, canonical_bytes, read_canonical, unb64url
from attestation.ear import TYPE, Ear, ear_end, verify_ear
from attestation.errors import EarRefused
from attestation.jws import ALGORITHM, read_jws_header
from policies.errors import Refused, SealwrightError, Unusable

if TYPE_CHECKING:
    from policies.charter import Charter

MAX_EARS: Final = 16
"""As many brokers as a charter has at most."""
MAX_EAR: Final = 16 * 1024
"""Characters of the longest EAR that travels with others."""
MAX_EARS_SIZE: Final = 64 * 1024
"""Bytes of all EARs that travel together."""
MAX_PACKED: Final = 5 * 1024
"""Bytes of EARs in a certificate. A TLS server hands its client's certificate back in session tickets, and gRPC has
17 KiB of room for two of them: with 6 KiB, a client's connection still comes about."""
_SIGNATURE: Final = re.compile(rb"[A-Za-z0-9_-]{86}")
_SAME: Final = ("measurement", "host_data", "report_id", "chip_id")
"""What the reports of one launched guest all say."""


def pack_ears(tokens: Sequence[str]) -> bytes:
    """The form of EARs in a certificate: each one's payload and signature, a line each, by issuer, compressed (zlib).

    Brokers that speak of one guest say nearly the same, so that a further EAR costs some 250 bytes. Raises Unusable.
    """
    lines = b"".join(
        unb64url(payload, where="EARs") + b"\n" + signature.encode("ascii") + b"\n"
        for _, payload, signature in (token.split(".") for token in sorted(tokens, key=_issuer))
    )
    raw = zlib.compress(lines, 9)
    if sorted(unpack_ears(raw)) != sorted(tokens):
        raise _malformed("one of them is not in its own form")
    return raw


def unpack_ears(raw: bytes) -> tuple[str, ...]:
    """Read what `pack_ears` writes. Raises Unusable for any other form, a broker that occurs twice included."""
    if len(raw) > MAX_PACKED:
        raise _malformed(f"it has {len(raw)} bytes, more than {MAX_PACKED}")
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(raw, MAX_EARS_SIZE)
    except zlib.error as error:
        raise _malformed("it is not compressed as it should be") from error
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise _malformed(f"it holds more than {MAX_EARS_SIZE} bytes, or is cut off, or bytes follow it")
    lines = content.split(b"\n")
    if lines.pop() != b"" or len(lines) % 2 or not 2 <= len(lines) <= 2 * MAX_EARS:
        raise _malformed("it has not two lines for each broker")
    tokens = [_token(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
    issuers = [_issuer(token) for token in tokens]
    if any(first >= second for first, second in pairwise(issuers)):
        raise _malformed("its brokers are not each named once, in order")
    return tuple(tokens)


def _token(payload: bytes, signature: bytes) -> str:
    """The JWS of which these are the payload (canonical JSON) and the signature (base64url)."""
    issuer = read_canonical(payload, where="EARs", limit=MAX_EAR).get("iss")
    if not isinstance(issuer, str) or not _SIGNATURE.fullmatch(signature):
        raise _malformed("a line of it is no EAR")
    header = canonical_bytes({"alg": ALGORITHM, "kid": issuer, "typ": TYPE})
    token = f"{b64url(header)}.{b64url(payload)}.{signature.decode('ascii')}"
    if len(token) > MAX_EAR:
        raise _malformed(f"an EAR of it has {len(token)} characters, more than {MAX_EAR}")
    return token


def verify_ears(tokens: Sequence[str], charter: Charter, at: datetime) -> tuple[Ear, ...]:
    """The EARs among `tokens` that hold under `charter` at `at`: enough of them, and all about one guest.

    Raises EarRefused with every reason; its `lapsed` says that nothing but time is against them.
    """
    needed = charter.consortium.broker_threshold
    if len(tokens) > MAX_EARS:
        raise EarRefused((f"{len(tokens)} EARs are shown, more than {MAX_EARS}",))
    held: dict[str, Ear] = {}
    failed: list[str] = []
    twice: list[str] = []
    lapsed = 0
    for token in tokens:
        try:
            ear = verify_ear(token, charter, at)
        except SealwrightError as error:
            failed += error.reasons if isinstance(error, Refused) else (error.what,)
            lapsed += isinstance(error, EarRefused) and error.lapsed
            continue
        if ear.broker in held:
            twice.append(f"two EARs are broker {ear.broker}'s")
        held[ear.broker] = ear
    found = tuple(held.values())
    reasons = [*twice, *different_guests(found)]
    only_time = not reasons and len(found) < needed <= len(found) + lapsed
    if len(found) < needed:
        reasons += failed
        if needed > 1 or not failed:
            reasons.append(f"{len(found)} of the {needed} EARs that are needed hold, each of another broker")
    if reasons:
        raise EarRefused(tuple(reasons), lapsed=only_time)
    return found


def different_guests(ears: Sequence[Ear]) -> tuple[str, ...]:
    """In what the EARs of one guest disagree; empty if in nothing."""
    reasons = []
    for ear in ears[1:]:
        first = ears[0]
        two = f"the EARs of {first.broker} and {ear.broker} are about"
        if ear.document.keys != first.document.keys:
            reasons.append(f"{two} different keys")
        if ear.subject != first.subject:
            reasons.append(f"{two} different places")
        reasons += [f"{two} guests with different {name}" for name in _SAME if _claim(ear, name) != _claim(first, name)]
    return tuple(reasons)


def lease_end(ears: Sequence[Ear], charter: Charter) -> datetime:
    """When too few of these EARs are left: the end of the guest's lease."""
    ends = sorted((ear_end(ear, charter) for ear in ears), reverse=True)
    return ends[charter.consortium.broker_threshold - 1]


def _claim(ear: Ear, name: str) -> Any:
    return ear.claims.get(name)


def _issuer(token: str) -> str:
    return read_jws_header(token, typ=TYPE)


def _malformed(why: str) -> Unusable:
    return Unusable(f"this is no list of EARs: {why}", where="EARs", do="Send them as the brokers gave them.")
