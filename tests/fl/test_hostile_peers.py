"""Hostile peers over real TLS: each is refused and named, and the job goes on without it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import xxhash
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation_world import (
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
from raw_site import RawSite, raw_site, status_of
from safetensors.numpy import load_file

from attestation.identity import Identity
from fl.environments.user_client import UserClient
from fl.errors import CallFailed, PeerLost
from fl.jobs.bundle import Bundle
from fl.jobs.record import JobRecord, sign_record
from fl.jobs.results import rfc3339
from fl.jobs.sealing import seal_first_model
from fl.model import tensors_of
from fl.server.federation import Task
from fl.server.job import RemoteSite
from fl.tensors import encode
from fl.transport.channel import connect
from fl.transport.frames import (
    MAX_FRAME,
    Chunk,
    Deliver,
    Fetch,
    Lease,
    Logged,
    Order,
    Prepare,
    Ready,
    Submit,
    Train,
    pack,
)
from fl.transport.memory import SealedMemory
from policies.errors import Refused, SealwrightError

ADA = "acme-pharma/ada"
GOOD = encode(tensors_of({"w": np.full(3, 9, dtype=np.float32)}))
HOSTILE = SITES[1]


@pytest.fixture(scope="module", params=["grpc", "https"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FederationWorld:
    """Everything is played over both drivers."""
    world = found_federation(tmp_path_factory.mktemp("world"))
    world.way = {"driver": request.param}
    return world


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, world.server() as address:
        patch.setattr("fl.guard.command_log.BURST", 10_000)  # one user of many tests, which follow fast on each other
        yield address


@pytest.fixture(scope="module")
def job(world: FederationWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, SealedMemory]:
    bundle, model = make_job(tmp_path_factory.mktemp("job"), num_rounds=1, min_clients=1)
    world.approve(bundle)
    return bundle, model


# --- who may say what -------------------------------------------------------------------------------------------------


def refusal(site: RawSite, identity: Identity) -> str:
    site.attend(pack(Lease(ears=identity.ears)))
    with pytest.raises(CallFailed) as caught:
        site.hear(Lease)
    status, details = status_of(caught.value)
    assert status == (
        "FAILED_PRECONDITION" if "was not renewed" in details or "ended at" in details else "PERMISSION_DENIED"
    )
    return " | ".join(json.loads(details)["reasons"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda world: world.identity("server", "hub"), "has the role server, not site"),
        (lambda world: world.identity("site", "stranger"), "is not enrolled"),
        (lambda world: world.identity("site", HOSTILE, age=400), "the EAR ended"),
        (lambda world: world.identity("site", HOSTILE, measurement="33" * 48), "no approved image's"),
        (lambda world: world.identity("site", HOSTILE, host_data="44" * 32), "other init-data"),
        (lambda world: world.identity("site", HOSTILE, member="acme-pharma"), "cygnus-bio's place"),
        (lambda world: world.identity("site", HOSTILE, broker_key=Ed25519PrivateKey.generate()), "not broker one's"),
    ],
)
def test_a_site_that_does_not_hold_its_place_is_refused(
    world: FederationWorld, server: str, make: Callable[[FederationWorld], Identity], reason: str
) -> None:
    identity = make(world)
    with raw_site(world, server, identity, attend=False) as site:
        assert reason in refusal(site, identity)


def test_an_ear_about_another_key_is_refused(world: FederationWorld, server: str) -> None:
    mine, other = world.identity("site", HOSTILE), world.identity("site", HOSTILE)
    with raw_site(world, server, mine, attend=False) as site:
        assert "another TLS key" in refusal(site, other)


def test_without_a_certificate_of_the_charter_there_is_no_connection(world: FederationWorld, server: str) -> None:
    stranger: UserKeys = make_user("acme-pharma", "mallory", "submit")
    known = dict(world.users)
    try:
        world.users = {**known, "acme-pharma/mallory": stranger}
        with pytest.raises(PeerLost), world.client(server, "acme-pharma/mallory"):
            raise AssertionError
    finally:
        world.users = known


def test_a_user_is_no_site_and_a_site_no_user(world: FederationWorld, server: str) -> None:
    identity = world.identity("site", HOSTILE)
    with raw_site(world, server, identity) as site:
        submission = pack(Submit(record="x", bundle_size=1, model_size=1))
        for call in (
            site.connection.ask("Jobs", Order(command="x"), timeout=10),
            site.connection.call("Submit", [submission], timeout=10),
        ):
            with pytest.raises(CallFailed) as caught:
                next(iter(call))
            assert "no user of charter" in status_of(caught.value)[1]
    kit = world.kit(ADA, server)
    with connect(
        world.to(server),
        server="hub",
        tls_key=kit.tls_key,
        certificate_pem=kit.tls_certificate,
        charter=world.charter,
        clock=now,
    ) as connection:
        site = RawSite(connection)
        assert "issued by no broker" in refusal(site, identity)
        site.close()


# --- words that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"", "INVALID_ARGUMENT"),
        (b"\xff" * 40, "INVALID_ARGUMENT"),
        (b"\0\0\0\2{}", "INVALID_ARGUMENT"),
        (b"\0\0\0\2[]", "INVALID_ARGUMENT"),
        (pack(Lease(ears=("not a token",))), "PERMISSION_DENIED"),
        (pack(Lease(ears=("a" * 1000,)), b"payload"), "INVALID_ARGUMENT"),
        (b"\0" * (MAX_FRAME + 1), "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_malformed_opening_is_refused(world: FederationWorld, server: str, first: bytes, status: str) -> None:
    with raw_site(world, server, world.identity("site", HOSTILE), attend=False) as site:
        site.attend(first)
        with pytest.raises(CallFailed) as caught:
            site.hear(Lease)
        # HTTPS reads such a record's length alone, and then knows no more than that the caller broke off.
        assert status_of(caught.value)[0] in {status, status.replace("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")}


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense",
        pack(Ready(job="no-such-job")),
        pack(Logged(job="no-such-job", key="k", value=1.0, step=0)),
        b"\0\0\0\x60" + b'{"kind":"logged","job":"x","key":"k","value":NaN,"step":0}'.ljust(96),
        pack(Lease(ears=("x",))),
    ],
)
def test_a_malformed_word_ends_the_attendance_and_names_the_site(
    world: FederationWorld, server: str, said: bytes
) -> None:
    world.told.clear()
    with raw_site(world, server, world.identity("site", HOSTILE)) as site:
        site.say(said)
        with pytest.raises((CallFailed, StopIteration)):
            site.hear(Train)
    assert wait_until(lambda: any(f"site {HOSTILE} is gone" in line for line in world.told))


def test_what_is_fetched_is_the_callers_own_jobs(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory]
) -> None:
    with (
        raw_site(world, server, world.identity("site", HOSTILE)) as site,
        world.client(server) as client,
        world.site(server, SITES[0]),
    ):
        mine = client.submit(*job, roster=[SITES[0]], recipients=[ADA])
        for what in ("bundle", "model"):
            request = Fetch(job=mine, what=what, sha256=job[0].digest, offset=0)
            with pytest.raises(CallFailed) as caught:
                next(iter(site.connection.ask("Fetch", request, timeout=10)))
            assert f"no job {mine} for {HOSTILE}" in status_of(caught.value)[1]
        assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"


# --- updates ----------------------------------------------------------------------------------------------------------


def chunk(offset: int, data: bytes, xxh3: int | None = None) -> bytes:
    return pack(Chunk(offset=offset, xxh3=xxhash.xxh3_64_intdigest(data) if xxh3 is None else xxh3), data)


def tensors(**params: Any) -> bytes:
    return encode(tensors_of(params))


W = np.full(3, 9, dtype=np.float32)
ACTS: dict[str, tuple[Callable[[RawSite, Train], Any], str]] = {
    "no tensors": (lambda s, t: s.deliver(t, b"\xff" * 50), "header says"),
    "NaN": (lambda s, t: s.deliver(t, tensors(w=W * np.float32("nan"))), "holds a NaN"),
    "shape": (lambda s, t: s.deliver(t, tensors(w=W[:2])), r"F32 \[2\], not the model's"),
    "unknown": (lambda s, t: s.deliver(t, tensors(w=W, x=W[:1])), "'x' is not in the model"),
    "missing": (lambda s, t: s.deliver(t, tensors(x=W)), "'w' is missing"),
    "too large": (lambda s, t: s.deliver(t, GOOD, size=1 << 39), "more than the"),
    "short": (lambda s, t: s.deliver(t, GOOD, [chunk(0, GOOD[:5])]), "a chunk of 5 bytes"),
    "cut": (lambda s, t: s.deliver(t, GOOD, []), "ended after 0"),
    "long chunk": (lambda s, t: s.deliver(t, GOOD, [chunk(0, GOOD + b"x")]), "a chunk of"),
    "out of place": (lambda s, t: s.deliver(t, GOOD, [chunk(7, GOOD)]), "came at 0"),
    "damaged": (lambda s, t: s.deliver(t, GOOD, [chunk(0, GOOD, xxh3=1)]), "is damaged"),
    "garbage": (lambda s, t: s.deliver(t, GOOD, [b"garbage"]), "frame"),
    "kind": (lambda s, t: s.deliver(t, GOOD, params_type="DIFF"), "parameters are DIFF"),
    "weight": (lambda s, t: s.deliver(t, GOOD, weight=-1.0), "weight -1.0"),
    "heavy": (lambda s, t: s.deliver(t, GOOD, weight=1e30), "weight 1e"),
    "metrics": (lambda s, t: s.deliver(t, GOOD, metrics={"\n": 1.0}), "metric's name"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_bad_update_is_refused_named_and_never_folded(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], tmp_path: Path, act: str
) -> None:
    play, reason = ACTS[act]
    with (
        world.site(server, SITES[0], number=2.0),
        raw_site(world, server, world.identity("site", HOSTILE)) as site,
        world.client(server) as client,
    ):
        mine = client.submit(*job, roster=None, recipients=[ADA])
        verdict = play(site, site.join())
        assert not verdict.accepted
        assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"
        state = client.report(mine).sites[HOSTILE]
        folder = client.download(mine, tmp_path / "result", ledgers=None)
    assert re.search(reason, verdict.reasons[0]), verdict
    assert re.search(reason, state), state
    assert load_file(folder / "model.safetensors")["w"].tolist() == [2, 2, 2]


def test_an_update_counts_once_whatever_is_resent(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], tmp_path: Path
) -> None:
    with (
        raw_site(world, server, world.identity("site", SITES[0])) as first,
        raw_site(world, server, world.identity("site", HOSTILE)) as second,
        world.client(server) as client,
    ):
        mine = client.submit(*job, roster=None, recipients=[ADA])
        for site in (first, second):
            site.say(Ready(job=site.hear(Prepare).job))
        task, other = second.hear(Train), first.hear(Train)
        assert second.deliver(task, GOOD).accepted
        again = second.deliver(task, tensors(w=W * 100))
        assert not again.accepted
        assert "an update counts once" in again.reasons[0]
        wrong = first.deliver(other, GOOD, round=5)
        assert not wrong.accepted
        assert "it is of round 5" in wrong.reasons[0]
        assert first.deliver(other, tensors(w=W / 3)).accepted
        assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"
        folder = client.download(mine, tmp_path / "result", ledgers=None)
    assert load_file(folder / "model.safetensors")["w"].tolist() == [6, 6, 6]


def test_a_job_that_its_site_was_not_asked_to_join_takes_no_update(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory]
) -> None:
    with raw_site(world, server, world.identity("site", HOSTILE)) as site:
        task = Train(job="another", round=0, total_rounds=1, model_sha256="0" * 64, model_size=1)
        with pytest.raises(CallFailed) as caught:
            site.deliver(task, GOOD)
        assert "there is no job another" in status_of(caught.value)[1]
    with raw_site(world, server, world.identity("site", HOSTILE), attend=False) as site:
        with pytest.raises(CallFailed) as caught:
            site.deliver(task, GOOD)
        assert "does not attend" in status_of(caught.value)[1]


def test_a_site_that_stops_sending_in_the_middle_is_cut_off(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.calls.STALL_SECONDS", 0.4)
    monkeypatch.setattr("fl.server.service.CUT_SECONDS", 0.4)
    with (
        world.site(server, SITES[0], number=2.0),
        raw_site(world, server, world.identity("site", HOSTILE)) as site,
        world.client(server) as client,
    ):
        mine = client.submit(*job, roster=None, recipients=[ADA])
        task, stalled = site.join(), SimpleQueue[bytes | None]()
        stalled.put(pack(Deliver(job=task.job, round=0, params_type="FULL", weight=1.0, metrics={}, size=len(GOOD))))
        call = site.connection.call("Deliver", iter(stalled.get, None), timeout=30)
        frames = iter(call)
        next(frames)  # the server pulls, and nothing comes
        assert [event.text for event in client.watch(mine, timeout=20)][-1] == "finished"
        assert "its delivery failed" in client.report(mine).sites[HOSTILE]
        stalled.put(None)


def test_idle_calls_are_few_and_short(world: FederationWorld, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.server.calls.STALL_SECONDS", 0.4)
    monkeypatch.setattr("fl.server.service.MAX_CALLS_EACH", 4)
    with raw_site(world, server, world.identity("site", HOSTILE)) as site:
        silent: SimpleQueue[bytes | None] = SimpleQueue()
        idle = [iter(site.connection.call("Deliver", iter(silent.get, None), timeout=30)) for _ in range(3)]
        assert wait_until(lambda: _refused(site, "calls under way already"))
        for call in idle:
            with pytest.raises(CallFailed):
                next(call)
            silent.put(None)
        assert wait_until(lambda: _refused(site, "no job another"))


def _refused(site: RawSite, reason: str) -> bool:
    request = Fetch(job="another", what="model", sha256="0" * 64, offset=0)
    with pytest.raises(CallFailed) as caught:
        next(iter(site.connection.ask("Fetch", request, timeout=10)))
    return reason in status_of(caught.value)[1]


def test_a_site_that_floods_the_log_is_cut_off(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.service.MAX_LOGGED_A_ROUND", 50)
    with (
        world.site(server, SITES[0], number=2.0),
        raw_site(world, server, world.identity("site", HOSTILE)) as site,
        world.client(server) as client,
    ):
        mine = client.submit(*job, roster=None, recipients=[ADA])
        task = site.join()
        for number in range(60):
            site.say(Logged(job=task.job, key="k\x1b[2J", value=1.0, step=number))
        events = list(client.watch(mine, timeout=20))
        assert "more than 50 values" in client.report(mine).sites[HOSTILE]
    assert sum(event.kind == "value" and event.site == HOSTILE for event in events) == 50
    assert not any("\x1b" in name for event in events for name in event.values)


# --- submissions ------------------------------------------------------------------------------------------------------


def craft(
    world: FederationWorld, made: Bundle, model: SealedMemory, *, user: str = ADA, key: Any = None, **changes: Any
) -> tuple[JobRecord, str, bytes]:
    """A record of ada's with `changes`, signed by `user` (or by `key`), and the sealed model."""
    settings = made.settings
    fields: dict[str, Any] = {
        "charter": world.charter().id,
        "job": f"crafted-{sha256((repr(changes) + user + made.digest).encode()).hexdigest()[:12]}",
        "name": settings.name,
        "bundle": made.digest,
        "server": "hub",
        "roster": SITES,
        "recipients": (ADA,),
        "rounds": settings.num_rounds,
        "min_sites": settings.min_clients,
        "model_sha256": model.digest,
        "model_size": model.size,
        "created": rfc3339(now()),
        "submitter": user,
    }
    record = JobRecord(**{**fields, **changes})
    token = sign_record(record, key or world.users[user].signing)
    model_key = world.kit(ADA, "127.0.0.1:1").model_key
    assert model_key is not None
    return record, token, seal_first_model(bytes(model.view), model_key, record.job, random=lambda size: b"r" * size)


