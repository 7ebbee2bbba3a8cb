"""The second way to judge GPUs: tokens of NVIDIA's remote attestation service, checked offline against its keys.

The service's word replaces our own look at report and manifests; what binds it to this session is the nonce. Every
claim that a token makes about a device must be good, also those that a newer service adds.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from attestation.endorsements.failure import Failure
from attestation.evidence.gpu.nras import NrasBundle, NrasToken, parse_jwks, parse_nras_bundle
from attestation.verifier.appraisal import VECTOR_NAMES, Appraisal
from attestation.verifier.check import NOT_JUDGED, Claim, Verdict
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.profile import GpuProfile

_SKEW = timedelta(seconds=60)
_CONTRAINDICATED = 96
_NOT_AUTHENTIC = 99
_FAR = 253402300799  # 9999-12-31T23:59:59Z

_DEVICE_TRUE = (
    "attestation-report-parsed",
    "attestation-report-nonce-match",
    "attestation-report-signature-verified",
    "arch-check",
)
"""Claims about a device's report that must be there, after `x-nvidia-gpu-` or `x-nvidia-switch-`."""


@dataclass(frozen=True, slots=True)
class NrasCase:
    """One bundle with everything that a check may look at."""

    bundle: NrasBundle
    keys: Mapping[str, EllipticCurvePublicKey]
    profile: GpuProfile
    expected: GpuExpected
    at: datetime

    def tokens(self) -> tuple[tuple[str, NrasToken], ...]:
        """All tokens, each with its name."""
        return (("overall", self.bundle.overall), *self.bundle.devices.items())


@dataclass(frozen=True, slots=True)
class NrasCheck:
    """A registered check of tokens."""

    name: str
    claim: Claim
    rule: str
    run: Callable[[NrasCase], Verdict]


NRAS_CHECKS: dict[str, NrasCheck] = {}
"""All checks of tokens by name. None can be turned off: a profile without trust in the service does not use it."""


def _check(claim: Claim) -> Callable[[Callable[[NrasCase], Verdict]], Callable[[NrasCase], Verdict]]:
    def register(function: Callable[[NrasCase], Verdict]) -> Callable[[NrasCase], Verdict]:
        name = function.__name__.replace("_", "-")
        NRAS_CHECKS[name] = NrasCheck(name, claim, function.__doc__ or "", function)
        return function

    return register


def verify_nras(bundle: bytes, jwks: bytes, profile: GpuProfile, expected: GpuExpected, *, at: datetime) -> Appraisal:
    """Appraise an NRAS bundle at the time `at` (aware), with the keys of `jwks`.

    Raises:
        MalformedEvidence: the bundle cannot be read.
        MalformedEndorsement: the JWKS cannot be read.
        ValueError: `at` has no time zone.
    """
    if at.tzinfo is None:
        raise ValueError("the time of verification needs a time zone")
    case = NrasCase(parse_nras_bundle(bundle), parse_jwks(jwks), profile, expected, at.astimezone(UTC))
    failures: list[Failure] = []
    not_judged: list[str] = []
    worst: dict[Claim, int] = {}
    for one in NRAS_CHECKS.values():
        verdict = one.run(case)
        if verdict is None:
            continue
        if verdict is NOT_JUDGED:
            not_judged.append(one.name)
            if "gpu-freshness" in profile.required:
                failures.append(Failure(one.name, "not judged", f"a judgement, which profile {profile.name!r} demands"))
                worst[one.claim] = _CONTRAINDICATED
            continue
        failures.append(Failure(one.name, *verdict))
        worst[one.claim] = _CONTRAINDICATED
    authentic = not any(failure.check in ("nras-signature", "nras-binding") for failure in failures)
    return Appraisal(
        status="contraindicated" if failures else "affirming",
        failures=tuple(failures),
        not_judged=tuple(not_judged),
        vector=_vector(worst, not_judged, authentic),
        profile=profile.name,
        decode=lambda: {
            "kind": "nras",
            "platform": "hardware",
            "overall": dict(case.bundle.overall.claims),
            "devices": {name: dict(token.claims) for name, token in case.bundle.devices.items()},
        },
    )


