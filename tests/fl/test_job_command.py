"""`seal job` against real processes: a broker, a server and two sites, each guest attested on its own chip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from appliance.cli import main
from appliance.demo.founding import (
    admit,
    deliver,
    deposit_keys,
    found_consortium,
    seal_site_data,
    split_model_key,
)
from appliance.demo.guests import start_broker, start_guest, wait_for_event
from appliance.demo.setting import BROKERS, GUESTS, SERVER, SITES, Setting, new_setting
from appliance.processes import Processes

CLIENT = """
import numpy as np
from fl import client as flare

flare.init()
add = np.float32(float(flare.data_path("train.safetensors").read_bytes()))
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + add}, metrics={"added": float(add)}))
"""
JOB = """
import numpy as np
from fl import FedAvgRecipe, SimEnv

model = {"w": np.zeros(3, dtype=np.float32)}
recipe = FedAvgRecipe(name="plus", initial_model=model, min_clients=2, num_rounds=2, train_script="client.py")
recipe.execute(SimEnv(num_clients=2))
"""


class Seal:
    """Calls the command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: object, status: int = 0) -> str:
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = self._capfd.readouterr()
        assert stop.value.code == status, err
        return out

    def json(self, *words: object, status: int = 0) -> Any:
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def seal(capfd: pytest.CaptureFixture[str]) -> Seal:
    return Seal(capfd)


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plus")
    (folder / "client.py").write_text(CLIENT)
    (folder / "job.py").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, job_folder: Path) -> Iterator[Setting]:
    """A running consortium in which the job's bundle is approved."""
    from fl.jobs.bundle import parse_bundle

    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.raises(SystemExit):
        main(["job", "bundle", str(job_folder / "job.py"), "--out", str(scratch / "bundle")])
    bundle = parse_bundle((scratch / "bundle" / "job.bundle").read_bytes())
    (scratch / "consortium").mkdir()
    made = new_setting(scratch / "consortium")
    found_consortium(made)
    admit(made, {bundle.digest: ("plus", 1 << 40)})
    deliver(made)
    seal_site_data(made, dict(zip(SITES, (b"1.0", b"3.0"), strict=True)))
    processes = Processes(made.folder / "logs")
    try:
        for broker in BROKERS:
            start_broker(processes, made, broker)
        for broker in BROKERS:
            wait_for_event(processes.log_of(broker), "ready")
        deposit_keys(made)
        split_model_key(made)
        for guest in GUESTS:
            start_guest(processes, made, guest)
        for guest in GUESTS:
            wait_for_event(processes.log_of(guest), "serving" if guest == SERVER else "joined")
        yield made
    finally:
        processes.stop_all()


def test_a_job_from_bundle_to_download(setting: Setting, job_folder: Path, tmp_path: Path, seal: Seal) -> None:
    kit = ("--kit", setting.kit)
    made = seal.json("job", "bundle", job_folder / "job.py", "--out", tmp_path / "bundle")
    shown = seal.json("job", "show", tmp_path / "bundle" / "job.bundle")
    assert made == shown
    assert [file["path"] for file in shown["files"]] == ["client.py", "job.py", "requirements.lock"]
    assert "flare.init()" in seal("job", "show", tmp_path / "bundle" / "job.bundle", "--file", "client.py")

    bundle, model = tmp_path / "bundle" / "job.bundle", tmp_path / "bundle" / "model.safetensors"
    job = seal.json("job", "submit", bundle, "--model", model, *kit)["job"]
    watched = seal("job", "watch", job, *kit)
    assert "borealis-site has joined" in watched
    assert "round 2 is done: added 2" in watched
    assert seal.json("job", "logs", job, *kit, "--tail", "2")["lines"][-1] == "the job is finished"
    assert seal("job", "logs", job, *kit, "--grep", "round 2 is done").startswith("round 2 is done: added 2")
    assert seal("job", "logs", job, *kit, "--grep", "round .* is") == ""  # a text, and no pattern
    listed = seal.json("job", "list", *kit)
    assert (job, "finished") in [(row["job"], row["status"]) for row in listed["jobs"]]
    assert listed["sites"] == sorted(SITES)
    assert job in seal("job", "list", *kit)
    assert seal.json("job", "status", job, *kit)["status"] == "finished"

    done = seal.json("job", "download", job, *kit, "--out", tmp_path / "result")
    assert done["files"] == ["job.json", "model.safetensors", "receipt.json", "statement.json"]
    assert load_file(tmp_path / "result" / "model.safetensors")["w"].tolist() == [4, 4, 4]
    seal("job", "download", job, *kit, "--out", tmp_path / "result", status=2)
    seal("job", "abort", job, *kit)
    assert seal.json("job", "status", job, *kit)["status"] == "finished"
    refused = seal.json("job", "clone", job, *kit, status=1)
    why = "this server has no vault and keeps no first models: submit the job itself again"
    assert why in refused["error"]["what"]
    assert seal.json("job", "delete", job, *kit) == {"job": job, "deleted": True}
    assert "there is no job" in seal.json("job", "status", job, *kit, status=1)["error"]["what"]


