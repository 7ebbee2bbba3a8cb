"""What custodians hold and answer: any k join, fewer do not, and whatever is changed on the way is noticed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.kits.user_keys import UserKeys, create_user_keys
from attestation.broker.cold_start import (
    CUSTODIAN,
    Request,
    answer_request,
    deal_recovery,
    is_current,
    join_answers,
    open_answer,
    read_answer,
    request_reasons,
    request_report_data,
)
from attestation.canonical import b64, canonical_bytes
from attestation.evidence.report import Product
from attestation.guest_keys import GuestKeys
from attestation.messages import EvidenceMessage, check_message
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter import Charter
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment, ImageReference, ReferenceMeasurement
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import BrokerAddress, InitData, write_init_data

VAULT = "acme-pharma/vault-broker/one"
KEY = bytes(range(96))
PEERS = tuple(BrokerAddress(name=name, url=f"https://{name}.example") for name in ("two", "three"))


@dataclass(frozen=True)
class Ceremony:
    """A request of an honest broker, and those who can answer it."""

    charter: Charter
    at: datetime
    request: Request
    boot: GuestKeys
    custodians: Mapping[str, UserKeys]

    def answer(self, member: str, request: Request | None = None) -> str:
        keys = self.custodians[member]
        asked = request or self.request
        return answer_request(asked, self.charter, self.at, member, keys.results_key, keys.signing_key)


@pytest.fixture(scope="module")
def ceremony(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_vendor: Vendor,
    virtual_chips: Mapping[Product, Chip],
    tools: Any,
) -> Ceremony:
    at = datetime.now(UTC).replace(microsecond=0)
    world = tools.found_world(tmp_path_factory.mktemp("cold"), virtual_vendor, virtual_chips, ("one",))
    custodians = {name: create_user_keys("virtual.trial", name, CUSTODIAN, at) for name in world.member_keys}
    place = InitData(
        version=1, algorithm="sha256", charter=world.charter().id, role="broker", name="one", brokers=PEERS
    )
    raw = write_init_data(place)
    measured = ReferenceMeasurement(measurement="03" * 48, vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1)
    image = ImageReference(
        name="broker-image",
        platform="virtual",
        manifest_sha256="0" * 64,
        svn=1,
        measurements=(measured,),
        roles=("broker",),
    )
    enrolment = Enrolment(
        role="broker", name="one", member="acme-pharma", image=image.name, init_data_sha256=sha256(raw).hexdigest()
    )
    users = [keys.document(rights=()) for keys in custodians.values()]
    world.init_data["broker/one"] = raw
    world.change(Changes(put=files_of([image, enrolment, *users])))
    charter = world.charter()
    recovery = deal_recovery("one", VAULT, 3, KEY, charter, os.urandom)
    assert is_current(recovery, "one", VAULT, 3, charter)
    boot, nonce = GuestKeys(), bytes(32)
    attester = world.attester("broker", "one", measurement=b"\x03" * 48)
    evidence = attester.evidence(request_report_data(recovery, charter.version, nonce, boot.public))
    request = Request(
        recovery=recovery,
        version=charter.version,
        evidence=EvidenceMessage(report=b64(evidence.report), certificates=b64(evidence.certificates)),
        init_data=b64(raw),
        keys={purpose: b64(key) for purpose, key in boot.public.items()},
        nonce=b64(nonce),
    )
    assert request_reasons(request, charter, at) == ()
    return Ceremony(charter, at, request, boot, custodians)


def test_any_two_of_three_join_the_keys_and_one_does_not(ceremony: Ceremony) -> None:
    shares = {}
    for member in ceremony.custodians:
        answer = read_answer(ceremony.answer(member), ceremony.request, ceremony.charter)
        shares[member] = open_answer(answer, ceremony.request, ceremony.boot.kem)
    for pair in itertools.combinations(shares, 2):
        assert join_answers({member: shares[member] for member in pair}, 2) == KEY
    for member, share in shares.items():
        assert join_answers({member: share}, 2) != KEY


def test_an_answer_opens_for_the_boot_that_asked_and_counts_for_its_request(ceremony: Ceremony) -> None:
    token = ceremony.answer("acme-pharma")
    answer = read_answer(token, ceremony.request, ceremony.charter)
    with pytest.raises(Refused, match="do not open"):
        open_answer(answer, ceremony.request, GuestKeys().kem)
    with pytest.raises(Refused, match="another request"):
        read_answer(token, ceremony.request.model_copy(update={"nonce": b64(b"\x01" * 32)}), ceremony.charter)
    with pytest.raises(Refused, match="do not open"):
        open_answer(answer.model_copy(update={"member": "cygnus-bio"}), ceremony.request, ceremony.boot.kem)


def test_a_custodian_answers_with_its_own_keys_alone(ceremony: Ceremony) -> None:
    keys, other = ceremony.custodians["acme-pharma"], ceremony.custodians["cygnus-bio"]
    at = ceremony.request, ceremony.charter, ceremony.at
    with pytest.raises(Refused, match="do not open"):
        answer_request(*at, "acme-pharma", other.results_key, other.signing_key)
    token = answer_request(*at, "acme-pharma", keys.results_key, other.signing_key)
    with pytest.raises(Refused, match="signature"):
        read_answer(token, ceremony.request, ceremony.charter)


def test_shares_follow_the_custodians_that_the_charter_has(ceremony: Ceremony) -> None:
    about = ("one", VAULT, 3, ceremony.charter)
    recovery = ceremony.request.recovery
    assert not is_current(recovery, "one", VAULT, 4, ceremony.charter)
    fewer = {name: digest for name, digest in recovery.custodians.items() if name != "cygnus-bio"}
    assert not is_current(recovery.model_copy(update={"custodians": fewer}), *about)


PLACES = st.sampled_from(["version", "nonce", "init_data", "evidence.report", "evidence.certificates", "keys.kem"])
PLACES |= st.sampled_from(["recovery.vault", "recovery.broker", "recovery.charter", "recovery.shares.acme-pharma"])
PLACES |= st.sampled_from(["recovery.commitments.acme-pharma", "recovery.number", "keys.sign"])
VALUES = st.text(max_size=5) | st.integers() | st.none() | st.sampled_from(["A" * 43 + "=", "0" * 64, "two", "AAAA"])


@given(place=PLACES, value=VALUES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_of_which_anything_was_changed_is_not_answered(ceremony: Ceremony, place: str, value: Any) -> None:
    document = json.loads(ceremony.request.to_bytes())
    *path, last = place.split(".")
    inner = document
    for name in path:
        inner = inner[name]
    if inner[last] == value:
        return
    inner[last] = value
    with pytest.raises(SealwrightError):
        ceremony.answer("acme-pharma", check_message(Request, document))


@given(st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
@settings(max_examples=100)
def test_what_is_no_request_is_told_in_a_sentence(value: Any) -> None:
    with pytest.raises(Unusable):
        check_message(Request, value if isinstance(value, dict) else {"recovery": value})


def test_a_request_has_one_form(ceremony: Ceremony) -> None:
    assert canonical_bytes(json.loads(ceremony.request.to_bytes())) == ceremony.request.to_bytes()
