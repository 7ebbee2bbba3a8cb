"""The consortium's further demands on guests and jobs, asked of a charter."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from charter_world import NOW, World, enrolment

from policies.charter import Changes, Charter, files_of, load_charter
from policies.errors import MalformedDocument
from policies.inputs import INPUTS, SCHEMAS, input_complaints, schema
from policies.questions import (
    Place,
    admission_document,
    admission_reasons,
    appraisal_document,
    appraisal_reasons,
    ask,
    completed,
    export_document,
    export_reasons,
    peer_document,
    peer_reasons,
)
from policies.ready_made import READY_MADE, ready_made, shared_policies

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


def test_a_job_of_devices_runs_at_the_nodes_of_its_tree(charter: Charter) -> None:
    """One gateway may be all of its roster: an aggregate is of devices, and of so many at least."""
    job = {**JOB, "min_sites": 1, "devices": 2}
    for role in ("gateway", "inner"):
        assert admission_reasons(charter, job, role, "borealis", NOW) == ()
        assert admission_reasons(charter, job, role, "elsewhere", NOW)
    for worse in ({"devices": 1}, {"devices": 1, "min_sites": 2}, {"devices": 0}, {"min_sites": 3}):
        reasons = admission_reasons(charter, {**job, **worse}, "gateway", "borealis", NOW)
        assert reasons == ("policies/admission.rego: too few sites take part in each round",)


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


def test_demands_on_a_guest_see_its_devices() -> None:
    rules = b"""package sealwright.appraisal