def _vector(worst: dict[Claim, int], not_judged: list[str], authentic: bool) -> dict[str, int]:
    vector = dict.fromkeys(VECTOR_NAMES, 0)
    affirmed = {
        Claim.INSTANCE_IDENTITY: 0 if not_judged else 2,
        Claim.CONFIGURATION: 2,
        Claim.EXECUTABLES: 3,
        Claim.HARDWARE: 2,
    }
    for claim, value in affirmed.items():
        vector[claim.value] = worst.get(claim, value) if authentic else _NOT_AUTHENTIC
    return vector


@_check(Claim.HARDWARE)
def nras_signature(case: NrasCase) -> Verdict:
    """Every token is signed with ES384 by the key of the JWKS that it names.

    Attack: a token of one's own making, or one with a key of one's own in its header.
    """
    wrong: list[str] = []
    for name, token in case.tokens():
        key = case.keys.get(token.kid)
        if key is None:
            wrong.append(f"{name}: no key {token.kid!r} in the JWKS")
        elif not _verifies(key, token):
            wrong.append(f"{name}: the signature does not verify")
    return ("; ".join(wrong), "ES384 signatures by keys of the JWKS") if wrong else None


def _verifies(key: EllipticCurvePublicKey, token: NrasToken) -> bool:
    r, s = int.from_bytes(token.signature[:48], "big"), int.from_bytes(token.signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), token.signed, ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


@_check(Claim.HARDWARE)
def nras_issuer(case: NrasCase) -> Verdict:
    """Every token comes from a service that the profile names.

    Attack: a genuine token of another service whose key happens to be in the set.
    """
    allowed = case.profile.nras.issuers
    wrong = [
        f"{name}: {token.claims.get('iss')!r}"
        for name, token in case.tokens()
        if token.claims.get("iss") not in allowed
    ]
    return ("; ".join(wrong)[:1000], " or ".join(allowed)) if wrong else None


@_check(Claim.HARDWARE)
def nras_time(case: NrasCase) -> Verdict:
    """Every token was issued before now, not too long ago, and has not ended.

    Attack: an old token, from before a device or a driver was found wanting.
    """
    wrong: list[str] = []
    oldest = case.at - timedelta(seconds=case.profile.nras.max_age_seconds)
    for name, token in case.tokens():
        times = {claim: _time(token.claims.get(claim)) for claim in ("iat", "exp", "nbf")}
        issued, end, since = times["iat"], times["exp"], times["nbf"] if "nbf" in token.claims else times["iat"]
        if issued is None or end is None or since is None:
            wrong.append(f"{name}: no times")
        elif max(issued, since) > case.at + _SKEW:
            wrong.append(f"{name}: issued later, at {issued:%Y-%m-%dT%H:%M:%SZ}")
        elif end <= case.at:
            wrong.append(f"{name}: ended at {end:%Y-%m-%dT%H:%M:%SZ}")
        elif issued < oldest - _SKEW:
            wrong.append(f"{name}: issued at {issued:%Y-%m-%dT%H:%M:%SZ}")
    limit = case.profile.nras.max_age_seconds
    return ("; ".join(wrong), f"in force at {case.at:%Y-%m-%dT%H:%M:%SZ}, at most {limit} s old") if wrong else None


def _time(value: Any) -> datetime | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _FAR:
        return None
    return datetime.fromtimestamp(value, UTC)


@_check(Claim.HARDWARE)
def nras_binding(case: NrasCase) -> Verdict:
    """The overall token holds the SHA-256 of each device's token, and of no other device's.

    Attack: the good token of another device beside this session's overall token.
    """
    submods = case.bundle.overall.claims.get("submods")
    digests = {
        name: ["DIGEST", ["SHA-256", sha256(token.compact.encode("ascii")).hexdigest()]]
        for name, token in case.bundle.devices.items()
    }
    if submods == digests:
        return None
    return f"submods that name {sorted(submods) if isinstance(submods, dict) else submods!r}"[
        :500
    ], "each device's digest"


