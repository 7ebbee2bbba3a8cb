"""Sites and servers are looked after by users: what each may do, what a site believes, and what no payload reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from federation_world import (
    SERVER,
    SITES,
    TRAIN,
    FederationWorld,
    found_federation,
    make_job,
    make_user,
    now,
    wait_until,
)
from safetensors.numpy import load_file

from fl.environments.user_client import UserClient
from fl.errors import PeerLost
from fl.jobs.command import UserCommand, sign_command
from fl.jobs.progress import JobEvent
from fl.jobs.results import rfc3339
from fl.run import Run
from fl.server.federation import Task
from fl.server.job import RemoteSite
from fl.transport.frames import Steer
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.errors import Refused, Unusable

ADA = "acme-pharma/ada"
OLE = "borealis-hospital/ole"
OPS = "acme-pharma/ops"
CYRIL = "cygnus-bio/cyril"
PAUSING = TRAIN.replace("while flare.is_running():", "import time\nwhile flare.is_running():\n    time.sleep(0.5)", 1)
STALL = "import time\nfrom fl import client as flare\nflare.init()\nflare.receive()\ntime.sleep(100)\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    """The federation, with an operator for each member: ole, ops (whose server it is), cyril."""
    made = found_federation(tmp_path_factory.mktemp("world"))
    for user in (make_user("acme-pharma", "ops", "operate", "view"), make_user("cygnus-bio", "cyril", "operate")):
        made.users = {**made.users, f"{user.member}/{user.name}": user}
        made.change(Changes(put=files_of([user.document()])))
    return made


@pytest.fixture
def server(world: FederationWorld) -> Iterator[str]:
    world.told.clear()
    world.ledger.clear()
    with world.server() as address:
        yield address


def outcomes(world: FederationWorld, command: str) -> list[tuple[str, str, str]]:
    """Where, by whom, and with what outcome such commands are in the ledger."""
    entries = [document for kind, document in world.ledger if kind == "command" and document["command"] == command]
    return [(entry.get("site") or entry["server"], entry["user"], entry["outcome"]) for entry in entries]


def connections(world: FederationWorld, site: str) -> int:
    return sum(line == f"site {site} is connected" for line in world.told)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        act()
    return " ".join(caught.value.reasons)


def test_places_tell_who_is_connected_and_at_work(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, STALL, name="stalling", min_clients=1)
    world.approve(bundle)
    with model, world.client(server) as ada, world.client(server, OPS) as ops:
        assert [(site.name, site.connected) for site in ops.places().sites] == [(name, None) for name in sorted(SITES)]
        with world.site(server, SITES[1]):
            job = ada.submit(bundle, model, roster=[SITES[1]], recipients=[ADA])
            assert wait_until(lambda: ada.report(job).round == 0)
            told = ops.places()
            first, second = told.sites
            assert (first.name, first.member, second.name) == (SITES[1], "cygnus-bio", SITES[0])
            assert first.jobs == {job: "in the job"}
            assert first.connected is not None
            assert first.lease_until is not None
            assert first.connected < first.lease_until
            assert (told.server, told.member, told.keeps_jobs) == (SERVER, "acme-pharma", False)
            assert {status.value: count for status, count in told.jobs.items()} == {"running": 1}
            ada.abort(job)


def test_a_restarted_site_ends_its_jobs_and_takes_others(world: FederationWorld, server: str, tmp_path: Path) -> None:
    stalling, first = make_job(tmp_path, STALL, name="stalling", min_clients=1)
    (tmp_path / "quick").mkdir()
    quick, second = make_job(tmp_path / "quick", name="quick", num_rounds=1, min_clients=1)
    world.approve(stalling)
    world.approve(quick)
    with first, second, world.site(server, SITES[0]) as site, world.client(server) as ada:
        job = ada.submit(stalling, first, roster=[SITES[0]], recipients=[ADA])
        assert wait_until(lambda: ada.report(job).round == 0)
        with world.client(server, OLE) as ole:
            ole.restart(SITES[0])
        assert [event.text for event in ada.watch(job, timeout=30) if event.kind == "status"][-1] == "failed"
        assert ada.report(job).sites[SITES[0]] == "lost: the site restarts"
        assert wait_until(lambda: connections(world, SITES[0]) == 2)
        again = ada.submit(quick, second, roster=[SITES[0]], recipients=[ADA])
        assert [event.text for event in ada.watch(again, timeout=30) if event.kind == "status"][-1] == "finished"
        assert site.error is None
    assert outcomes(world, "restart") == [(SERVER, OLE, "accepted"), (SITES[0], OLE, "accepted")]


def test_a_stopped_site_ends_in_peace(world: FederationWorld, server: str) -> None:
    with world.site(server, SITES[0]) as site, world.client(server, OLE) as ole:
        ole.stop(SITES[0])
        assert wait_until(lambda: site.ended.is_set())
        assert site.error is None
        assert not site.stop.is_set()
        assert next(one for one in ole.places().sites if one.name == SITES[0]).connected is None
        with pytest.raises(Refused, match="is not connected"):
            ole.stop(SITES[0])


def test_only_operators_of_its_own_member_steer_a_place(world: FederationWorld, server: str) -> None:
    with world.site(server, SITES[0]) as site:
        for who, place, reason in (
            (OPS, SITES[0], f"does not speak for {SITES[0]}, whose {SITES[0]} is"),
            (CYRIL, SITES[0], "does not speak for"),
            (CYRIL, SERVER, f"does not speak for acme-pharma, whose {SERVER} is"),
            (OLE, SERVER, "does not speak for acme-pharma"),
            (ADA, SERVER, "no right to operate"),
            ("cygnus-bio/cy", SITES[1], "no right to operate"),
            (OLE, "nowhere", "the charter has no site nowhere"),
        ):
            with world.client(server, who) as client:
                for act in (client.restart, client.stop):
                    assert reason in refusal(lambda act=act, place=place: act(place))  # type: ignore[misc]
        assert connections(world, SITES[0]) == 1
        assert not site.ended.is_set()
    assert {outcome for command in ("restart", "stop") for *_, outcome in outcomes(world, command)} == {"refused"}


# --- what a bad server shows its sites --------------------------------------------------------------------------------


def signed(world: FederationWorld, user: str, key: Any = None, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "charter": world.charter().id,
        "server": SERVER,
        "command": "stop",
        "job": None,
        "place": SITES[0],
        "user": user,
        "created": rfc3339(now()),
        "nonce": "ab" * 16,
    }
    return sign_command(UserCommand(**{**fields, **changes}), key or world.users[user].signing)


FORGED: dict[str, tuple[Callable[[FederationWorld], str], str]] = {
    "another's key": (lambda w: signed(w, OLE, w.users[CYRIL].signing), "does not verify"),
    "another member": (lambda w: signed(w, CYRIL), "does not speak for borealis-hospital"),
    "the server's member": (lambda w: signed(w, OPS), "does not speak for borealis-hospital"),
    "no right": (lambda w: signed(w, ADA), "no right to operate"),
    "another place": (lambda w: signed(w, OLE, place=SITES[1]), f"it is about {SITES[1]}, not {SITES[0]}"),
    "held back": (lambda w: signed(w, OLE, created=rfc3339(now() - timedelta(minutes=6))), "which is not now"),
    "a job's command": (lambda w: signed(w, OLE, command="abort", job="j", place=None), "it is about no site"),
    "nobody": (lambda w: "x.y.z", "base64url"),
}


def test_a_site_obeys_no_forged_order_of_a_bad_server_and_a_true_one_once(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = RemoteSite.give
    once = signed(world, OLE, command="restart", nonce="cd" * 16)

    def give(site: RemoteSite, task: Task) -> None:
        if task.round == 0:
            for make, _ in FORGED.values():
                site.attendance.send(Steer(command=make(world)))
        honest(site, task)

    monkeypatch.setattr(RemoteSite, "give", give)
    bundle, model = make_job(tmp_path, TRAIN, name="steered", num_rounds=2, min_clients=1)
    world.approve(bundle)
    with model, world.site(server, SITES[0]) as site, world.client(server) as ada:
        job = ada.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
        assert [event.text for event in ada.watch(job, timeout=60) if event.kind == "status"][-1] == "finished"
        assert connections(world, SITES[0]) == 1
        monkeypatch.setattr(
            RemoteSite, "give", lambda one, task: [one.attendance.send(Steer(command=once)), honest(one, task)]
        )
        for times in (2, 2):  # the second time it is a replay
            again = ada.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
            last = [event.text for event in ada.watch(again, timeout=60) if event.kind == "status"][-1]
            assert last in {"failed", "finished"}
            assert wait_until(lambda times=times: connections(world, SITES[0]) == times)  # type: ignore[misc]
        assert site.error is None
    reasons = [
        " ".join(entry["reasons"])
        for kind, entry in world.ledger
        if kind == "command" and entry.get("site") == SITES[0] and entry["outcome"] == "refused"
    ]
    for _, reason in FORGED.values():
        assert any(reason in one for one in reasons), (reason, reasons)
    assert any("counts once" in one for one in reasons)


# --- the server itself ------------------------------------------------------------------------------------------------


def test_a_server_starts_anew_where_it_was_and_stops(world: FederationWorld) -> None:
    def listening() -> int:
        return sum(line.startswith("the server listens on") for line in world.told)

    world.told.clear()
    with world.server() as address, world.site(address, SITES[0], patience=30.0) as site:
        with world.client(address, OPS) as ops:
            before = ops.places().serving
            ops.restart(SERVER)
        assert wait_until(lambda: listening() == 2 and connections(world, SITES[0]) == 2, 20), world.told
        with world.client(address, OPS) as ops:
            assert ops.places().serving >= before
            site.stop.set()
            ops.stop(SERVER)
        assert wait_until(lambda: gone(world, address), 20)


def test_a_finished_result_is_there_after_a_restart_and_its_job_is_cloned_and_deleted(
    world: FederationWorld, tmp_path: Path
) -> None:
    """Clones are judged as any job; what is deleted is gone, on disk too; a job that runs survives a stop in peace."""
    state = tmp_path / "state"
    bundle, model = make_job(tmp_path, TRAIN, name="kept", num_rounds=1, min_clients=1)
    pausing, first = make_job(tmp_path, PAUSING, name="pausing", num_rounds=2, min_clients=1, round_seconds=60)
    world.approve(bundle)
    world.approve(pausing)
    world.told.clear()
    world.ledger.clear()
    with (
        model,
        first,
        world.server(state=state) as address,
        world.site(address, SITES[0], number=2.0, patience=30.0),
        world.site(address, SITES[1], number=2.0, patience=30.0),
    ):
        with world.client(address) as ada, world.client(address, OPS) as ops:
            done = ada.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
            assert last_status(ada, done) == "finished"
            running = ada.submit(pausing, first, roster=list(SITES), recipients=[ADA])
            assert wait_until(lambda: ada.report(running).round == 0)
            told = ada.report(done)
            ops.restart(SERVER)
        assert wait_until(lambda: all(connections(world, site) == 2 for site in SITES), 20)
        with world.client(address) as ada, world.client(address, OPS) as ops:
            assert last_status(ada, running) == "finished"
            assert ada.report(done) == told
            assert [event.kind for event in ada.watch(done)][-2:] == ["aggregated", "status"]
            result = ada.download(done, tmp_path / "result", ledgers=None)
            assert load_file(result / "model.safetensors")["w"].tolist() == [2.0] * 3
            assert load_file(ada.download(running, tmp_path / "other", ledgers=None) / "model.safetensors")["w"][0] == 4
            clone = ada.clone(done, roster=[SITES[1]])
            assert last_status(ada, clone) == "finished"
            assert list(ada.report(clone).sites) == [SITES[1]]
            assert load_file(ada.download(clone, tmp_path / "clone", ledgers=None) / "model.safetensors")["w"][0] == 2
            assert "did not submit the job" in refusal(lambda: ops.clone(done))
            with world.client(address, "cygnus-bio/cy") as stranger:
                assert "nor has the right" in refusal(lambda: stranger.delete(done))
            ops.delete(done)
            for act in (
                ada.report,
                ada.delete,
                ada.clone,
                lambda job: ada.download(job, tmp_path / "no", ledgers=None),
            ):
                with pytest.raises(Refused, match=r"there is no job|neither submitted"):
                    act(done)
            world.change(Changes(remove=frozenset({f"code/{bundle.digest}.json"})))
            with pytest.raises(Refused, match="is not approved"):
                ada.clone(clone)
            for job in (clone, running):
                ada.delete(job)
        assert wait_until(lambda: not list(state.iterdir()), 5)
    events = [document["event"] for kind, document in world.ledger if kind == "job" and document.get("job") == running]
    assert "aborted" not in events
    assert "resumed" in events


def last_status(client: UserClient, job: str) -> str:
    return [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]


def gone(world: FederationWorld, address: str) -> bool:
    try:
        with world.client(address, OPS):
            return False
    except PeerLost:
        return True


# --- payloads ---------------------------------------------------------------------------------------------------------

PAYLOADS = (
    "; touch MARK",
    "$(touch MARK)",
    "`touch MARK`",
    "| touch MARK",
    "&& touch MARK",
    "x\ntouch MARK",
    "-f /etc/passwd",
    "--file=/etc/passwd",
    "-e . /etc/passwd",
    "../../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "/etc/passwd",
    "/proc/self/environ",
    "file:///etc/passwd",
    "*",
    "~root",
    "{{7*7}}",
    "%s%n%x",
    "a\x00b",
    "\x1b]0;owned\x07",
    "__import__('os').system('touch MARK')",
    "!!python/object/apply:os.system ['touch MARK']",
    "cos\nsystem\n(S'touch MARK'\ntR.",
    "' OR '1'='1",
    "x" * 100_000,
    "",
)
"""What was sent to consoles of this kind: shell and option injection into tail and grep, traversal of paths, formats,
terminals' escapes, pickles, YAML's objects, and sheer length."""


def test_no_payload_reaches_a_shell_or_a_file(world: FederationWorld, tmp_path: Path) -> None:
    """In place of each name that a command takes; by a client that checks nothing, too."""
    state = tmp_path / "state"
    mark = tmp_path / "mark"
    with world.server(state=state) as server, world.client(server, OPS) as client:
        before = sorted(path.name for path in state.iterdir())
        acts: list[Callable[[str], object]] = [
            client.restart,
            client.stop,
            client.report,
            client.abort,
            lambda text: client.reject("no-such-job", text) if len(text) > 500 else client.report(text),
            lambda text: next(client.watch(text)),
            lambda text: client.download(text, tmp_path / "never", ledgers=None),
        ]
        for payload in PAYLOADS:
            text = payload.replace("MARK", str(mark))
            for act in acts:
                with pytest.raises((Refused, Unusable)):
                    act(text)
            for verb, method, field in (
                ("restart", "Steer", "place"),
                ("abort", "Abort", "job"),
                ("watch", "Watch", "job"),
            ):
                with pytest.raises((Refused, Unusable)):
                    say_unchecked(world, client, method, {"command": verb, field: text})
        assert sorted(path.name for path in state.iterdir()) == before
        assert client.places().server == SERVER
    assert not mark.exists()
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(.*a){25}", "[", "\\\\", "../../etc/passwd", "-f /etc/passwd", "a" * 100_000]
)
def test_what_is_looked_for_is_text_whatever_it_is(text: str) -> None:
    """A pattern that would take for ever, or none at all, is a text that no line has, or the one that has it."""

    class Handle:
        def events(self) -> list[JobEvent]:
            told = [JobEvent(kind="lost", site="north", text="a" * 1900 + "!") for _ in range(1000)]
            return [*told, JobEvent(kind="lost", site="south", text=f"it said {text[:1000]}")]

        def logs(self) -> dict[str, str]:
            return {}

    run = Run("job", Handle())  # type: ignore[arg-type]
    found = run.logs(tail=10, grep=text)
    assert found == ([] if len(text) > 1000 else [f"south is lost: it said {text}"])
    assert run.logs(tail=0) == []
    assert len(run.logs(tail=7)) == 7


def say_unchecked(world: FederationWorld, client: UserClient, method: str, changes: dict[str, Any]) -> None:
    """Send a command that no model of ours has checked, signed by its user."""
    from attestation.jws import sign_jws
    from fl.jobs.command import COMMAND_TYPE
    from fl.transport.frames import Order, Verdict

    user = world.users[OPS]
    whole = {"charter": world.charter().id, "server": SERVER, "command": "list", "job": None, "user": OPS}
    body = UserCommand(**whole, created=rfc3339(now()), nonce="ef" * 16).model_dump(mode="json")  # type: ignore[arg-type]
    token = sign_jws({**body, **changes}, user.signing, kid=OPS, typ=COMMAND_TYPE)
    client._ask_one(method, Order.model_construct(command=token), Verdict)
