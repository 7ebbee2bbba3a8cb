"""Devices in a charter: who lets them in and what they run is decided by thresholds, and by nobody alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from charter_world import NOW, World
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from policies.charter import load_charter, propose, publish, sign
from policies.charter.words import differences
from policies.charter.written import written_target
from policies.devices import DeviceIssuer, TaskApproval, job_matches
from policies.errors import ProposalRefused
from policies.keys import public_pem

KEY = public_pem(Ed25519PrivateKey.generate())
TASK = "ab" * 32


def issuer(**changes: Any) -> DeviceIssuer:
    words = {"name": "phones", "member": "borealis-hospital", "signing_key": KEY, "jobs": ("heart-*",)}
    return DeviceIssuer.model_validate({**words, **changes})


def approval() -> TaskApproval:
    return TaskApproval(task=TASK, job="heart-rate", expires=NOW + timedelta(days=30))


@pytest.fixture
def world() -> World:
    return World().found()


@pytest.mark.parametrize(("document", "role"), [(issuer(), "enrolments"), (approval(), "code")])
def test_no_member_alone_lets_devices_in_or_approves_what_they_run(world: World, document: Any, role: str) -> None:
    proposal = sign(propose(world.store, world.put(document), NOW), world.keys["borealis-hospital"], NOW)
    with pytest.raises(ProposalRefused) as caught:
        publish(world.store, proposal, NOW)
    assert any(f"role {role} needs 2 signatures, has 1" in reason for reason in caught.value.reasons)


def test_the_threshold_does(world: World) -> None:
    before = load_charter(world.store, world.root, NOW)
    after = load_charter(world.amend(world.put(issuer(), approval())), world.root, NOW)
    assert (before.device_issuer("phones"), before.device_task(TASK)) == (None, None)
    assert (after.device_issuer("phones"), after.device_task(TASK)) == (issuer(), approval())
    said = "\n".join(str(one) for one in differences(before, after))
    assert "phones, a key of borealis-hospital, which lets devices into the jobs heart-*, each for at most 90" in said
    assert "a task that devices may run for job heart-rate until" in said
    assert TASK in said


def test_an_issuer_of_no_member_is_refused(world: World) -> None:
    with pytest.raises(ProposalRefused) as caught:
        world.amend(world.put(issuer(member="nobody")))
    assert any("nobody is not a member" in reason for reason in caught.value.reasons)


def test_what_is_written_by_hand() -> None:
    table = f'job = "heart-rate"\nexpires = {approval().expires:%Y-%m-%dT%H:%M:%SZ}\n'.encode()
    assert written_target(f"code/device-{TASK}.json", table, "task.toml") == approval().to_bytes()


@pytest.mark.parametrize("jobs", [(), ("",), ("a*b",), ("-x",), ("x" * 65,), ("a/b",)])
def test_patterns_that_are_none(jobs: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        issuer(jobs=jobs)


def test_a_pattern_names_jobs() -> None:
    assert job_matches("heart-rate", ("sleep", "heart-*"))
    assert job_matches("heart-rate", ("heart-rate",))
    assert job_matches("anything", ("*",))
    assert not job_matches("heart-rate", ("heart",))
    assert not job_matches("heart", ("heart-*",))