def submit(client: UserClient, token: str, bundle: bytes, sealed: bytes) -> None:
    client._send(Submit(record=token, bundle_size=len(bundle), model_size=len(sealed)), [bundle, sealed])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"charter": "0" * 64}, "another charter"),
        ({"created": "2020-01-01T00:00:00Z"}, "not within the last 24 hours"),
        ({"created": "2199-01-01T00:00:00Z"}, "not within the last 24 hours"),
        ({"server": "other"}, "is for the server other"),
        ({"roster": ("borealis-hospital", "stranger")}, "stranger, which is not enrolled"),
        ({"roster": ("stranger",)}, "not approved for stranger"),
        ({"recipients": ("cygnus-bio/cy",)}, "cygnus-bio/cy may not download"),
        ({"recipients": ("cygnus-bio/nobody",)}, "may not download"),
        ({"rounds": 7}, "not the bundle's"),
        ({"name": "renamed"}, "not the bundle's"),
        ({"bundle": "0" * 64}, "the bundle's digest is"),
        ({"user": "borealis-hospital/ole"}, "acme-pharma/ada brings a record of borealis-hospital/ole"),
        ({"key": Ed25519PrivateKey.generate()}, "the signature does not verify"),
        ({"submitter": "borealis-hospital/ole", "key": "ada"}, "signature|signed it"),
    ],
)
def test_a_record_that_does_not_hold_starts_nothing(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], changes: dict[str, Any], reason: str
) -> None:
    if changes.get("key") == "ada":
        changes = {**changes, "key": world.users[ADA].signing}
    record, token, sealed = craft(world, *job, **changes)
    with world.client(server) as client:
        with pytest.raises(Refused) as refused:
            submit(client, token, job[0].raw, sealed)
        assert record.job not in [found.job for found in client.reports().jobs]
    assert re.search(reason, " | ".join(refused.value.reasons)), refused.value.reasons


