"""The rules of a session, as functions without I/O: each takes a session and returns its next form, or refuses.

    challenged ──take_nonce──▶ spent ──attested──▶ attested ──use──▶ attested (counter grows)

1. A nonce is consumed by its first use, right or wrong: `take_nonce` leaves `spent`, and only an appraisal that
   affirms leaves that state, in the same session and once.
2. A session ends at a fixed time; after attestation it ends with its EAR.
3. Each call under /v1 carries a counter that is higher than every one before: a proof works once.
4. A session of one protocol is worth nothing in the other.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from attestation.errors import SessionRefused

NONCE_SIZE: Final = 32
Protocol = Literal["v1", "kbs"]


class Session(BaseModel):
    """One guest's session. Times are seconds since 1970, UTC; `nonce` and `keys` are base64.

    `ear` is what the guest shows to others; `full_ear`, if it has further devices, is the one with all their claims.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    protocol: Protocol
    state: Literal["challenged", "spent", "attested"]
    nonce: str
    guest_nonce: str
    created: int
    expires: int
    charter_version: int
    counter: int = 0
    attested_at: int | None = None
    ear: str | None = None
    full_ear: str | None = None
    keys: dict[str, str] = {}
    tee_pubkey: dict[str, Any] | None = None

    def key(self, purpose: str) -> bytes:
        """The guest's attested public key for a purpose."""
        return base64.b64decode(self.keys[purpose])


def open_session(
    protocol: Protocol,
    *,
    identifier: str,
    nonce: bytes,
    guest_nonce: str,
    at: datetime,
    seconds: int,
    charter_version: int,
) -> Session:
    """A new session whose nonce (NONCE_SIZE random bytes) waits for its one use, for `seconds`."""
    now = int(at.timestamp())
    return Session(
        id=identifier,
        protocol=protocol,
        state="challenged",
        nonce=base64.b64encode(nonce).decode(),
        guest_nonce=guest_nonce,
        created=now,
        expires=now + seconds,
        charter_version=charter_version,
    )


def take_nonce(session: Session | None, protocol: Protocol, at: datetime) -> Session:
    """Consume the session's nonce. Raises SessionRefused if there is none to use."""
    session = _live(session, protocol, at)
    if session.state != "challenged":
        raise SessionRefused(("the session's nonce was used before; each attestation needs a fresh one",))
    return session.model_copy(update={"state": "spent"})


def attested(
    session: Session,
    *,
    ear: str,
    full_ear: str | None = None,
    expires: datetime,
    keys: dict[str, str],
    tee_pubkey: dict[str, Any] | None,
    at: datetime,
) -> Session:
    """The session after its evidence was affirmed: it lives as long as its EAR."""
    if session.state != "spent":
        raise SessionRefused(("the session took no nonce for this appraisal",))
    return session.model_copy(
        update={
            "state": "attested",
            "ear": ear,
            "full_ear": full_ear,
            "expires": int(expires.timestamp()),
            "keys": keys,
            "tee_pubkey": tee_pubkey,
            "attested_at": int(at.timestamp()),
        }
    )


def use(session: Session | None, protocol: Protocol, at: datetime, *, counter: int | None) -> Session:
    """Use an attested session for one call with its `counter` (None for KBS, whose answers only the TEE can open)."""
    session = attested_session(session, protocol, at)
    if counter is None:
        return session
    if counter <= session.counter:
        raise SessionRefused((f"the call's counter {counter} was used before (last: {session.counter})",))
    return session.model_copy(update={"counter": counter})


def attested_session(session: Session | None, protocol: Protocol, at: datetime) -> Session:
    """The session if it is live and attested. Raises SessionRefused."""
    session = _live(session, protocol, at)
    if session.state != "attested":
        raise SessionRefused(("the session has not attested",))
    return session


def age_seconds(session: Session, at: datetime) -> int:
    """Whole seconds since the session's evidence was appraised."""
    return max(0, int(at.timestamp()) - (session.attested_at or session.created))


def _live(session: Session | None, protocol: Protocol, at: datetime) -> Session:
    if session is None or session.protocol != protocol:
        raise SessionRefused(("there is no such session",))
    if int(at.timestamp()) >= session.expires:
        raise SessionRefused(("the session has ended",))
    return session
