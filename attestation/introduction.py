"""A guest introduces itself to a stranger without a handshake: a word signed by its attested key, and its EARs.

The EARs name the SHA-256 of the guest's signing key (attestation.binding), and the charter names the brokers whose EARs
count; so whoever has the charter's root needs nothing else. What the word must say, a nonce first of all where it has
to be fresh, is for those who agreed on its `typ`.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from attestation.ear import Ear
from attestation.ears import MAX_EAR, MAX_EARS, verify_ears
from attestation.errors import PeerRefused
from attestation.identity import enrolment_reasons
from attestation.jws import read_jws, sign_jws
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from policies.charter import Charter

MAX_WORD = 16 << 10
"""Characters of the longest word."""


class Introducing(Protocol):
    """What of an `Identity` it takes to introduce oneself."""

    @property
    def role(self) -> str:
        """The guest's role."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def sign_key(self) -> Ed25519PrivateKey:
        """The attested signing key."""

    @property
    def ears(self) -> tuple[str, ...]:
        """The EARs over it."""


class Introduction(BaseModel):
    """A signed word with what a stranger needs to believe it: the signing key (SPKI in DER, base64), and its EARs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    word: Annotated[str, Field(max_length=MAX_WORD)]
    sign_key: Annotated[str, Field(max_length=128)]
    ears: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_EAR)], ...], Field(min_length=1, max_length=MAX_EARS, strict=False)
    ]


@dataclass(frozen=True, slots=True)
class Introduced:
    """A guest that has introduced itself, its signing key, and what it said."""

    ears: tuple[Ear, ...]
    key: Ed25519PublicKey
    word: Mapping[str, Any]


def introduce(identity: Introducing, payload: Mapping[str, Any], *, typ: str) -> str:
    """The JSON with which this guest introduces itself, saying `payload`."""
    public = identity.sign_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    word = sign_jws(payload, identity.sign_key, kid=f"{identity.role}/{identity.name}", typ=typ)
    return Introduction(word=word, sign_key=b64(public), ears=identity.ears).model_dump_json()


def read_introduction(
    raw: str | bytes, charter: Charter, at: datetime, *, role: str, typ: str, name: str | None = None
) -> Introduced:
    """Who introduces itself in `raw`, checked under `charter` at `at`.

    Checked: the EARs (of k brokers, by signature, time, charter, affirming; over one guest), that the guest's place and
    image still stand in the charter, its `role` and `name`, that the EARs name this signing key, and its signature.
    Raises PeerRefused with every reason.
    """
    who = f"{role} {name}" if name else role
    try:
        said = Introduction.model_validate_json(raw)
        der = unb64(said.sign_key, where="introduction")
        key = load_der_public_key(der)
    except (ValidationError, ValueError, UnsupportedAlgorithm, SealwrightError) as error:
        raise PeerRefused(("its introduction is malformed",), who=who) from error
    try:
        ears = verify_ears(said.ears, charter, at)
    except Refused as error:
        raise PeerRefused(error.reasons, who=who) from error
    ear, reasons = ears[0], [*enrolment_reasons(ears[0], charter)]
    if ear.subject.role != role or (name is not None and ear.subject.name != name):
        reasons.append(f"its EARs are those of {ear.subject.role}/{ear.subject.name}")
    if not hmac.compare_digest(ear.keys.get("sign", ""), sha256(der).hexdigest()):
        reasons.append("its key is not the one that its EARs name")
    if not isinstance(key, Ed25519PublicKey):
        raise PeerRefused((*reasons, "its key is not Ed25519"), who=who)
    if reasons:
        raise PeerRefused(tuple(reasons), who=who)
    try:
        return Introduced(ears, key, read_jws(said.word, key, typ=typ))
    except SealwrightError as error:
        raise PeerRefused((f"its word is not its own: {error.what}",), who=who) from error