def test_a_record_runs_once_and_for_its_own_submitter(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory]
) -> None:
    _, token, sealed = craft(world, *job, job="once-only")
    with world.client(server) as client:
        submit(client, token, job[0].raw, sealed)
        with pytest.raises(Refused, match="was submitted before"):
            submit(client, token, job[0].raw, sealed)
        client.abort("once-only")
    with world.client(server, "borealis-hospital/ole") as other, pytest.raises(Refused, match="no right to submit"):
        submit(other, token, job[0].raw, sealed)


def test_a_bundle_with_one_byte_changed_is_refused(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory]
) -> None:
    _, token, sealed = craft(world, *job, job="flipped")
    raw = job[0].raw
    with world.client(server) as client:
        for position in (3, 20, len(raw) // 2, len(raw) - 1):
            changed = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
            with pytest.raises(SealwrightError):
                submit(client, token, changed, sealed)
        assert "flipped" not in [found.job for found in client.reports().jobs]


def test_another_first_model_than_the_records_fails_the_job(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory]
) -> None:
    bundle, model = job
    _, token, _ = craft(world, bundle, model, job="swapped")
    other = SealedMemory.of(GOOD)
    _, _, sealed = craft(world, bundle, other, job="swapped")
    with other, world.client(server) as client:
        submit(client, token, bundle.raw, sealed)
        assert [event.text for event in client.watch("swapped", timeout=30)][-1] == "failed"
        assert "not the one that the record names" in client.report("swapped").reasons[0]


