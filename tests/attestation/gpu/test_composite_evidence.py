"""A CPU's report with its devices: bound to one session, and the worst of them decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha384
from typing import Any

import nvidia_world as world
import pytest

from attestation.endorsements.chain import Endorsements
from attestation.endorsements.roots import RootPin
from attestation.errors import MalformedEvidence
from attestation.evidence.gpu.document import write_gpu_document
from attestation.evidence.report import Product
from attestation.verifier.check import Expected
from attestation.verifier.composite import (
    CompositeAppraisal,
    RuntimeData,
    ear_submods,
    read_additional_evidence,
    verify_composite,
)
from attestation.verifier.profile import SHOW, Profile, with_virtual_roots
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor

KEY = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": "AA", "y": "BB"}
SESSION = RuntimeData("bm9uY2U=", KEY)


def additional(*devices: world.Device, nonce: bytes) -> str:
    evidence = tuple(world.evidence(device, nonce=nonce) for device in devices)
    return json.dumps({"nvidia": json.loads(write_gpu_document(evidence))})


def test_report_data_binds_nonce_key_and_additional_evidence() -> None:
    canonical = (
        b'{"additional-evidence":"","nonce":"bm9uY2U=","tee-pubkey":'
        b'{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"AA","y":"BB"}}'
    )
    assert SESSION.report_data() == sha384(canonical).digest() + bytes(16)
    assert SESSION.device_nonce() == sha384(canonical.replace(b'"additional-evidence":"",', b"")).digest()[:32]
    changed = [replace(SESSION, nonce="x"), replace(SESSION, additional_evidence="x"), replace(SESSION, tee_pubkey={})]
    assert len({one.report_data() for one in (SESSION, *changed)}) == 4


def test_a_devices_nonce_does_not_depend_on_its_own_evidence() -> None:
    assert replace(SESSION, additional_evidence="x").device_nonce() == SESSION.device_nonce()


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"tdx": {}}', '{"nvidia": []}', '{"nvidia": {}, "more": 1}', '{"nvidia": "{"}', '"\ud800"'],
)
def test_other_additional_evidence_is_refused(text: str) -> None:
    with pytest.raises(MalformedEvidence):
        read_additional_evidence(text)


def test_additional_evidence_may_be_text_inside() -> None:
    (device,) = [world.make_device()]
    inner = write_gpu_document((world.evidence(device),)).decode()
    assert len(read_additional_evidence(json.dumps({"nvidia": inner}))) == 1
    assert read_additional_evidence("") == ()


@pytest.fixture(scope="module")
def milan(virtual_vendor: Vendor) -> tuple[Profile, Endorsements]:
    authority = virtual_vendor.authority(Product.MILAN)
    profile = with_virtual_roots(SHOW, [RootPin(Product.MILAN, authority.ark_spki_sha256, virtual=True)])
    return profile, Endorsements(intermediates=(authority.ask, authority.ark))


def test_cpu_and_gpu_in_one_session(virtual_chips: Mapping[Product, Chip], milan: tuple[Profile, Endorsements]) -> None:
    chip, (profile, endorsements) = virtual_chips[Product.MILAN], milan
    runtime = replace(SESSION, additional_evidence=additional(world.make_device(), nonce=SESSION.device_nonce()))
    now = datetime.now(UTC)

    def appraise(bound: RuntimeData, claimed: RuntimeData) -> CompositeAppraisal:
        report = sign_report(chip, report_data=bound.report_data())
        mine = replace(endorsements, vek=chip.vcek)
        rims = world.good_rims()
        return verify_composite(report, mine, claimed, profile, world.profile(), Expected(), rims=rims, at=now)

    good = appraise(runtime, runtime)
    assert good.status == "affirming", good.parts
    assert {name: part.status for name, part in good.parts.items()} == {"cpu0": "affirming", "gpu0": "affirming"}
    other = replace(SESSION, additional_evidence=additional(world.make_device(number=9), nonce=SESSION.device_nonce()))
    swapped = appraise(runtime, other)
    assert swapped.status == "contraindicated", "another GPU than the one the CPU vouched for"
    assert [failure.check for failure in swapped.parts["cpu0"].failures] == ["freshness"]
    assert swapped.parts["gpu0"].status == "affirming", "good by itself, but not this machine's"
    left_out = appraise(runtime, SESSION)
    assert left_out.status == "contraindicated", "the GPU left out"


def test_the_devices_are_judged_where_the_cpu_is_not_believed() -> None:
    runtime = replace(SESSION, additional_evidence=additional(world.make_device(), nonce=SESSION.device_nonce()))
    composite = verify_composite(
        bytes(1184), Endorsements(), runtime, SHOW, world.profile(), Expected(), rims=world.good_rims(), at=world.AT
    )
    assert composite.status == "none", "the worst of both"
    assert composite.parts["gpu0"].status == "affirming"
    submods: Mapping[str, Any] = ear_submods(composite, "p")
    assert sorted(submods) == ["cpu0", "gpu0"]
    assert submods["gpu0"]["ear.status"] == "affirming"
    assert submods["gpu0"]["ear.veraison.annotated-evidence"]["nvidia"]["driver_version"] == world.DRIVER
    json.dumps(submods)


def test_a_device_of_another_session_is_refused() -> None:
    runtime = replace(SESSION, additional_evidence=additional(world.make_device(), nonce=bytes(32)))
    composite = verify_composite(bytes(1184), Endorsements(), runtime, SHOW, world.profile(), Expected(), at=world.AT)
    assert [failure.check for failure in composite.parts["gpu0"].failures] == ["gpu-freshness"]


def test_another_report_data_than_the_runtime_datas_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="REPORT_DATA"):
        verify_composite(
            bytes(1184), Endorsements(), SESSION, SHOW, world.profile(), Expected(report_data=bytes(64)), at=world.AT
        )