def test_sites_are_looked_after(setting: Setting, seal: Seal) -> None:
    kit, site = ("--kit", setting.kit), min(SITES)
    listed = seal.json("site", "list", *kit)
    assert listed["server"] == SERVER
    assert [one["name"] for one in listed["sites"] if one["connected"]] == sorted(SITES)
    assert all(one["connected"] < one["lease_until"] and one["jobs"] == {} for one in listed["sites"])
    shown = seal("site", "list", *kit)
    assert all(name in shown for name in SITES)
    assert f"server {SERVER} of acme-pharma: serving since" in shown
    assert seal("site", "status", site, *kit).startswith(f"{site} of ")
    assert seal.json("site", "status", SERVER, *kit)["keeps_jobs"] is False
    assert "no site 'nowhere'" in seal.json("site", "status", "nowhere", *kit, status=2)["error"]["what"]
    for verb in ("restart", "stop"):
        for name, status in ((site, 1), ("$(id)", 2), ("../" * 9 + "etc/passwd", 2), ("-x", 2), ("a\nb", 2)):
            error = json.loads(seal("site", verb, *kit, "--json", "--", name, status=status))["error"]
            assert set(error) >= {"what", "where", "do"}
    assert [one["name"] for one in seal.json("site", "list", *kit)["sites"] if one["connected"]] == sorted(SITES)


def test_what_is_not_approved_or_not_there_is_told_with_its_status(
    setting: Setting, job_folder: Path, tmp_path: Path, seal: Seal
) -> None:
    kit = ("--kit", setting.kit)
    changed = tmp_path / "changed"
    shutil.copytree(job_folder, changed, ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "client.py").open("a") as file:
        file.write("# one line more\n")
    seal("job", "bundle", changed / "job.py", "--out", tmp_path / "bundle")
    bundle, model = tmp_path / "bundle" / "job.bundle", tmp_path / "bundle" / "model.safetensors"
    refused = seal.json("job", "submit", bundle, "--model", model, *kit, status=1)
    assert "is not approved in the charter" in refused["error"]["reasons"][0]
    missing = seal.json("job", "status", "no-such-job", *kit, status=1)
    assert "there is no job no-such-job" in missing["error"]["what"]
    unusable: list[tuple[object, ...]] = [
        ("job", "show", tmp_path / "none"),
        ("job", "show", tmp_path),
        ("job", "show", job_folder / "job.py"),
        ("job", "show", bundle, "--file", "other.py"),
        ("job", "bundle", tmp_path / "none.py", "--out", tmp_path / "x"),
        ("job", "bundle", changed / "client.py", "--out", tmp_path / "x"),
        ("job", "submit", bundle, "--model", tmp_path / "none", *kit),
        ("job", "submit", bundle, "--model", bundle, *kit),
        ("job", "list", "--kit", tmp_path / "none"),
    ]
    for words in unusable:
        error = seal.json(*words, status=1 if words[1] == "submit" and words[4] == bundle else 2)
        assert set(error["error"]) >= {"what", "where", "do"}