# --- a server that was broken into ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"roster": SITES[:1]}, "is not approved in charter"),
        ({"approved_for": ("cygnus-bio",)}, "not approved for borealis-hospital"),
        ({"approved_days": -1}, "approval expired"),
        ({"approved_job": "another"}, "approved for the job another"),
        ({"approved_bits": None, "approved_for": SITES}, "does not bound what its jobs may let out"),
        ({"roster": ("cygnus-bio",), "approved_for": SITES}, None),
        ({"charter": "0" * 64, "approved_for": SITES}, "another charter"),
        ({"rounds": 9, "approved_for": SITES}, "not the bundle's"),
    ],
)
def test_a_site_approves_for_itself_whatever_the_server_says(
    world: FederationWorld,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str | None,
) -> None:
    monkeypatch.setattr("fl.server.user_calls.approve", lambda *_, **__: None)
    monkeypatch.setattr("fl.server.job.approve", lambda *_, **__: None)
    monkeypatch.setattr("fl.server.job.JOIN_SECONDS", 1.0)
    script = f"# {changes}\n" + Path(__file__).read_text()[:200]
    bundle, model = make_job(tmp_path, script, num_rounds=1, min_clients=1)
    changes = dict(changes)
    sites, days = changes.pop("approved_for", None), changes.pop("approved_days", 1)
    name, bits = changes.pop("approved_job", bundle.settings.name), changes.pop("approved_bits", 1 << 50)
    if sites is not None or days != 1 or name != bundle.settings.name:
        world.approve(bundle, sites or SITES, days=days, job=name, bits=bits)
    record, token, sealed = craft(world, bundle, model, **changes)
    world.told.clear()
    with model, world.site(server, SITES[0]), world.client(server) as client:
        submit(client, token, bundle.raw, sealed)
        assert [event.text for event in client.watch(record.job, timeout=30)][-1] == "failed"
        state = client.report(record.job).sites.get(SITES[0], "")
    taken = [entry["job"] for kind, entry in world.ledger if kind == "job" and entry["event"] == "taken"]
    assert record.job not in taken
    assert (reason or "") in state


