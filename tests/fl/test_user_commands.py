"""Users' commands over real TLS: what each may do, what the ledger has of it, and what a site does not believe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation_world import (
    SERVER,
    SITES,
    TRAIN,
    FederationWorld,
    UserKeys,
    found_federation,
    make_job,
    make_user,
    now,
    wait_until,
)

from fl.environments.user_client import UserClient
from fl.errors import CommandRefused, PeerLost
from fl.guard.command import read_command
from fl.jobs.command import UserCommand, sign_command
from fl.jobs.record import record_digest
from fl.jobs.results import rfc3339
from fl.party import Party
from fl.server.federation import Task
from fl.server.job import RemoteSite
from fl.server.jobs import Jobs
from fl.site.orders import Orders
from fl.transport.frames import Told
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.documents import RIGHTS_SETS
from policies.errors import Refused
from policies.rights import COMMANDS

ADA = "acme-pharma/ada"
OLE = "borealis-hospital/ole"
STALL = "import time\nfrom fl import client as flare\nflare.init()\nflare.receive()\ntime.sleep(100)\n"
MAY = {
    "project-admin": set(COMMANDS) - {"clone"},
    "org-admin": {"abort", "delete", "list", "report", "watch", "approve", "reject", "restart", "stop"},
    "lead": {"submit", "abort", "delete", "download", "list", "report", "watch", "restart", "stop"},
    "member": {"list", "report", "watch"},
    "nothing": set(),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    """The federation, with a user of cygnus-bio for each ready-made set of rights."""
    made = found_federation(tmp_path_factory.mktemp("world"))
    for name, rights in {**RIGHTS_SETS, "nothing": ()}.items():
        add(made, make_user("cygnus-bio", name, *rights))
    add(made, make_user("borealis-hospital", "ida", "approve", "view"))
    return made


def add(world: FederationWorld, user: UserKeys) -> None:
    world.users = {**world.users, f"{user.member}/{user.name}": user}
    world.change(Changes(put=files_of([user.document()])))


@pytest.fixture
def server(world: FederationWorld) -> Iterator[str]:
    world.told.clear()
    world.ledger.clear()
    with world.server() as address:
        yield address


def commands(world: FederationWorld, **wanted: Any) -> list[Mapping[str, Any]]:
    """The ledger's entries about commands that have these members."""
    entries = [document for kind, document in world.ledger if kind == "command"]
    return [entry for entry in entries if all(entry.get(key) == value for key, value in wanted.items())]


def outcome(act: Callable[[], object]) -> str:
    """What became of a command: `done`, `denied` for want of a right, or another refusal's words."""
    try:
        act()
    except Refused as refusal:
        words = "; ".join(refusal.reasons)
        return (
            "denied" if any(of in words for of in ("has no right to", "nor has the right", "did not submit")) else words
        )
    return "done"


@pytest.mark.parametrize("rights", MAY)
def test_each_set_of_rights_gives_its_commands_and_no_other(
    world: FederationWorld, server: str, tmp_path: Path, rights: str
) -> None:
    """Done, or stopped by something else than rights, where the set has the right; denied where it has not."""
    who = f"cygnus-bio/{rights}"
    bundle, model = make_job(tmp_path, STALL, name=f"watched-by-{rights}")
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as owner, model:
        job = owner.submit(bundle, model, roster=None, recipients=[ADA])
        assert wait_until(lambda: owner.report(job).round == 0)
        with world.client(server, who) as client:
            acts: dict[str, Callable[[], object]] = {
                "list": client.reports,
                "report": lambda: client.report(job),
                "watch": lambda: next(client.watch(job)),
                "download": lambda: client.download(job, tmp_path / "x", ledgers=None),
                "delete": lambda: client.delete(job),
                "clone": lambda: client.clone(job),
                "restart": lambda: client.restart(SITES[0]),
                "stop": lambda: client.stop(SITES[0]),
                "approve": lambda: client.approve(job),
                "reject": lambda: client.reject(job, "not with our data"),
                "abort": lambda: client.abort(job),
                "submit": lambda: client.submit(bundle, model, roster=None, recipients=[ADA]),
            }
            found = {name: outcome(act) for name, act in acts.items()}
        done = {"list", "report", "watch", "reject", "abort", "submit"}
        for name in COMMANDS:
            entry = commands(world, user=who, command=name, server=SERVER)[-1]
            assert (found[name] != "denied") == (name in MAY[rights]), (name, found[name])
            assert entry["outcome"] == ("accepted" if name in done & MAY[rights] else "refused")
            if name not in MAY[rights]:
                assert who in entry["reasons"][0]
            if entry["outcome"] == "accepted" and name != "submit":
                assert read_command(entry["token"], world.charter()).command.command == name
        if "reject" in MAY[rights]:
            assert owner.report(job).sites["cygnus-bio"] == f"lost: {who} has rejected the job: not with our data"
            assert found["approve"] == "cygnus-bio has not rejected the job"
        if "delete" in MAY[rights]:
            assert found["delete"] == "the job is running: it is deleted when it is over"
        if "restart" in MAY[rights]:  # the right, but over its own member's sites alone
            assert found["restart"] == found["stop"] == f"{who} does not speak for {SITES[0]}, whose {SITES[0]} is"
        if "download" in MAY[rights]:
            assert "has no result: it is running" in found["download"]
        for other in owner.reports().jobs:
            owner_or_operator(world, server, other.job)