import rego.v1
default allow := false
allow if count(reasons) == 0
reasons contains "an old driver" if not current
current if {
    count(input.devices) > 0
    every device in input.devices { device.claims.driver_version == "570.1" }
}
"""
    world = World().found()
    charter = load_charter(world.amend(Changes(put={"policies/appraisal.rego": rules})), world.root, NOW)
    enrolment = charter.enrolment("site", "borealis")
    assert enrolment is not None
    good, old = ({"claims": {"driver_version": version}} for version in ("570.1", "535.9"))
    assert appraisal_reasons(charter, APPRAISAL, enrolment, NOW, devices={"gpu0": good}) == ()
    for devices in (None, {}, {"gpu0": good, "gpu1": old}):
        reasons = appraisal_reasons(charter, APPRAISAL, enrolment, NOW, devices=devices)
        assert reasons == ("policies/appraisal.rego: an old driver",)


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


PEER: dict[str, Any] = {
    "role": "server",
    "name": "server",
    "age_seconds": 3,
    "submods": {"cpu0": {"ear.status": "affirming"}},
    "brokers": ["broker-1"],
}
SITE: Place = ("site", "borealis")


def with_jurisdictions(world: World, rules: dict[str, bytes] | None = None) -> Charter:
    """Acme's server stands in Germany, the hospital's site in France, the other nowhere; acme is at home in the US."""
    members = tuple(
        member.model_copy(update={"jurisdiction": "US-CA"}) if member.name == "acme-pharma" else member
        for member in world.consortium.members
    )
    world.consortium = world.consortium.model_copy(update={"members": members})
    world.found()
    places = (
        enrolment("server", "server", "acme-pharma").model_copy(update={"jurisdiction": "DE"}),
        enrolment("site", "borealis", "borealis-hospital").model_copy(update={"jurisdiction": "FR"}),
    )
    put = {**shared_policies(), **files_of(places), **(rules or {})}
    return load_charter(world.amend(Changes(put=put)), world.root, NOW)


def test_the_ready_made_demands_on_peers_and_exports_let_a_federation_work(charter: Charter) -> None:
    site = {**PEER, "role": "site", "name": "borealis"}
    assert peer_reasons(charter, SITE, PEER, NOW) == ()
    assert peer_reasons(charter, ("server", "server"), site, NOW) == ()
    for kind, size in (("update", 10**9), ("metric", 100), ("log", 30)):
        sent = export_reasons(charter, JOB, kind, size, here=SITE, to=("server", "server"), at=NOW)  # type: ignore[arg-type]
        assert sent == ()
    to = ("user", "acme-pharma/ada")
    server: Place = ("server", "server")
    assert export_reasons(charter, JOB, "result", 10**6, here=server, to=to, at=NOW, sealed=True) == ()


@pytest.mark.parametrize(
    ("here", "change", "word"),
    [
        (("site", "cygnus"), {"role": "site", "name": "borealis"}, "do not talk to each other"),
        (SITE, {"role": "broker"}, "do not talk to each other"),
        (SITE, {"age_seconds": 301}, "attested too long ago"),
        (SITE, {"submods": {"cpu0": {"ear.status": "warning"}}}, "not affirming"),
        (SITE, {"submods": {}}, "not affirming"),
    ],
)
def test_a_peer_beyond_the_demands_is_not_one(charter: Charter, here: Place, change: dict[str, Any], word: str) -> None:
    reasons = peer_reasons(charter, here, {**PEER, **change}, NOW)
    assert any(word in reason for reason in reasons)
    assert all(reason.startswith("policies/peers.rego: ") for reason in reasons)


@pytest.mark.parametrize(
    ("kind", "size", "here", "to", "sealed", "word"),
    [
        ("update", 10**9, SITE, ("server", "server-2"), False, "does not go where"),
        ("update", 10**9, SITE, ("site", "cygnus"), False, "does not go where"),
        ("metric", 5000, SITE, ("server", "server"), False, "too large"),
        ("raw", 1, SITE, ("server", "server"), False, "nothing of this kind leaves"),
        ("result", 10, ("server", "server"), ("user", "acme-pharma/ada"), False, "does not go where"),
        ("result", 10, ("server", "server"), ("user", "cygnus-bio/eve"), True, "does not go where"),
        ("result", 10, SITE, ("user", "acme-pharma/ada"), True, "does not go where"),
    ],
)
def test_what_must_not_leave_does_not(
    charter: Charter, kind: Any, size: int, here: Place, to: tuple[str, str], sealed: bool, word: str
) -> None:
    reasons = export_reasons(charter, JOB, kind, size, here=here, to=to, at=NOW, sealed=sealed)
    assert any(word in reason for reason in reasons)
    assert all(reason.startswith("policies/export.rego: ") for reason in reasons)


def test_updates_of_one_site_go_only_to_servers_in_the_jurisdictions_that_it_wants() -> None:
    """The hospital's own demand beside the ready-made ones: "this data's updates only to servers in these"."""
    rules = ready_made("export") + (
        '\nreasons contains "updates of borealis go to servers in the EU alone" if {\n'
        '\tinput.from.name == "borealis"\n\tnot in_eu\n}\n\nin_eu if input.to.jurisdiction in {"DE", "FR"}\n'
    )
    charter = with_jurisdictions(World(), {"policies/export.rego": rules.encode()})
    to = ("server", "server")
    assert export_reasons(charter, JOB, "update", 10, here=SITE, to=to, at=NOW) == ()
    moved = enrolment("server", "server", "acme-pharma")
    for jurisdiction in ("US-CA", None):
        place = moved.model_copy(update={"jurisdiction": jurisdiction})
        documents = {**charter.documents, "enrolments/server/server.json": place}
        elsewhere = replace(charter, documents=documents)
        assert export_reasons(elsewhere, JOB, "update", 10, here=SITE, to=to, at=NOW) == (
            "policies/export.rego: updates of borealis go to servers in the EU alone",
        )
        assert export_reasons(elsewhere, JOB, "update", 10, here=("site", "cygnus"), to=to, at=NOW) == ()


def test_rules_see_where_peers_and_receivers_stand() -> None:
    charter = with_jurisdictions(World())
    assert peer_document(charter, SITE, PEER, NOW)["peer"]["jurisdiction"] == "DE"
    assert peer_document(charter, SITE, PEER, NOW)["here"]["jurisdiction"] == "FR"
    lies = {**PEER, "jurisdiction": "FR", "member": "borealis-hospital"}  # the charter decides, not what is shown
    assert peer_document(charter, SITE, lies, NOW)["peer"]["member"] == "acme-pharma"
    assert peer_document(charter, SITE, lies, NOW)["peer"]["jurisdiction"] == "DE"
    unknown = peer_document(charter, ("site", "cygnus"), {**PEER, "name": "nobody"}, NOW)
    assert (unknown["here"]["jurisdiction"], unknown["peer"]["member"]) == (None, None)
    result = export_document(
        charter, JOB, "result", 1, here=("server", "server"), to=("user", "acme-pharma/ada"), at=NOW
    )
    assert result["to"]["jurisdiction"] == "US-CA"
    nobody = export_document(charter, JOB, "result", 1, here=("server", "server"), to=("user", "eve"), at=NOW)
    assert nobody["to"]["member"] is None