@_check(Claim.INSTANCE_IDENTITY)
def nras_nonce(case: NrasCase) -> Verdict:
    """Every token is for the nonce that the relying party chose. Not judged without one.

    Attack: the token of an earlier session, or of somebody else's, replayed.
    """
    if case.expected.nonce is None:
        return NOT_JUDGED
    wanted = case.expected.nonce.hex()
    wrong = [
        name
        for name, token in case.tokens()
        if not hmac.compare_digest(_bytes(token.claims.get("eat_nonce")), wanted.encode("ascii"))
    ]
    return (f"another nonce in {', '.join(wrong)}", wanted) if wrong else None


def _bytes(value: Any) -> bytes:
    return str(value).lower().encode("ascii", "backslashreplace")


@_check(Claim.INSTANCE_IDENTITY)
def nras_device(case: NrasCase) -> Verdict:
    """Every device has an id of its own, and none that the profile denies.

    Attack: one GPU that answers for several.
    """
    ids = [token.claims.get("ueid") for token in case.bundle.devices.values()]
    if not all(isinstance(one, str) and one for one in ids) or len(set(ids)) != len(ids):
        return "a device without an id, or the same id twice", "an id for each device"
    denied = [str(one) for one in ids if one in case.profile.devices.deny]
    return (f"{', '.join(denied)}, which is denied", "another device") if denied else None


@_check(Claim.EXECUTABLES)
def nras_result(case: NrasCase) -> Verdict:
    """The overall result is true and every device's measurements match.

    Attack: a token that says no, read by somebody who only checks its signature.
    """
    overall = case.bundle.overall.claims.get("x-nvidia-overall-att-result")
    wrong = [] if overall is True else [f"overall result {overall!r}"]
    for name, token in case.bundle.devices.items():
        if token.claims.get("measres") not in ("success", "comparison-successful"):
            wrong.append(f"{name}: measres {token.claims.get('measres')!r}")
    return ("; ".join(wrong)[:1000], "result true, measres success") if wrong else None


@_check(Claim.CONFIGURATION)
def nras_debug(case: NrasCase) -> Verdict:
    """Debugging is disabled and the boot was secure.

    Attack: a genuine GPU in developer mode.
    """
    wrong = [
        f"{name}: dbgstat {token.claims.get('dbgstat')!r}, secboot {token.claims.get('secboot')!r}"
        for name, token in case.bundle.devices.items()
        if token.claims.get("dbgstat") != "disabled" or token.claims.get("secboot") is not True
    ]
    return ("; ".join(wrong)[:1000], "dbgstat disabled, secboot true") if wrong else None


@_check(Claim.HARDWARE)
def nras_device_claims(case: NrasCase) -> Verdict:
    """The report's own claims are there and true, and no other claim about a device is false or bad.

    Attack: a device whose certificate is revoked or on hold, or whose manifest was not verified, under a result that
    the service's policy still calls good.
    """
    wrong = [f"{name}: {what}" for name, token in case.bundle.devices.items() for what in _bad_claims(token.claims)]
    return ("; ".join(wrong)[:1000], "every claim about the device good") if wrong else None


def _bad_claims(claims: Mapping[str, Any]) -> list[str]:
    kind = "switch" if any(name.startswith("x-nvidia-switch-") for name in claims) else "gpu"
    bad = [
        f"{name} {claims.get(name)!r}"
        for name in (f"x-nvidia-{kind}-{part}" for part in _DEVICE_TRUE)
        if claims.get(name) is not True
    ]
    for name, value in claims.items():
        if not name.startswith("x-nvidia-"):
            continue
        if value is False:
            bad.append(f"{name} False")
        if isinstance(value, dict) and name.endswith("-cert-chain"):
            states = (value.get("x-nvidia-cert-status"), value.get("x-nvidia-cert-ocsp-status"))
            if states != ("valid", "good"):
                bad.append(f"{name} {states!r}")
    if claims.get("x-nvidia-attestation-warning") is not None:
        bad.append("x-nvidia-attestation-warning")
    return list(dict.fromkeys(bad))