def owner_or_operator(world: FederationWorld, server: str, job: str) -> None:
    """End what a test has started."""
    with world.client(server, OLE) as operator:
        operator.abort(job)


def test_a_job_s_story_is_in_the_ledger(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, name="told", num_rounds=1)
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        list(client.watch(job, timeout=60))
        client.download(job, tmp_path / "result", ledgers=None)
    assert [entry["command"] for entry in commands(world, job=job)] == ["submit", "watch", "download"]
    (submitted,) = commands(world, command="submit")
    taken = [document for kind, document in world.ledger if kind == "job" and document["event"] == "taken"]
    (started,) = [document for kind, document in world.ledger if kind == "job" and document["event"] == "started"]
    assert {entry["record_sha256"] for entry in taken} == {submitted["token"]} == {record_digest(started["record"])}
    assert {entry["submitter"] for entry in taken} == {ADA}


def test_a_member_s_rejection_keeps_its_sites_out_and_can_be_taken_back(
    world: FederationWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.jobs.MAX_RUNNING", 1)
    stalling, first = make_job(tmp_path, STALL, name="stalling")
    world.approve(stalling)
    (tmp_path / "quick").mkdir()
    quick, second = make_job(tmp_path / "quick", name="quick", num_rounds=1)
    world.approve(quick)
    with (
        world.server() as server,
        first,
        second,
        world.site(server, SITES[0]),
        world.site(server, SITES[1]),
        world.client(server) as client,
    ):
        blocking = client.submit(stalling, first, roster=None, recipients=[ADA])
        kept, lost = (client.submit(quick, second, roster=None, recipients=[ADA]) for _ in range(2))
        with world.client(server, "borealis-hospital/ida") as ida:
            ida.reject(kept)
            ida.approve(kept)
            ida.reject(lost, "too few sites")
            with pytest.raises(Refused, match=r"no site of|has not rejected"):
                ida.approve(blocking)
        assert wait_until(lambda: len(commands(world, command="reject", site=SITES[0])) == 2)
        owner_or_operator(world, server, blocking)
        assert last_status(client, kept) == "finished"
        assert last_status(client, lost) == "failed"
        assert client.report(lost).sites[SITES[0]] == "lost: borealis-hospital/ida has rejected the job: too few sites"
        with world.client(server, "borealis-hospital/ida") as ida, pytest.raises(Refused, match="the job is finished"):
            ida.reject(kept)
    taken = [
        (document["job"], document["site"])
        for kind, document in world.ledger
        if kind == "job" and document.get("event") == "taken"
    ]
    assert (kept, SITES[0]) in taken
    assert (lost, SITES[0]) not in taken


def last_status(client: UserClient, job: str) -> str:
    return [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]


# --- what a bad server shows its sites --------------------------------------------------------------------------------


def signed(world: FederationWorld, job: str, user: str, *, key: Ed25519PrivateKey | None = None, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "charter": world.charter().id,
        "server": SERVER,
        "command": "abort",
        "job": job,
        "user": user,
        "created": rfc3339(now()),
        "nonce": "ab" * 16,
    }
    return sign_command(UserCommand(**{**fields, **changes}), key or world.users[user].signing)


FORGED: dict[str, tuple[Callable[[FederationWorld, str], str], str]] = {
    "another's key": (lambda w, j: signed(w, j, OLE, key=Ed25519PrivateKey.generate()), "does not verify"),
    "another's name": (lambda w, j: signed(w, j, OLE, key=w.users["cygnus-bio/member"].signing), "does not verify"),
    "no right": (lambda w, j: signed(w, j, "cygnus-bio/member"), "nor has the right to operate"),
    "no submitter": (lambda w, j: signed(w, j, "cygnus-bio/lead", command="reject"), "no right to approve"),
    "another job": (lambda w, j: signed(w, "other-job", OLE), "about the job other-job"),
    "another server": (lambda w, j: signed(w, j, OLE, server="elsewhere"), "for the server elsewhere"),
    "another charter": (lambda w, j: signed(w, j, OLE, charter="0" * 64), "another charter"),
    "too old": (lambda w, j: signed(w, j, OLE, created=rfc3339(now() - timedelta(hours=25))), "which is not now"),
    "the future": (lambda w, j: signed(w, j, OLE, created=rfc3339(now() + timedelta(hours=1))), "which is not now"),
    "another member": (
        lambda w, j: signed(w, j, "cygnus-bio/org-admin", command="reject"),
        "does not speak for borealis-hospital",
    ),
    "nobody": (lambda w, j: "x.y.z", "base64url"),
    "a job's record": (lambda w, j: w.ledger_record(), "header"),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_command_from_a_bad_server_has_no_effect_at_a_site(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: str
) -> None:
    make, reason = FORGED[forged]
    world.ledger_record = lambda: next(  # type: ignore[attr-defined]
        document["record"] for kind, document in world.ledger if kind == "job" and "record" in document
    )
    bundle, model = make_job(tmp_path, f"# {forged}\n{TRAIN}", num_rounds=2, min_clients=1)
    world.approve(bundle)
    honest = RemoteSite.give

    def give(site: RemoteSite, task: Task) -> None:
        if task.round == 0:
            site.attendance.send(Told(job=site._job.id, command=make(world, site._job.id)))
        honest(site, task)

    monkeypatch.setattr(RemoteSite, "give", give)
    with world.site(server, SITES[0]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
        assert last_status(client, job) == "finished"
    (entry,) = commands(world, site=SITES[0], job=job)
    assert entry["outcome"] == "refused"
    assert re.search(reason, " ".join(entry["reasons"])), entry
    assert any("the server shows a command that is refused here" in line for line in world.told)


def test_a_command_counts_once_at_a_site(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A true rejection, shown again by the server after it was taken back: the site goes by the later word."""
    shown: list[str] = []
    honest = Jobs.tell_sites

    def tell_sites(jobs: Jobs, job: Any, command: str, *, member: str | None = None) -> None:
        honest(jobs, job, command, member=member)
        shown.append(command)
        if len(shown) == 2:  # reject, approve: now the old rejection again
            honest(jobs, job, shown[0], member=member)

    monkeypatch.setattr(Jobs, "tell_sites", tell_sites)
    monkeypatch.setattr("fl.server.jobs.MAX_RUNNING", 1)
    bundle, model = make_job(tmp_path, f"# replayed\n{TRAIN}", num_rounds=1, min_clients=1)
    world.approve(bundle)
    with world.server() as address, model, world.site(address, SITES[0]), world.client(address) as client:
        jobs = [client.submit(bundle, model, roster=[SITES[0]], recipients=[ADA]) for _ in range(3)]
        with world.client(address, "borealis-hospital/ida") as ida:
            ida.reject(jobs[2])
            ida.approve(jobs[2])
        assert last_status(client, jobs[2]) == "finished"
    outcomes = [(entry["command"], entry["outcome"]) for entry in commands(world, job=jobs[2], site=SITES[0])]
    assert outcomes == [("reject", "accepted"), ("approve", "accepted"), ("reject", "refused")]


def test_an_approval_that_a_server_held_back_takes_no_later_rejection_back(world: FederationWorld) -> None:
    written: list[Mapping[str, Any]] = []

    def record(_: str, document: Mapping[str, Any]) -> str:
        written.append(document)
        return ""

    def never() -> Any:
        raise AssertionError("a site's orders need no identity")

    orders = Orders(Party(never, world.charter, now, record, world.told.append), SITES[0], SERVER)
    early, late = (rfc3339(now() - timedelta(minutes=age)) for age in (10, 5))
    member, job = "borealis-hospital/ida", "job-1"
    held = signed(world, job, member, command="approve", created=early, nonce="11" * 16)
    rejection = signed(world, job, member, command="reject", created=late, nonce="22" * 16)
    again = signed(world, job, member, command="approve", nonce="33" * 16)
    heeded = [orders.heed(Told(job=job, command=one), None) is not None for one in (rejection, held)]
    assert heeded == [True, False]
    assert orders.why_rejected(job) == f"{member} has rejected the job"
    assert "after this was signed" in " ".join(written[-1]["reasons"])
    assert orders.heed(Told(job=job, command=again), None) is not None
    assert orders.why_rejected(job) is None


# --- what a hostile user tries ----------------------------------------------------------------------------------------


def test_a_user_brings_only_commands_of_its_own_fresh_and_once(
    world: FederationWorld, server: str, tmp_path: Path
) -> None:
    from fl.transport.frames import JobReport, Order

    with world.client(server, OLE) as client:

        def say(token: str) -> str:
            return outcome(lambda: client._ask_one("Abort", Order(command=token), JobReport))

        assert "brings a command of" in say(signed(world, "j", "cygnus-bio/lead"))
        assert "this call takes abort" in say(signed(world, "j", OLE, command="report"))
        assert "not now" in say(signed(world, "j", OLE, created=rfc3339(now() - timedelta(minutes=6))))
        assert "another charter" in say(signed(world, "j", OLE, charter="0" * 64))
        once = signed(world, "j", OLE, nonce="cd" * 16)
        assert "there is no job j" in say(once)
        assert "counts once" in say(once)
    refused = commands(world, user=OLE, outcome="refused")
    assert len(refused) == 6


def test_nobody_floods_the_ledger(world: FederationWorld, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.guard.command_log.BURST", 5)
    monkeypatch.setattr("fl.guard.command_log.REFILL_SECONDS", 1000.0)
    with world.server() as address, world.client(address, "cygnus-bio/member") as member:
        told = [outcome(partial(member.abort, f"job-{number}")) for number in range(20)]
        for _ in range(20):
            outcome(member.reports)
    assert told[0] == "denied"
    assert len(commands(world, user="cygnus-bio/member")) == 5


def test_without_the_ledger_nothing_is_done(world: FederationWorld, tmp_path: Path) -> None:
    """The brokers are away: what could not be written down does not happen."""
    away = [False]

    def record(kind: str, document: Mapping[str, Any]) -> str:
        if away[0] and kind == "command":
            raise PeerLost("no broker answers", where="ledger")
        return world.record(kind, document)

    bundle, model = make_job(tmp_path, STALL, name="held")
    world.approve(bundle)
    with (
        world.server(record=record) as server,
        model,
        world.site(server, SITES[0]),
        world.site(server, SITES[1]),
        world.client(server) as client,
    ):
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert wait_until(lambda: client.report(job).round == 0)
        away[0] = True
        for act in (
            lambda: client.abort(job),
            lambda: client.submit(bundle, model, roster=None, recipients=[ADA]),
            client.reports,
        ):
            assert "no broker answers" in outcome(act)
        away[0] = False
        assert [report.job for report in client.reports().jobs] == [job]
        assert client.report(job).status.value == "running"
        client.abort(job)
        assert last_status(client, job) == "aborted"


def test_a_refusal_stands_even_if_the_ledger_does_not_take_it(world: FederationWorld) -> None:
    def record(kind: str, document: Mapping[str, Any]) -> str:
        raise PeerLost("no broker answers", where="ledger")

    with world.server(record=record) as server, world.client(server, "cygnus-bio/nothing") as client:
        assert outcome(client.reports) == "denied"
    assert any("a refused command of cygnus-bio/nothing is not in the ledger" in line for line in world.told)


def test_the_forms_of_a_command(world: FederationWorld) -> None:
    charter = world.charter()
    assert read_command(signed(world, "j", OLE), charter).command.job == "j"
    stranger = replace(world.users[OLE], name="mallory")
    for token in (
        "",
        "a.b",
        "x" * 10_000,
        sign_command(UserCommand(**_fields(world, job=None)), world.users[OLE].signing),  # an abort of no job
        sign_command(UserCommand(**_fields(world, command="list")), world.users[OLE].signing),  # a list of one
        sign_command(UserCommand(**_fields(world, user="borealis-hospital/mallory")), stranger.signing),
    ):
        with pytest.raises(CommandRefused):
            read_command(token, charter)


def _fields(world: FederationWorld, **changes: Any) -> dict[str, Any]:
    fields = {"charter": world.charter().id, "server": SERVER, "command": "abort", "job": "j", "user": OLE}
    return {**fields, "created": rfc3339(now()), "nonce": "ef" * 16, **changes}
