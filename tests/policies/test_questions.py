"""The consortium's further demands on guests and jobs, asked of a charter."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from charter_world import NOW, World

from policies.charter import Changes, Charter, load_charter
from policies.questions import admission_document, admission_reasons, appraisal_reasons, ask
from policies.ready_made import shared_policies

JOB: dict[str, Any] = {
    "job": "job-1",
    "name": "hello-pt",
    "bundle": "12" * 32,
    "roster": ["borealis", "cygnus"],
    "server": "server",
    "recipients": ["acme-pharma/ada"],
    "rounds": 3,
    "min_sites": 2,
    "submitter": "acme-pharma/ada",
}
APPRAISAL: dict[str, Any] = {
    "status": "affirming",
    "not-judged": [],
    "failures": [],
    "claims": {"platform": "virtual", "measurement": "ab" * 48, "host_data": "ef" * 32, "chip_id": "00" * 64},
}


@pytest.fixture(scope="module")
def charter() -> Charter:
    world = World().found()
    return load_charter(world.amend(Changes(put=shared_policies())), world.root, NOW)


def test_an_approved_job_is_admitted_at_server_and_sites(charter: Charter) -> None:
    assert admission_reasons(charter, JOB, "server", "server", NOW) == ()
    assert admission_reasons(charter, JOB, "site", "borealis", NOW) == ()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bundle": "34" * 32}, "the bundle is not approved"),
        ({"roster": ["borealis", "delta"]}, "not one that the bundle is approved for"),
        ({"roster": ["cygnus"]}, "has no part in the job"),
        ({"submitter": "acme-pharma/eve"}, "not a user who may submit"),
        ({"recipients": ["acme-pharma/ada", "cygnus-bio/eve"]}, "may download"),
        ({"min_sites": 1}, "too few sites"),
        ({"rounds": 10**6}, "number of rounds"),
    ],
)
def test_a_job_beyond_the_demands_is_not(charter: Charter, change: dict[str, Any], word: str) -> None:
    reasons = admission_reasons(charter, {**JOB, **change}, "site", "borealis", NOW)
    assert any(word in reason for reason in reasons)
    assert all(reason.startswith("policies/admission.rego: ") for reason in reasons)


def test_an_approval_lapses(charter: Charter) -> None:
    later = NOW + timedelta(days=30)
    assert admission_reasons(charter, JOB, "site", "borealis", later) == (
        "policies/admission.rego: the approval of the bundle has lapsed",
    )


def test_rules_see_where_the_sites_stand(charter: Charter) -> None:
    document = admission_document(charter, JOB, "site", "borealis", NOW)
    assert [place["name"] for place in document["sites"]] == ["borealis", "cygnus"]
    assert set(document["charter"]["members"]) == {"acme-pharma", "borealis-hospital", "cygnus-bio"}
    assert "signing_key" not in str(document)


def test_a_sound_guest_meets_the_demands(charter: Charter) -> None:
    enrolment = charter.enrolment("site", "borealis")
    assert enrolment is not None
    assert appraisal_reasons(charter, APPRAISAL, enrolment, NOW) == ()
    for key, value in (("platform", "hardware"), ("measurement", "00" * 48), ("host_data", "00" * 32)):
        claims = {**APPRAISAL["claims"], key: value}
        assert appraisal_reasons(charter, {**APPRAISAL, "claims": claims}, enrolment, NOW)
    assert appraisal_reasons(charter, {**APPRAISAL, "not-judged": ["revocation"]}, enrolment, NOW)
    assert appraisal_reasons(charter, APPRAISAL, enrolment.model_copy(update={"image": "gone"}), NOW)


def test_without_further_demands_there_are_none_but_a_release_needs_both_rules() -> None:
    world = World()
    bare = {path: raw for path, raw in world.files().items() if path != "policies/floor.rego"}
    world.files = lambda: bare  # type: ignore[method-assign]  # a charter without a floor
    charter = load_charter(world.found().store, world.root, NOW)
    enrolment = charter.enrolment("site", "borealis")
    assert enrolment is not None
    assert appraisal_reasons(charter, {}, enrolment, NOW) == ()
    assert admission_reasons(charter, {}, "site", "borealis", NOW) == ()
    answers = ask(charter, "release", {}, "acme-pharma/key/model")
    assert [answer.decision.allow for answer in answers] == [False, False]
    assert "policies/floor.rego is missing" in charter.warnings
