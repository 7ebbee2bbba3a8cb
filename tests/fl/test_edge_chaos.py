"""Devices, gateways and the server as in use; all but the server are killed at random, and the job ends as it would."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from edge_world import FAST, JOB, MEASUREMENT, AddingTrainer, EdgeWorld, found_edge
from federation_world import SERVER, now, wait_until

from fl.edge.gateway_start import serve_gateway
from fl.edge.kits.python import DeviceSettings, GatewayConnection
from fl.edge.settings import DeviceManagerConfig, EdgeSettings, ModelManagerConfig
from fl.edge.task import DeviceTask
from fl.jobs.bundle import Bundle, make_bundle
from fl.jobs.settings import JobSettings
from fl.party import Party
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory
from fl.transport.route import Route
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment

GATES = ("gate-1", "gate-2")


def bundle_of(versions: int, updates: int) -> Bundle:
    edge = EdgeSettings(
        models=ModelManagerConfig(
            num_updates_for_model=updates,
            max_model_version=versions,
            global_lr=1.0,
            max_num_active_model_versions=2,
            update_timeout=0.2,
        ),
        devices=DeviceManagerConfig(device_selection_size=8),
        task_seconds=2.0,
    )
    settings = JobSettings.model_validate(
        {
            "name": JOB,
            "recipe": "fedbuff",
            "options": {"recipe": "fedbuff", "edge": edge.model_dump(), "config": {"batch_size": 4, "lr": 0.5}},
            "num_rounds": versions - 1,
            "min_clients": 1,
            "train_script": "training.pte",
            "framework": "pytorch",
            "params_type": "DIFF",
            "model": {"w": {"dtype": "F32", "shape": (3,)}},
        }
    )
    return make_bundle(Path("/nonexistent-folder"), settings, {"training.pte": b"graph"})


def found_chaos(folder: Path) -> EdgeWorld:
    """The consortium of `edge_world` with a place for each gateway."""
    made = found_edge(folder)
    places = [
        Enrolment(
            role="gateway",
            name=name,
            member="acme-pharma",
            image="gateway-image",
            init_data_sha256=sha256(f"gateway/{name}".encode()).hexdigest(),
        )
        for name in GATES
    ]
    made.federation.change(Changes(put=files_of(places)))
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_chaos(tmp_path_factory.mktemp("chaos"))


@dataclass
class RunningGateway:
    """A gateway as its guest runs it, in a thread."""

    world: EdgeWorld
    name: str
    parent: str
    stop: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    address: str = ""
    error: Exception | None = None
    workers: int = 1

    def start(self) -> RunningGateway:
        identity = self.world.federation.identity("gateway", self.name, seconds=600, measurement=MEASUREMENT)
        federation = self.world.federation
        party = Party(lambda: identity, federation.charter, now, federation.record, federation.told.append)

        def listening(address: str) -> None:
            self.address = address
            self.ready.set()

        def run() -> None:
            try:
                serve_gateway(
                    party,
                    listen="127.0.0.1:0",
                    parent=Route((self.parent,)),
                    parent_name=SERVER,
                    group_key=lambda: self.world.group_value,
                    store=lambda: (federation.charter(), federation.store),
                    stop=self.stop,
                    ready=listening,
                    pace=FAST,
                    workers=self.workers,
                )
            except Exception as error:
                self.error = error
                self.ready.set()

        self.thread = threading.Thread(target=run, name=self.name)
        self.thread.start()
        assert self.ready.wait(15)
        assert self.error is None, self.error
        return self

    def kill(self) -> None:
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.error is None, self.error


@contextmanager
def job_under_way(world: EdgeWorld, bundle: Bundle) -> Iterator[tuple[str, Any, str]]:
    """The server with the job submitted: its address, the user's client, the job."""
    options: Any = bundle.settings.options
    assert DeviceTask(JOB, "executorch", b"graph", options.config).digest == world.task.digest, "which is approved"
    world.federation.approve(bundle, GATES)
    first = SealedMemory.of(encode({"w": (bundle.settings.schema_of_model["w"], bytes(12))}))
    with world.federation.server() as address, world.federation.client(address) as client:
        with first:
            job = client.submit(bundle, first, roster=GATES, recipients=("acme-pharma/ada",))
        yield address, client, job


def result_of(client: Any, job: str, folder: Path) -> np.ndarray:
    report = client.report(job)
    assert report.status == "finished", report.reasons
    made = client.download(job, folder, ledgers=None)
    return parse((made / "model.safetensors").read_bytes(), max_size=1 << 20).array("w")


def test_devices_train_a_job_of_the_server_through_a_gateway(world: EdgeWorld, tmp_path: Path) -> None:
    """Nothing is in the tests' hands but the devices' steps: submit, approve, tree, gateway, device, result."""
    with job_under_way(world, bundle_of(versions=3, updates=3)) as (address, client, job):
        gateway = RunningGateway(world, "gate-1", address, workers=2).start()
        connection = GatewayConnection(f"https://{gateway.address}", timeout=10.0)
        try:
            devices = [
                world.device(connection, tmp_path / str(number), settings=DeviceSettings(jobs=(JOB,), wait_seconds=1.0))
                for number in range(3)
            ]

            def lived() -> bool:
                for device in devices:
                    device.step()
                return bool(client.report(job).status.over)

            assert wait_until(lived, 40), (world.federation.told[-5:], world.events[-5:])
            assert wait_until(
                lambda: all(device.step() >= 0 and device.standing.state != "joined" for device in devices)
            )
        finally:
            connection.close()
            gateway.kill()
        np.testing.assert_allclose(result_of(client, job, tmp_path / "result"), 1.0, rtol=1e-6)