def test_a_module_that_is_not_there_demands_nothing() -> None:
    world = World().found()
    charter = load_charter(world.store, world.root, NOW)
    assert peer_reasons(charter, SITE, {"role": "broker", "name": "x"}, NOW) == ()
    assert export_reasons(charter, {}, "update", 10**18, here=SITE, to=("site", "x"), at=NOW) == ()


def test_the_charter_completes_a_question(charter: Charter) -> None:
    asked = completed(charter, "admission", {"job": JOB}, SITE, NOW)
    assert asked == admission_document(charter, JOB, "site", "borealis", NOW)
    assert completed(charter, "admission", {"job": JOB}, None, NOW) == {"job": JOB}
    assert completed(charter, "peers", {"peer": PEER}, SITE, NOW) == peer_document(charter, SITE, PEER, NOW)
    facts = {"job": JOB, "kind": "update", "size": 3, "to": {"role": "server", "name": "server"}}
    assert completed(charter, "export", facts, SITE, NOW)["to"]["member"] == "acme-pharma"
    assert completed(charter, "appraisal", {"appraisal": APPRAISAL}, SITE, NOW)["image"]["name"] == "demo"
    assert completed(charter, "release", {"ear": {}}, SITE, NOW)["enrolment"]["name"] == "borealis"
    for subject, lacking in (("admission", {}), ("peers", {"peer": {}}), ("export", {"to": 3}), ("peers", {"peer": 3})):
        with pytest.raises(MalformedDocument, match="lacks what one about"):
            completed(charter, subject, lacking, SITE, NOW)  # type: ignore[arg-type]


def test_a_command_is_answered_by_the_rights_of_who_gives_it(charter: Charter) -> None:
    (answer,) = ask(charter, "command", {"user": "acme-pharma/ada", "command": "submit"})
    assert answer.decision.allow
    (answer,) = ask(charter, "command", {"user": "acme-pharma/ada", "command": "reject"})
    assert answer.decision.reasons == ("acme-pharma/ada has no right to approve",)
    (answer,) = ask(charter, "command", {"user": "acme-pharma/eve", "command": "list"})
    assert "no user of charter" in answer.decision.reasons[0]
    for strange in ({}, {"user": "acme-pharma/ada", "command": "delete"}, {"user": "acme-pharma/ada", "command": None}):
        assert not ask(charter, "command", strange)[0].decision.allow


# --- schemas ----------------------------------------------------------------------------------------------------------


RECORD = {**JOB, "version": 1, "charter": "00" * 32, "model_sha256": "00" * 32, "model_size": 9}


def test_the_schemas_are_those_of_the_models() -> None:
    """`python -m policies.inputs` makes them."""
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(INPUTS) == set(READY_MADE)
    for package in INPUTS:
        assert (SCHEMAS / f"{package}.json").read_text("utf-8") == schema(package)


def test_what_is_asked_fits_the_schemas() -> None:
    charter = with_jurisdictions(World())
    place = charter.enrolment("site", "borealis")
    server: Place = ("server", "server")
    ada = ("user", "acme-pharma/ada")
    appraisal = {**APPRAISAL, "trustworthiness-vector": {"hardware": 2}}
    asked = {
        "admission": admission_document(charter, RECORD, "site", "borealis", NOW),
        "appraisal": appraisal_document(charter, appraisal, place, NOW),
        "peers": peer_document(charter, SITE, PEER, NOW),
        "export": export_document(charter, RECORD, "update", 10, here=SITE, to=server, at=NOW),
    }
    for package, document in asked.items():
        assert input_complaints(package, document) == []
        for member in document:
            assert input_complaints(package, {key: value for key, value in document.items() if key != member})
        assert input_complaints(package, {**document, "more": 1})
    result = export_document(charter, RECORD, "result", 10, here=server, to=ada, at=NOW, sealed=True)
    assert input_complaints("export", result) == []
    strange = {**RECORD, "bundle": "34" * 32, "submitter": "x/y"}
    assert input_complaints("admission", admission_document(charter, strange, "server", "server", NOW)) == []
