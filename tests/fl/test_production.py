"""The attested path over real TLS: a job from submission to a verified result, and what ends one."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_world import (
    MODEL_KEY,
    SERVER,
    SITES,
    TRAIN,
    FederationWorld,
    found_federation,
    make_job,
    now,
    wait_until,
)
from safetensors.numpy import load_file

from attestation.errors import PeerRefused
from fl.environments.user_client import UserClient
from fl.errors import ApprovalRefused, PeerLost, StatementRefused
from fl.jobs.progress import JobEvent
from fl.jobs.record import JobRecord
from fl.jobs.sealing import open_first_model, seal_first_model
from fl.jobs.statement import SignedStatement, Statement, sign_statement, verify_statement
from policies.charter import Changes
from policies.errors import Refused

STALL = "import time\nfrom fl import client as flare\nflare.init()\nflare.receive()\ntime.sleep(100)\n"
ADA = "acme-pharma/ada"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def statuses(client: UserClient, job: str) -> list[str]:
    return [event.text for event in client.watch(job, timeout=60) if event.kind == "status"]


def wait_for_the_result(events: Iterator[JobEvent]) -> None:
    if any(event.text == "aborted" for event in events):
        raise PeerLost("the connection ended after the job was stopped", where="server")


def lost(client: UserClient, job: str) -> dict[str, str]:
    return {name: state for name, state in client.report(job).sites.items() if state != "in the job"}


def test_a_job_runs_from_submission_to_a_verified_result(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, num_rounds=3)
    world.approve(bundle)
    with (
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=3.0),
        world.client(server) as client,
        model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        events = list(client.watch(job, timeout=60))
        assert client.report(job).status.value == "finished"
        folder = client.download(job, tmp_path / "result", ledgers=None)
        assert [found.job for found in client.reports().jobs] == [job]
        assert client.reports().sites == SITES
    assert load_file(folder / "model.safetensors")["w"].tolist() == [6, 6, 6]
    record = json.loads((folder / "job.json").read_text())
    assert record["status"] == "finished"
    assert record["rounds"][2]["metrics"] == {"m": 2.0}
    assert [event.text for event in events if event.kind == "status"] == ["running", "finished"]
    assert sum(event.kind == "value" for event in events) == 6
    assert [kind for kind, _ in world.ledger].count("result") == 1
    assert [document.get("event") for kind, document in world.ledger if kind == "job"].count("taken") == 2


def test_a_result_opens_only_as_its_server_stated_it(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, num_rounds=1)
    world.approve(bundle)
    with (
        world.site(server, SITES[0]),
        world.site(server, SITES[1]),
        world.client(server) as client,
        model,
    ):
        job = client.submit(bundle, model, roster=SITES, recipients=[ADA])
        assert statuses(client, job)[-1] == "finished"
        client.download(job, tmp_path / "result", ledgers=None)
        proof = json.loads((tmp_path / "result" / "statement.json").read_text())
        with world.client(server, "cygnus-bio/cy") as other, pytest.raises(Refused, match="no right to download"):
            other.download(job, tmp_path / "stolen", ledgers=None)
        with (
            world.client(server, "borealis-hospital/ole") as other,
            pytest.raises(Refused, match="no right to download"),
        ):
            other.download(job, tmp_path / "stolen", ledgers=None)
        assert not (tmp_path / "stolen").exists()

    charter = world.charter()
    from fl.guard.approval import read_record

    record = read_record(proof.pop("record"), charter).record
    signed = SignedStatement.model_validate(proof)
    statement = verify_statement(signed, record, charter, now())

    def refused(changed: SignedStatement, reason: str, about: JobRecord = record) -> None:
        with pytest.raises(StatementRefused, match=reason):
            verify_statement(changed, about, charter, now())

    stranger = world.identity("site", SITES[0])
    refused(sign_statement(statement, stranger.sign_key, stranger.ears), "made by site/borealis-hospital")
    refused(sign_statement(statement, stranger.sign_key, signed.ears), "not the one that the server's EARs name")
    false = world.identity("server", SERVER)
    other_model = statement.model_copy(update={"bundle": "0" * 64, "roster": ("cygnus-bio",)})
    refused(sign_statement(other_model, false.sign_key, false.ears), "its bundle is not the job record's")
    few = statement.model_copy(update={"contributors": ("cygnus-bio",)})
    refused(sign_statement(few, false.sign_key, false.ears), "not enough sites")
    future = statement.model_copy(update={"finished": "2199-01-01T00:00:00Z"})
    refused(sign_statement(future, false.sign_key, false.ears), "EAR ended")
    refused(signed, "its job is not", record.model_copy(update={"job": "another-job"}))
    refused(signed.model_copy(update={"statement": signed.statement[:-6] + "AAAAAA"}), "signature|base64")
    refused(signed.model_copy(update={"sign_key": "AAAA"}), "unreadable")
    assert isinstance(statement, Statement)


def test_a_first_model_is_sealed_for_one_job() -> None:
    sealed = seal_first_model(b"weights", MODEL_KEY, "job-1", random=lambda size: b"\1" * size)
    with open_first_model(sealed, MODEL_KEY, "job-1", max_bytes=100) as opened:
        assert opened.view == b"weights"
        assert opened.digest == hashlib.sha256(b"weights").hexdigest()
    for key, job in ((MODEL_KEY, "job-2"), (bytes(32), "job-1")):
        with pytest.raises(Refused):
            open_first_model(sealed, key, job, max_bytes=100)
    for position in range(0, len(sealed), 7):
        changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        with pytest.raises(Refused):
            open_first_model(changed, MODEL_KEY, "job-1", max_bytes=100)


def test_old_results_make_room_for_new_ones(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.jobs.KEPT_RESULTS", 1)
    bundle, model = make_job(tmp_path, num_rounds=1)
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        first = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert statuses(client, first)[-1] == "finished"
        second = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert statuses(client, second)[-1] == "finished"
        client.download(second, tmp_path / "result", ledgers=None)
        with pytest.raises(Refused, match="not kept any more"):
            client.download(first, tmp_path / "old", ledgers=None)


def test_tracking_comes_back_with_the_result(world: FederationWorld, server: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    bundle, model = make_job(tmp_path, num_rounds=1, name="tracked", tracking=True)
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert statuses(client, job)[-1] == "finished"
        folder = client.download(job, tmp_path / "result", ledgers=None)
    assert list((folder / "events").glob("events.out.tfevents.*"))


def test_a_failing_script_is_told_without_its_output(world: FederationWorld, server: str, tmp_path: Path) -> None:
    script = TRAIN.replace("flare.init()", "flare.init()\nprint('patient 7')\nraise ValueError('patient 8')", 1)
    bundle, model = make_job(tmp_path, script, name="failing")
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert statuses(client, job) == ["running", "failed"]
        report = client.report(job)
    line = 1 + script[: script.index("raise ValueError")].count("\n")
    told = rf"the training script of [a-z-]+ ended with status 1: ValueError at client\.py, line {line}\b"
    assert re.search(told, " ".join(report.reasons)), report
    assert "patient" not in report.model_dump_json()
    assert not any("patient" in line for line in world.told)


def test_a_user_who_may_stops_a_job(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, STALL, name="stalling")
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert wait_until(lambda: client.report(job).round == 0)
        with world.client(server, "cygnus-bio/cy") as other, pytest.raises(Refused, match="neither submitted the job"):
            other.abort(job)
        began = time.monotonic()
        with world.client(server, "borealis-hospital/ole") as operator:
            operator.abort(job)
        assert statuses(client, job) == ["running", "aborted"]
        told = f"job {job}: the training script of"
        assert wait_until(lambda: sum(line.startswith(told) for line in world.told) == 2), "a script was not ended"
        assert time.monotonic() - began < 5
        assert client.report(job).reasons == (f"job {job} was stopped by borealis-hospital/ole",)
        with pytest.raises(Refused, match="has no result"):
            client.download(job, tmp_path / "result", ledgers=None)


def test_a_site_that_dies_is_named_and_the_others_go_on(world: FederationWorld, server: str, tmp_path: Path) -> None:
    slow = TRAIN.replace("while flare.is_running():", "import time\nwhile flare.is_running():\n    time.sleep(0.5)", 1)
    bundle, model = make_job(tmp_path, slow, name="dying", min_clients=1, num_rounds=4)
    world.approve(bundle)
    with world.site(server, SITES[0], number=1.0), world.client(server) as client, model:
        with world.site(server, SITES[1], number=3.0):
            job = client.submit(bundle, model, roster=None, recipients=[ADA])
            assert wait_until(lambda: (client.report(job).round or 0) >= 1)
        assert statuses(client, job)[-1] == "finished"
        assert "cygnus-bio" in lost(client, job)
        folder = client.download(job, tmp_path / "result", ledgers=None)
    rounds = json.loads((folder / "job.json").read_text())["rounds"]
    assert list(rounds[-1]["updates"]) == [SITES[0]]


def test_with_too_few_sites_left_the_job_fails_at_once(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, STALL, name="short")
    world.approve(bundle)
    with world.site(server, SITES[0]), world.client(server) as client, model:
        with world.site(server, SITES[1]):
            job = client.submit(bundle, model, roster=None, recipients=[ADA])
            assert wait_until(lambda: client.report(job).round == 0)
            began = time.monotonic()
        assert statuses(client, job)[-1] == "failed"
        assert time.monotonic() - began < 10
        assert any(reason.startswith("cygnus-bio: ") for reason in client.report(job).reasons)


def test_a_revoked_bundle_stops_at_the_next_round(world: FederationWorld, server: str, tmp_path: Path) -> None:
    slow = TRAIN.replace("while flare.is_running():", "import time\nwhile flare.is_running():\n    time.sleep(0.4)", 1)
    bundle, model = make_job(tmp_path, slow, name="revoked", num_rounds=100)
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        assert wait_until(lambda: (client.report(job).round or 0) >= 1)
        world.change(Changes(remove=frozenset({f"code/{bundle.digest}.json"})))
        assert statuses(client, job)[-1] == "failed"
        assert any("is not approved" in reason for reason in client.report(job).reasons)


def test_a_server_that_stops_is_told_to_everyone_in_time(world: FederationWorld, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, STALL, name="orphaned")
    world.approve(bundle)
    with world.server() as address:
        site = world.site(address, SITES[0], patience=1.0)
        other = world.site(address, SITES[1], patience=1.0)
        with site as running, other, world.client(address) as client, model:
            job = client.submit(bundle, model, roster=None, recipients=[ADA])
            assert wait_until(lambda: client.report(job).round == 0)
            watching = client.watch(job, timeout=60)
            next(watching)
            world.stop_server(address)
            began = time.monotonic()
            with pytest.raises(PeerLost, match="connection ended"):
                wait_for_the_result(watching)
            assert wait_until(lambda: running.error is not None, 12)
            assert time.monotonic() - began < 12
            assert "has not been reachable for 1 s" in str(running.error)


def test_nobody_is_there(world: FederationWorld) -> None:
    with pytest.raises(PeerLost, match="cannot be reached"), world.client("127.0.0.1:1"):
        raise AssertionError
    with world.site("127.0.0.1:1", SITES[0], patience=0.5) as running:
        assert running.error is not None
        assert "the server hub at 127.0.0.1:1 has not been reachable" in str(running.error)


@pytest.mark.parametrize("played", ["site", "other-name", "measurement", "lapsed", "broker"])
def test_a_false_server_gets_nothing_from_anyone(world: FederationWorld, played: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    identity = {
        "site": lambda: world.identity("site", SITES[0]),
        "other-name": lambda: world.identity("server", "elsewhere"),
        "measurement": lambda: world.identity("server", SERVER, measurement="33" * 48),
        "lapsed": lambda: world.identity("server", SERVER, age=400),
        "broker": lambda: world.identity("server", SERVER, broker_key=Ed25519PrivateKey.generate()),
    }[played]()
    with world.server(identity) as address:
        with pytest.raises(PeerRefused), world.client(address):
            raise AssertionError
        with world.site(address, SITES[0]) as running:
            assert isinstance(running.error, PeerRefused)
    assert not any("is connected" in line and "attested server" in line for line in world.told[-5:])


def test_approval_is_asked_before_anything_is_sent(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, model = make_job(tmp_path, TRAIN + "# never approved\n")
    with world.client(server) as client, model, pytest.raises(ApprovalRefused, match="is not approved in the charter"):
        client.submit(bundle, model, roster=None, recipients=[ADA])


def test_a_renewed_ear_keeps_the_connection_and_a_lapsed_one_ends_it(
    world: FederationWorld, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("fl.server.attendance", "fl.site.link"):
        monkeypatch.setattr(f"{module}.CHECK_SECONDS", 0.2)
    current = [world.identity("site", SITES[0], seconds=2)]
    with world.site(server, SITES[0], identity=lambda: current[0]) as running:
        for _ in range(3):
            time.sleep(1)
            current[0] = world.renewed(current[0], seconds=2)
        assert running.error is None
        with world.client(server) as client:
            assert client.reports().sites == (SITES[0],)
            assert wait_until(lambda: running.error is not None, 8), "it was not cut although its EAR has ended"
            assert client.reports().sites == ()
    assert "the EAR ended" in str(running.error)
