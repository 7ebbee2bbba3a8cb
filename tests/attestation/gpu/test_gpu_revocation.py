"""OCSP responses and revocation lists: what counts, what does not, and what silence is worth."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import nvidia_world as world
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import ocsp
from hypothesis import given
from hypothesis import strategies as st

from attestation.endorsements.nvidia_revocation import RevocationData, Standing, revocation_of
from attestation.errors import MalformedEndorsement
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.verify import verify_gpu

DEVICE = world.make_device()
CHAIN = DEVICE.chain
REVOKED = ocsp.OCSPCertStatus.REVOKED


def standings(*, crls: tuple[bytes, ...] = (), max_age: timedelta | None = None, **changes: Any) -> list[Standing]:
    """The standings of boot ROM CA, provisioner and identity CA, the changes made to the first response."""
    data = RevocationData(ocsp=world.device_ocsp(DEVICE, **changes), crls=crls)
    return [one.standing for one in revocation_of(CHAIN, data, world.AT, max_age=max_age, first=1)]


def test_good_responses_are_good() -> None:
    assert standings() == [Standing.GOOD] * 3
    assert standings(responder="issuer") == [Standing.GOOD] * 3
    assert standings(algorithm=SHA256()) == [Standing.GOOD] * 3
    assert standings(max_age=timedelta(days=1)) == [Standing.GOOD] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"responder": "unappointed"},
        {"responder": "stranger"},
        {"since": world.AT + timedelta(hours=1), "until": world.AT + timedelta(days=1)},
        {"since": world.AT - timedelta(days=2), "until": world.AT - timedelta(days=1)},
        {"status": ocsp.OCSPCertStatus.UNKNOWN},
    ],
    ids=["responder not for OCSP", "responder appointed by another", "made later", "ended", "not known there"],
)
def test_what_does_not_count_is_faulty_and_refused(changes: dict[str, Any]) -> None:
    assert standings(**changes)[0] is Standing.UNKNOWN
    data = RevocationData(ocsp=world.device_ocsp(DEVICE, **changes))
    found = revocation_of(CHAIN, data, world.AT, max_age=None, first=1)[0]
    assert found.faulty
    assert found.remark
    appraisal = verify_gpu(
        world.evidence(DEVICE), world.profile(), GpuExpected(nonce=world.NONCE), revocation=data, at=world.AT
    )
    assert [failure.check for failure in appraisal.failures] == ["gpu-revocation"]


def test_old_data_is_refused_where_an_age_is_set() -> None:
    old = {"since": world.AT - timedelta(days=20), "until": world.AT + timedelta(days=20)}
    assert standings(**old)[0] is Standing.GOOD
    assert standings(max_age=timedelta(days=10), **old)[0] is Standing.UNKNOWN


def test_a_hold_is_told_from_a_revocation() -> None:
    hold = {"status": REVOKED, "reason": x509.ReasonFlags.certificate_hold}
    assert standings(**hold)[0] is Standing.ON_HOLD
    assert standings(status=REVOKED)[0] is Standing.REVOKED
    data = RevocationData(ocsp=world.device_ocsp(DEVICE, **hold))
    for setting, status in (("refuse", "contraindicated"), ("allow", "affirming")):
        profile = world.profile(revocation={"hold": setting})
        expected = GpuExpected(nonce=world.NONCE)
        assert verify_gpu(world.evidence(DEVICE), profile, expected, revocation=data, at=world.AT).status == status


def test_a_list_speaks_for_its_issuer_alone() -> None:
    rom, provisioner = CHAIN[1], CHAIN[2]
    revoked = world.revocation_list(provisioner, "ica", [rom])
    assert standings(crls=(revoked,))[0] is Standing.REVOKED, "a list outweighs a response that says good"
    forged = world.revocation_list(provisioner, "mine", [rom])
    assert standings(crls=(forged,))[0] is Standing.GOOD, "a forged list neither harms"
    alone = revocation_of(CHAIN, RevocationData(crls=(forged,)), world.AT, max_age=None, first=1)
    assert (alone[0].standing, alone[0].faulty) == (Standing.UNKNOWN, True), "nor vouches"
    empty = world.revocation_list(provisioner, "ica")
    found = revocation_of(CHAIN, RevocationData(crls=(empty,)), world.AT, max_age=None, first=1)
    assert [one.standing for one in found] == [Standing.GOOD, Standing.UNKNOWN, Standing.UNKNOWN]


def test_an_old_list_is_no_good() -> None:
    old = world.revocation_list(CHAIN[2], "ica", made=world.AT - timedelta(days=30))
    (found, *_) = revocation_of(CHAIN, RevocationData(crls=(old,)), world.AT, max_age=None, first=1)
    assert (found.standing, found.faulty) == (Standing.UNKNOWN, True)


def test_a_response_about_another_certificate_says_nothing() -> None:
    other = world.make_device(number=1)
    data = RevocationData(ocsp=world.device_ocsp(other)[:1])
    assert [one.standing for one in revocation_of(CHAIN, data, world.AT, max_age=None, first=1)] == [
        Standing.UNKNOWN
    ] * 3


def test_some_silence_leaves_revocation_unjudged() -> None:
    data = RevocationData(ocsp=world.device_ocsp(DEVICE)[:2])
    appraisal = verify_gpu(world.evidence(DEVICE), world.profile(), GpuExpected(), revocation=data, at=world.AT)
    assert "gpu-revocation" in appraisal.not_judged
    assert appraisal.vector["instance-identity"] == 0
    assert sorted(appraisal.claims["revocation"].values()) == ["good", "good", "unknown"]


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    for data in (RevocationData(ocsp=(raw,)), RevocationData(crls=(raw,))):
        with pytest.raises(MalformedEndorsement):
            revocation_of(CHAIN, data, world.AT, max_age=None)


def test_bounds() -> None:
    for data in (
        RevocationData(ocsp=(b"",) * 65),
        RevocationData(crls=(b"",) * 17),
        RevocationData(ocsp=(bytes(1 << 17),)),
    ):
        with pytest.raises(MalformedEndorsement):
            revocation_of(CHAIN, data, world.AT, max_age=None)


def test_a_responder_that_has_no_answer_is_told() -> None:
    raw = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
    refused = raw.public_bytes(world.Encoding.DER)
    with pytest.raises(MalformedEndorsement, match="TRY_LATER"):
        revocation_of(CHAIN, RevocationData(ocsp=(refused,)), world.AT, max_age=None)
