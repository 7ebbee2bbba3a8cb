"""The EARs of several brokers over one guest: the form in which they travel, and whether they are enough.

A charter asks for the EARs of k distinct brokers (`Consortium.broker_threshold`) over the same keys of the same guest
in the same place, so that no broker alone can vouch for anybody. Further EARs do no harm; those that do not hold do
not count; two that hold and disagree are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from attestation.ear import TYPE, Ear, ear_end, verify_ear
from attestation.errors import EarRefused
from attestation.jws import read_jws_header
from policies.errors import Refused, SealwrightError, Unusable

if TYPE_CHECKING:
    from policies.charter import Charter

MAX_EARS: Final = 16
"""As many brokers as a charter has at most."""
MAX_EAR: Final = 16 * 1024
"""Characters of the longest EAR that travels with others."""
MAX_EARS_SIZE: Final = 64 * 1024
"""Bytes of a list: with it, a certificate still fits into a TLS handshake (OpenSSL and BoringSSL: 100 KiB)."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_SAME: Final = ("measurement", "host_data", "report_id", "chip_id")
"""What the reports of one launched guest all say."""


def pack_ears(tokens: Sequence[str]) -> bytes:
    """The one form of a list of EARs: compact JWSs in ASCII, one a line, by their issuers' names. Raises Unusable."""
    raw = "\n".join(sorted(tokens, key=_issuer)).encode("ascii")
    unpack_ears(raw)
    return raw


def unpack_ears(raw: bytes) -> tuple[str, ...]:
    """Read what `pack_ears` writes. Raises Unusable for any other form, a broker that occurs twice included."""
    try:
        tokens = raw.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise _malformed("it is not ASCII") from error
    if len(raw) > MAX_EARS_SIZE or len(tokens) > MAX_EARS or any(len(token) > MAX_EAR for token in tokens):
        raise _malformed(f"it holds {len(tokens)} EARs in {len(raw)} bytes, more or longer ones than may be")
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise _malformed("a line of it is no compact JWS")
    issuers = [_issuer(token) for token in tokens]
    if any(first >= second for first, second in pairwise(issuers)):
        raise _malformed("its brokers are not each named once, in order")
    return tuple(tokens)


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
