"""Tokens of the attestation service: each check against a bundle, signed by the service's key, that breaks its rule."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import nvidia_world as world
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.errors import MalformedEndorsement, MalformedEvidence
from attestation.evidence.gpu.nras import encode_nras_bundle, parse_jwks, parse_nras_bundle
from attestation.verifier.appraisal import Appraisal
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.nras import NRAS_CHECKS, verify_nras

EXPECTED = GpuExpected(nonce=world.NONCE)


def appraise(bundle: bytes, **options: Any) -> Appraisal:
    profile = options.pop("profile", None) or world.profile()
    expected = options.pop("expected", EXPECTED)
    return verify_nras(bundle, options.pop("jwks", world.jwks()), profile, expected, at=options.pop("at", world.AT))


def one(**changes: Any) -> bytes:
    return world.nras_bundle({"GPU-0": world.device_claims(**changes)})


def test_a_good_bundle_is_affirmed_in_every_claim() -> None:
    appraisal = appraise(world.nras_bundle())
    assert (appraisal.status, appraisal.failures, appraisal.not_judged) == ("affirming", (), ())
    judged = {name: value for name, value in appraisal.vector.items() if value}
    assert judged == {"instance-identity": 2, "configuration": 2, "executables": 3, "hardware": 2}
    assert appraisal.claims["devices"]["GPU-0"]["dbgstat"] == "disabled"


def test_without_a_nonce_freshness_is_not_judged() -> None:
    appraisal = appraise(world.nras_bundle(), expected=GpuExpected())
    assert appraisal.status == "affirming"
    assert appraisal.not_judged == ("nras-nonce",)
    assert appraisal.vector["instance-identity"] == 0
    strict = world.profile(required=["gpu-freshness"])
    assert appraise(world.nras_bundle(), expected=GpuExpected(), profile=strict).status == "contraindicated"


OTHER_TOKEN = world.token(world.device_claims(ueid="5678"))
REVOKED_CHAIN = {"x-nvidia-cert-status": "revoked", "x-nvidia-cert-ocsp-status": "revoked"}
LATER = int((world.AT + timedelta(hours=1)).timestamp())

ATTACKS: list[tuple[str, Callable[[], Appraisal]]] = [
    ("nras-signature", lambda: appraise(world.nras_bundle(key_name="mine"))),
    (
        "nras-signature",
        lambda: appraise(world.nras_bundle(), jwks=json.dumps({"keys": [world.jwk("nras", "x")]}).encode()),
    ),
    ("nras-issuer", lambda: appraise(one(iss="https://nras.example"))),
    ("nras-issuer", lambda: appraise(world.nras_bundle(iss="https://nras.example"))),
    ("nras-time", lambda: appraise(world.nras_bundle(), at=world.AT + timedelta(hours=2))),
    ("nras-time", lambda: appraise(one(iat=LATER, nbf=LATER, exp=LATER + 60))),
    ("nras-time", lambda: appraise(one(exp=int(world.AT.timestamp())))),
    ("nras-time", lambda: appraise(one(iat=0))),
    ("nras-time", lambda: appraise(one(iat=True))),
    ("nras-time", lambda: appraise(one(exp=10**40))),
    ("nras-binding", lambda: appraise(world.nras_bundle(swap={"GPU-0": OTHER_TOKEN}))),
    ("nras-binding", lambda: appraise(world.nras_bundle(swap={"GPU-1": OTHER_TOKEN}))),
    ("nras-binding", lambda: appraise(world.nras_bundle(submods={}))),
    ("nras-nonce", lambda: appraise(one(eat_nonce="00" * 32))),
    ("nras-nonce", lambda: appraise(world.nras_bundle(eat_nonce="\ud800"))),
    (
        "nras-device",
        lambda: appraise(world.nras_bundle({"GPU-0": world.device_claims(), "GPU-1": world.device_claims()})),
    ),
    ("nras-device", lambda: appraise(one(ueid=""))),
    ("nras-result", lambda: appraise(one(measres="fail"))),
    ("nras-result", lambda: appraise(world.nras_bundle(**{"x-nvidia-overall-att-result": False}))),
    ("nras-result", lambda: appraise(world.nras_bundle(**{"x-nvidia-overall-att-result": "true"}))),
    ("nras-debug", lambda: appraise(one(dbgstat="enabled"))),
    ("nras-debug", lambda: appraise(one(secboot=None))),
    ("nras-device-claims", lambda: appraise(one(**{"x-nvidia-gpu-attestation-report-nonce-match": False}))),
    ("nras-device-claims", lambda: appraise(one(**{"x-nvidia-gpu-attestation-report-signature-verified": None}))),
    ("nras-device-claims", lambda: appraise(one(**{"x-nvidia-gpu-attestation-report-cert-chain": REVOKED_CHAIN}))),
    ("nras-device-claims", lambda: appraise(one(**{"x-nvidia-gpu-something-new": False}))),
    ("nras-device-claims", lambda: appraise(one(**{"x-nvidia-attestation-warning": "certificate hold"}))),
]


@pytest.mark.parametrize(("check", "attack"), ATTACKS)
def test_the_attack_is_refused_for_its_reason(check: str, attack: Callable[[], Appraisal]) -> None:
    appraisal = attack()
    assert appraisal.status == "contraindicated"
    assert {failure.check for failure in appraisal.failures} == {check}


def test_a_denied_device_is_refused() -> None:
    bundle = one(ueid="00" * 8)
    assert appraise(bundle).status == "affirming"
    assert appraise(bundle, profile=world.profile(devices={"deny": ["00" * 8]})).status == "contraindicated"


def test_every_check_has_an_attack_and_a_rule() -> None:
    assert set(NRAS_CHECKS) == {check for check, _ in ATTACKS}
    for check in NRAS_CHECKS.values():
        assert "Attack:" in check.rule, check.name


GOOD = world.token(world.device_claims())


@pytest.mark.parametrize(
    "token",
    [
        world.token(world.device_claims(), alg="none"),
        world.token(world.device_claims(), alg="ES256"),
        world.token(world.device_claims(), jwk=world.jwk("mine", "nras-1")),
        world.token(world.device_claims(), crit=["exp"]),
        world.token(world.device_claims(), kid=7),
        world.token(world.device_claims(), typ="at+jwt"),
        GOOD + "=",
        GOOD[:-4],
        GOOD.replace(".", "..", 1),
        "a.b.c",
        "",
        7,
        "x" * (1 << 18),
    ],
)
def test_a_token_of_another_form_is_refused(token: Any) -> None:
    with pytest.raises(MalformedEvidence):
        parse_nras_bundle(json.dumps([["JWT", GOOD], {"GPU-0": token}]).encode())


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"[]",
        b"{}",
        b'[["JWT", "x"], {}]',
        json.dumps([["JWT", GOOD], {}]).encode(),
        json.dumps([["JWS", GOOD], {"GPU-0": GOOD}]).encode(),
        json.dumps([["JWT", GOOD], {"GPU 0": GOOD}]).encode(),
        json.dumps([["JWT", GOOD], {"GPU-0": GOOD}, {}]).encode(),
        json.dumps([["JWT", GOOD], {"GPU-0": GOOD}]).encode() + b', "more": 1',
        json.dumps([["JWT", GOOD], {str(number): GOOD for number in range(65)}]).encode(),
        b"[" * 100_000,
    ],
)
def test_a_bundle_of_another_form_is_refused(bundle: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_nras_bundle(bundle)


def test_a_bundle_survives_the_round_trip() -> None:
    bundle = parse_nras_bundle(encode_nras_bundle(GOOD, {"GPU-0": GOOD}))
    assert bundle.overall.compact == GOOD
    assert bundle.devices["GPU-0"].claims["ueid"] == "1234"


KEY = world.jwk("nras", "nras-1")


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {},
        [],
        [{**KEY, "kid": None}],
        [KEY, KEY],
        [{**KEY, "d": "AA"}],
        [{**KEY, "x": "AA"}],
        [{**KEY, "x": KEY["y"]}],
        [{**KEY, "x": "!!"}],
        [{**KEY, "crv": "P-256"}],
        [{**KEY, "use": "enc"}],
        [KEY] * 65,
    ],
)
def test_a_broken_jwks_is_refused(keys: Any) -> None:
    with pytest.raises(MalformedEndorsement):
        parse_jwks(json.dumps({"keys": keys}).encode())


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_nras_bundle(raw)
    with pytest.raises(MalformedEndorsement):
        parse_jwks(raw)


@given(
    st.dictionaries(
        st.sampled_from([*world.device_claims(), "x-nvidia-new-cert-chain", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5),
    )
)
def test_any_claims_signed_by_the_service_are_judged(claims: dict[str, Any]) -> None:
    bundle = world.nras_bundle({"GPU-0": {**world.device_claims(), **claims}})
    with contextlib.suppress(MalformedEvidence):
        json.dumps(appraise(bundle).to_json())
