"""Device tokens: a member's word that a key is a device's, for some jobs and some time (RFC 7800's confirmation key).

A token alone opens nothing, since every message is signed by the device's key. It says nothing of who has the device:
its id is random, and the same for as long as the device keeps its key, so that each device counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attestation.canonical import b64, unb64
from attestation.ear import SKEW
from attestation.jws import ed25519_public_key, read_jws, read_jws_header, sign_jws
from policies.devices import JobPattern, job_matches
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from policies.charter import Charter
    from policies.devices import DeviceIssuer

TOKEN_TYPE: Final = "sealwright-device+jwt"  # noqa: S105 - a type's name
_DO: Final = "Have a new token or certificate issued for this device."


class TokenPayload(BaseModel):
    """What an issuer signs: `key` is the device's P-256 public key (SPKI in DER, base64), times in seconds of UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    charter: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    device: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    key: Annotated[str, StringConstraints(max_length=256)]
    jobs: Annotated[tuple[JobPattern, ...], Field(min_length=1, max_length=16, strict=False)]
    iat: Annotated[int, Field(ge=0, le=2**40)]
    exp: Annotated[int, Field(ge=0, le=2**40)]


@dataclass(frozen=True, slots=True)
class Device:
    """A device whose token holds. `name` is the issuer's name and the random id: stable, and nobody's else."""

    name: str
    key: EllipticCurvePublicKey
    jobs: tuple[str, ...]
    issuer_jobs: tuple[str, ...]

    def may(self, job: str) -> bool:
        """Whether it may take part in the job of this name."""
        return job_matches(job, self.jobs) and job_matches(job, self.issuer_jobs)


def issue_token(
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
    """A token for the device with the random id `device` (32 hex digits); `seconds`: default as long as it may."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    issued = int(at.timestamp())
    payload = TokenPayload(
        charter=charter,
        device=device,
        key=b64(spki),
        jobs=jobs,
        iat=issued,
        exp=issued + (issuer.token_seconds if seconds is None else seconds),
    )
    return sign_jws(payload.model_dump(mode="json"), signing_key, kid=issuer.name, typ=TOKEN_TYPE)


def read_token(token: str, charter: Charter, at: datetime) -> Device:
    """The device that `token` is about, under `charter` at `at`. Raises Refused with every reason."""
    try:
        name = _issuer_of(token)
        issuer = charter.device_issuer(name)
        if issuer is None:
            raise refused(f"the token is signed by {name!r:.80}, which issues none in this charter")
        payload, key = _signed_token(token, issuer.signing_key)
    except Refused:
        raise
    except SealwrightError as error:
        raise refused(f"the token is none: {error.what}") from error
    return device_of(
        issuer,
        charter,
        at,
        what="token",
        names_charter=payload.charter,
        device=payload.device,
        key=key,
        jobs=payload.jobs,
        issued=payload.iat,
        ends=payload.exp,
    )


def device_of(
    issuer: DeviceIssuer,
    charter: Charter,
    at: datetime,
    *,
    what: str,
    names_charter: str,
    device: str,
    key: EllipticCurvePublicKey,
    jobs: tuple[str, ...],
    issued: int,
    ends: int,
) -> Device:
    """The device of a credential (`what`) that `issuer` has signed, if it holds. Raises Refused with every reason."""
    reasons = []
    if names_charter != charter.id:
        reasons.append(f"the {what} is for another charter")
    if ends - issued > issuer.token_seconds:
        reasons.append(f"the {what} lives longer than its issuer may let it")
    if not issued - SKEW.total_seconds() <= at.timestamp() < ends:
        until = datetime.fromtimestamp(min(ends, 253402300799), UTC)
        reasons.append(f"the {what} is not good now (until {until:%Y-%m-%dT%H:%M:%SZ})")
    if device in issuer.revoked_ids:
        reasons.append("the device was revoked")
    if reasons:
        raise refused(*reasons)
    return Device(f"{issuer.name}/{device}", key, jobs, issuer.jobs)


@lru_cache(maxsize=4096)
def _issuer_of(token: str) -> str:
    """Who has signed a token, as its header says. Raises Unusable."""
    return read_jws_header(token, typ=TOKEN_TYPE)


@lru_cache(maxsize=4096)
def _signed_token(token: str, signing_key: str) -> tuple[TokenPayload, EllipticCurvePublicKey]:
    """A token whose signature holds: checked once, since a device shows the same one for days. Raises Refused."""
    try:
        payload = TokenPayload.model_validate(read_jws(token, ed25519_public_key(signing_key), typ=TOKEN_TYPE))
        key = load_der_public_key(unb64(payload.key, where="device's key"))
    except (ValidationError, ValueError, UnsupportedAlgorithm) as error:
        raise refused("the token's payload is malformed") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise refused("the device's key is not on P-256")
    return payload, key


def refused(*reasons: str) -> Refused:
    """A device that is not let in, with every reason."""
    return Refused(reasons[0], where="device", do=_DO, reasons=reasons)