def workers_of_this_process() -> list[int]:
    """The ids of gateways' worker processes below this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if parent == os.getpid() and b"gateway_worker" in command:
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.long
def test_a_gateway_of_two_processes_outlives_one_of_them(world: EdgeWorld, tmp_path: Path) -> None:
    """Both serve devices on one port; one is killed with its connections and what it held, and is started again."""
    told = world.federation.told
    with job_under_way(world, bundle_of(versions=3, updates=4)) as (address, client, job):
        gateway = RunningGateway(world, "gate-1", address, workers=2).start()
        url = f"https://{gateway.address}"
        connections = [GatewayConnection(url, timeout=10.0) for _ in range(4)]  # two for each worker
        try:
            workers = workers_of_this_process()
            assert len(workers) == 2
            devices = [
                world.device(one, tmp_path / str(number), settings=DeviceSettings(jobs=(JOB,), wait_seconds=0.5))
                for number, one in enumerate(connections)
            ]
            for device in devices:
                assert wait_until(lambda device=device: device.step() >= 0 and device.standing.state == "reporting", 20)
            os.kill(workers[0], signal.SIGKILL)
            assert wait_until(lambda: any("a worker of the gateway has ended" in line for line in told), 20)
            world.rotate()

            def lived() -> bool:
                for device in devices:
                    device.step()
                return bool(client.report(job).status.over)

            assert wait_until(lived, 60), (told[-5:], world.events[-5:])
            assert len(now_there := workers_of_this_process()) == 2
            assert workers[1] in now_there
        finally:
            for one in connections:
                one.close()
            gateway.kill()
        assert not workers_of_this_process(), "the processes end with their gateway"
        np.testing.assert_allclose(result_of(client, job, tmp_path / "result"), 1.0, rtol=1e-6)


def test_a_gateway_hears_that_its_key_was_rotated(
    world: EdgeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It asks again and again; while the brokers do not release it, the keys that it has stay good."""
    monkeypatch.setattr("fl.edge.gateway_start.ROTATION_SECONDS", 0.05)
    told = world.federation.told
    with job_under_way(world, bundle_of(versions=2, updates=3)) as (address, _, _):
        gateway = RunningGateway(world, "gate-1", address).start()
        connection = GatewayConnection(f"https://{gateway.address}", timeout=10.0)
        try:
            device = world.device(connection, tmp_path, settings=DeviceSettings(jobs=(JOB,), wait_seconds=1.0))
            assert wait_until(lambda: device.step() >= 0 and device.standing.state == "joined", 20)
            world.group_value, good = b"not a key", world.group_value
            assert wait_until(lambda: any("the group key was not renewed" in line for line in told))
            assert wait_until(lambda: device.step() >= 0 and device.standing.state == "training", 20)
            world.group_value = good
            world.rotate()
            assert wait_until(lambda: any("the group key was rotated" in line for line in told))
            assert wait_until(lambda: device.step() >= 0 and device.standing.state == "joined", 20)
        finally:
            connection.close()
            gateway.kill()


@pytest.mark.long
def test_a_job_of_devices_goes_on_from_its_last_version_when_its_server_is_killed(tmp_path: Path) -> None:
    """SIGKILL after the third of five versions: the next server makes the fourth and the fifth, and no other."""
    script = Path(__file__).with_name("kill_edge_server.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"]
    assert found["status"] == "finished"
    assert found["told"] == [0, 1, 2, 3]
    assert found["rounds"] in ([2, 3], [3])  # what the next server began; the fourth version may be there already
    np.testing.assert_allclose(found["model"], [2.0] * 3, rtol=1e-6)


@pytest.mark.long
def test_a_job_goes_on_whatever_gateways_and_devices_die(world: EdgeWorld, tmp_path: Path) -> None:
    """Twelve devices and two gateways behind one name; every moment one of them is killed and comes again."""
    chance = random.Random(7)
    with job_under_way(world, bundle_of(versions=6, updates=4)) as (address, client, job):
        gateways = [RunningGateway(world, name, address).start() for name in GATES]
        over = threading.Event()
        lives = [0] * 12

        def live(number: int) -> None:
            key, own = ec.generate_private_key(ec.SECP256R1()), random.Random(number)
            token, trainer = world.token(key), AddingTrainer()
            while not over.is_set():
                lives[number] += 1
                connection = GatewayConnection(f"https://{own.choice(gateways).address}", timeout=5.0)
                device = world.device(
                    connection,
                    tmp_path / str(number),
                    key=key,
                    token=token,
                    trainer=trainer,
                    settings=DeviceSettings(jobs=(JOB,), wait_seconds=0.5, encoding="f32"),
                )
                for _ in range(own.randrange(1, 12)):  # then it is killed wherever it is
                    over.wait(min(device.step(), 0.2))
                    if over.is_set() or device.standing.state == "over":
                        break
                connection.close()

        threads = [threading.Thread(target=live, args=(number,)) for number in range(len(lives))]
        for thread in threads:
            thread.start()
        killed, next_kill = 0, time.monotonic() + 1.0
        try:

            def is_over() -> bool:
                nonlocal killed, next_kill
                if time.monotonic() >= next_kill:
                    next_kill = time.monotonic() + chance.uniform(1.0, 5.0)
                    number = chance.randrange(2)
                    gateways[number].kill()
                    gateways[number] = RunningGateway(world, GATES[number], address).start()
                    killed += 1
                return bool(client.report(job).status.over)

            assert wait_until(is_over, 150), (client.report(job), world.federation.told[-5:], world.events[-5:])
        finally:
            over.set()
            for thread in threads:
                thread.join(30)
            for gateway in gateways:
                gateway.kill()
        assert killed >= 1
        assert sum(lives) > 2 * len(lives)
        np.testing.assert_allclose(result_of(client, job, tmp_path / "result"), 2.5, rtol=1e-6)
