"""EARs: a broker's signed word on one guest (RFC 9334's attestation result; draft-ietf-rats-ear, AR4SI vector).

A compact JWS by the broker's Ed25519 key with `kid` = the broker's name and `typ` = "eat+jwt". It names the nonce that
the guest chose, the charter and its version, the guest's place, and the SHA-256 of each of the guest's keys. It is
issued only for an affirming appraisal, and lives `lease_seconds` of the charter: it is the guest's lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attestation.canonical import format_time
from attestation.errors import EarRefused
from attestation.jws import ed25519_public_key, read_jws, read_jws_header, sign_jws
from policies.errors import Refused, Unusable

if TYPE_CHECKING:
    from policies.charter import Charter

TYPE: Final = "eat+jwt"
PROFILE: Final = "urn:sealwright:ear:1"
POLICY: Final = "policies/appraisal.toml"
"""`ear.appraisal-policy-id`: the charter's target that the appraisal followed."""
SKEW: Final = timedelta(seconds=60)
"""How far a reader's clock may be behind the broker's."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class CharterReference(_Model):
    """Which charter, and which version of it."""

    id: Digest
    version: Annotated[int, Field(ge=1)]


class Subject(_Model):
    """Whose place in the charter the guest holds."""

    role: Word
    name: Word
    member: Word
    image: Word


class SubmoduleAppraisal(_Model):
    """The appraisal of one device."""

    status: Annotated[Literal["affirming", "warning", "contraindicated", "none"], Field(alias="ear.status")]
    vector: Annotated[dict[str, int], Field(alias="ear.trustworthiness-vector")]
    policy: Annotated[str, Field(alias="ear.appraisal-policy-id")]
    evidence: Annotated[dict[str, Any], Field(alias="ear.veraison.annotated-evidence")]


class EarDocument(_Model):
    """The payload of an EAR."""

    eat_profile: Literal["urn:sealwright:ear:1"]
    iat: Annotated[int, Field(ge=0, le=2**40)]
    exp: Annotated[int, Field(ge=0, le=2**40)]
    iss: Word
    nonce: Annotated[str, StringConstraints(max_length=128)]
    charter: CharterReference
    platform: Literal["virtual", "hardware"]
    subject: Subject
    keys: dict[str, Digest]
    submods: dict[str, SubmoduleAppraisal]


@dataclass(frozen=True, slots=True)
class Ear:
    """A verified EAR."""

    token: str
    document: EarDocument

    @property
    def broker(self) -> str:
        """Who signed it."""
        return self.document.iss

    @property
    def subject(self) -> Subject:
        """The guest's place: role, name, member, image."""
        return self.document.subject

    @property
    def keys(self) -> Mapping[str, str]:
        """SHA-256 (hex) of each of the guest's keys, by purpose."""
        return MappingProxyType(self.document.keys)

    @property
    def claims(self) -> Mapping[str, Any]:
        """What the SNP report says, decoded."""
        return MappingProxyType(self.document.submods["cpu0"].evidence)

    @property
    def status(self) -> str:
        """AR4SI status of the guest's CPU."""
        return self.document.submods["cpu0"].status

    @property
    def issued_at(self) -> datetime:
        """When it was signed."""
        return datetime.fromtimestamp(self.document.iat, UTC)

    @property
    def expires_at(self) -> datetime:
        """From when on it is worth nothing."""
        return datetime.fromtimestamp(self.document.exp, UTC)

    def to_claims(self) -> dict[str, Any]:
        """The payload as JSON-able values: what a policy reads as `input.ear`."""
        return self.document.model_dump(mode="json", by_alias=True)


def sign_ear(document: EarDocument, key: Ed25519PrivateKey) -> str:
    """Sign an EAR as its issuer `document.iss`."""
    return sign_jws(document.model_dump(mode="json", by_alias=True), key, kid=document.iss, typ=TYPE)


def verify_ear(token: str, charter: Charter, at: datetime) -> Ear:
    """Check an EAR: signed by a broker of `charter`, about this charter, valid at `at`, affirming on every device.

    Raises EarRefused with every reason, or Unusable for what is no EAR at all.
    """
    issuer = read_jws_header(token, typ=TYPE)
    broker = charter.broker(issuer)
    if broker is None:
        raise EarRefused((f"the EAR is signed by {issuer!r}, no broker of this charter",))
    try:
        ear = _signed_ear(token, broker.signing_key)
    except Refused as error:
        raise EarRefused((f"the EAR's signature is not broker {issuer}'s",)) from error
    reasons = ear_reasons(ear, charter, at)
    if reasons:
        raise EarRefused(reasons, lapsed=reasons == (_ended(ear, charter),))
    return ear


@lru_cache(maxsize=1024)
def _signed_ear(token: str, signing_key: str) -> Ear:
    """An EAR whose signature holds: checked once, since the same one is judged at many moments. Raises Refused."""
    return Ear(token, parse_ear_document(read_jws(token, ed25519_public_key(signing_key), typ=TYPE)))


def ear_end(ear: Ear, charter: Charter) -> datetime:
    """From when on `ear` is worth nothing under `charter`, whose lease may be shorter than when it was given."""
    return min(ear.expires_at, ear.issued_at + timedelta(seconds=charter.consortium.lease_seconds))


def _ended(ear: Ear, charter: Charter) -> str:
    return f"the EAR ended at {format_time(ear_end(ear, charter))} (broker {ear.broker})"


def parse_ear_document(payload: Mapping[str, Any]) -> EarDocument:
    """Check an EAR's payload by its model. Raises Unusable."""
    try:
        document = EarDocument.model_validate(dict(payload))
    except ValidationError as error:
        raise Unusable(
            f"this is no EAR: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}",
            where="EAR",
            do="Take EARs from a broker of the charter.",
        ) from error
    if "cpu0" not in document.submods:
        raise Unusable("the EAR says nothing of cpu0", where="EAR", do="Take EARs from a broker of the charter.")
    return document


def ear_reasons(ear: Ear, charter: Charter, at: datetime) -> tuple[str, ...]:
    """Why this EAR (whose signature holds) is refused at `at` under `charter`; empty if it is good."""
    document, reasons = ear.document, []
    if document.iss != read_jws_header(ear.token, typ=TYPE):
        reasons.append(f"the EAR names {document.iss} as its issuer, not its signer")
    if document.charter.id != charter.id:
        reasons.append(f"the EAR is about another charter ({document.charter.id[:16]}…)")
    if document.platform != charter.consortium.platform:
        reasons.append(f"the EAR is about a {document.platform} guest; this charter is {charter.consortium.platform}")
    if at < ear.issued_at - SKEW:
        reasons.append("the EAR is from the future")
    if at >= ear_end(ear, charter):
        reasons.append(_ended(ear, charter))
    too_long = ear.expires_at - ear.issued_at > timedelta(seconds=charter.consortium.lease_seconds)
    if too_long and document.charter.version >= charter.version:
        reasons.append("the EAR lives longer than the charter allows")
    reasons += [
        f"the appraisal of {device} is {appraisal.status}, not affirming"
        for device, appraisal in sorted(document.submods.items())
        if appraisal.status != "affirming"
    ]
    return tuple(reasons)