def test_a_changed_receipt_or_statement_is_refused(setting: Setting) -> None:
    from attestation.client import ledger_keys
    from attestation.errors import LedgerRefused
    from fl.environments.prod import ProdEnv
    from fl.environments.user_client import check_logged
    from fl.jobs.bundle import parse_bundle
    from fl.jobs.statement import SignedStatement
    from fl.transport.frames import Result
    from fl.transport.memory import SealedMemory

    env = ProdEnv(setting.kit)
    bundle = parse_bundle((setting.folder.parent / "bundle" / "job.bundle").read_bytes())
    with SealedMemory.of((setting.folder.parent / "bundle" / "model.safetensors").read_bytes()) as model:
        run = env.submit(bundle, model)
    assert run.watch(lambda _: None) == "finished"
    job = run.get_job_id()
    with env.connected() as (client, current):
        ledgers = ledger_keys(current.charter)
        folder = client.download(job, setting.folder / "checked", ledgers=ledgers)
    proof = json.loads((folder / "statement.json").read_text())
    receipt = (folder / "receipt.json").read_text()
    statement = SignedStatement.model_validate({key: proof[key] for key in ("statement", "sign_key", "ears")})

    def head(changed: str) -> Result:
        return Result(record=proof["record"], statement=statement, sealed_key="", size=1, receipt=changed)

    check_logged(head(receipt), ledgers)
    other = head(receipt).model_copy(update={"statement": statement.model_copy(update={"statement": "x"})})
    broken: list[Callable[[], Result]] = [
        lambda: head(""),
        lambda: head("{}"),
        lambda: head("[" * 1000),
        lambda: head(receipt.replace('"index":', '"index":1')),
        lambda: other,
    ]
    for make in broken:
        with pytest.raises(LedgerRefused):
            check_logged(make(), ledgers)
    with pytest.raises(LedgerRefused):
        check_logged(head(receipt), {"virtual.other/broker/one/ledger": next(iter(ledgers.values()))})


def test_prod_env_takes_a_kit_its_user_s_name_and_a_bound_for_the_broker(setting: Setting, tmp_path: Path) -> None:
    from fl.environments.prod import ProdEnv
    from fl.errors import KitUnusable, PeerLost
    from fl.jobs.bundle import parse_bundle
    from fl.transport.memory import SealedMemory

    for name in (None, "scientist", "acme-pharma/scientist"):
        assert ProdEnv(startup_kit_location=str(setting.kit), username=name).kit.user == "acme-pharma/scientist"
    with pytest.raises(KitUnusable, match="not of somebody-else"):
        ProdEnv(setting.kit, username="somebody-else")
    with pytest.raises(KitUnusable, match="no such folder"):
        ProdEnv(tmp_path / "nowhere")

    env = ProdEnv(setting.kit, login_timeout=20.0, workspace_root=tmp_path / "runs", sites=list(SITES))
    bundle = parse_bundle((setting.folder.parent / "bundle" / "job.bundle").read_bytes())
    with SealedMemory.of((setting.folder.parent / "bundle" / "model.safetensors").read_bytes()) as model:
        run = env.submit(bundle, model)
    with pytest.raises(PeerLost):
        run.get_result(timeout=0.001)  # the wait is bounded, and the job goes on
    result = run.get_result(timeout=60)
    assert result == tmp_path / "runs" / run.get_job_id()
    assert run.get_status() == "finished"
    assert [row["mean"] for row in run.metrics()] == [{"added": 2.0}, {"added": 2.0}]
    assert run.logs(tail=1) == ["the job is finished"]
    assert env.run(run.get_job_id()).get_status() == "finished"
    run.abort()  # it is over: nothing happens
    assert run.get_status() == "finished"