@pytest.mark.parametrize("shift", [{"round": 0}, {"round": 7}, {"total_rounds": 99}, {"task": "submit_model"}])
def test_a_site_gives_each_approved_round_once(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: dict[str, Any]
) -> None:
    bundle, model = make_job(tmp_path, f"# {shift}\n{TRAIN}", num_rounds=2, min_clients=1)
    world.approve(bundle)
    honest = RemoteSite.give

    def give(site: RemoteSite, task: Task) -> None:
        if task.round == 0 and "total_rounds" not in shift:
            honest(site, task)
            return
        site._job.serve_model(task.model)
        fields = {"job": site._job.id, "round": task.round, "total_rounds": 2, **shift}
        site.attendance.send(Train(**fields, model_sha256=task.model.digest, model_size=task.model.size))

    monkeypatch.setattr(RemoteSite, "give", give)
    with model, world.site(server, SITES[0]), world.client(server) as client:
        mine = client.submit(bundle, model, roster=[SITES[0]], recipients=[ADA])
        assert [event.text for event in client.watch(mine, timeout=30)][-1] == "failed"
        assert "each is approved once" in client.report(mine).sites[SITES[0]]


def test_a_site_s_member_has_no_right_to_the_model_that_its_site_trains(
    world: FederationWorld, server: str, tmp_path: Path
) -> None:
    """Its script has the model in its hands: what it prints and writes stays in the sandbox, what leaves goes to the
    server alone; and its member's users, who may see the job, cannot have the result."""
    secret = np.random.default_rng(8).standard_normal(2000).astype(np.float32)
    script = """
import sys
import numpy as np
from fl import client as flare

flare.init()
while flare.is_running():
    received = flare.receive()
    for place in ("/scratch/stolen", "/tmp/stolen", "/dev/shm/stolen"):
        np.save(place, received.params["w"])
    sys.stdout.write(received.params["w"].tobytes().hex())
    for place in ("/data/stolen", "/bundle/stolen", "/stolen", "/site/stolen"):
        try:
            np.save(place, received.params["w"])
        except OSError:
            continue
        raise SystemExit(9)
    flare.send(flare.FLModel(params=received.params))
"""
    bundle, model = make_job(tmp_path, script, num_rounds=1, initial_model={"w": secret})
    world.approve(bundle)
    world.told.clear()
    before = len(world.ledger)
    sites = [world.site(server, site) for site in SITES]
    with model, sites[0], sites[1], world.client(server) as ada, world.client(server, "cygnus-bio/cy") as cy:
        mine = ada.submit(bundle, model, roster=None, recipients=[ADA])
        assert [event.text for event in ada.watch(mine, timeout=60)][-1] == "finished", ada.report(mine)
        assert cy.report(mine).status.value == "finished"
        with pytest.raises(Refused, match="download"):
            cy.download(mine, tmp_path / "theirs", ledgers=None)
        folder = ada.download(mine, tmp_path / "ours", ledgers=None)
    assert not (tmp_path / "theirs").exists()
    assert np.array_equal(load_file(folder / "model.safetensors")["w"], secret)
    needle = secret.tobytes()[:64]
    told = repr(world.told) + repr(world.ledger[before:])
    assert needle.hex() not in told
    for path in (*tmp_path.glob("code/*"), *Path("/dev/shm").glob("**/stolen*"), *Path("/tmp").glob("stolen*")):  # noqa: S108
        assert not path.is_file() or needle not in path.read_bytes(), path


def test_a_site_begins_a_job_once(
    world: FederationWorld, server: str, job: tuple[Bundle, SealedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = RemoteSite.end

    def end(site: RemoteSite, why: str) -> None:
        honest(site, why)
        again = Prepare(job=site._job.id, record=site._job.signed.token, bundle_size=len(site._job.bundle.raw))
        threading.Timer(0.5, lambda: site.attendance.send(again)).start()

    monkeypatch.setattr(RemoteSite, "end", end)
    with world.site(server, SITES[0]), world.client(server) as client:
        mine = client.submit(*job, roster=[SITES[0]], recipients=[ADA])
        assert [event.text for event in client.watch(mine, timeout=30)][-1] == "finished"
        assert wait_until(lambda: f"job {mine} is not taken: it was taken here before" in world.told)
    began = [
        entry for kind, entry in world.ledger if kind == "job" and (entry["event"], entry["job"]) == ("taken", mine)
    ]
    assert len(began) == 1
