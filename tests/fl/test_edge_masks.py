"""Devices whose results are summed under masks, through a real gateway over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_world import JOB, AddingTrainer, EdgeWorld, found_edge
from federation_world import now

from fl.edge.kits.python import DeviceSettings, GatewayConnection
from fl.edge.kits.python.device import Device
from fl.edge.masks import DeviceMasking
from fl.edge.messages import ResultAnswer, ResultRequest, read_words
from fl.edge.sealing import open_answer, seal_request
from fl.edge.task import DeviceTask
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.devices import TaskApproval

MASKING = DeviceMasking(cohort=4, threshold=3, limit=4.0, seconds=1.5, clip_norm=10.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    made = found_edge(tmp_path_factory.mktemp("masks"))
    config = {"batch_size": 4, "lr": 0.5, **MASKING.config()}
    made.task = DeviceTask(JOB, "executorch", b"graph", config)
    approval = TaskApproval(task=made.task.digest, job=JOB, expires=now() + timedelta(days=1))
    made.federation.change(Changes(put=files_of([approval])))
    return made


@pytest.fixture
def gateway(world: EdgeWorld) -> Iterator[tuple[str, Any, Any]]:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        yield url, call, branch


class Eager(AddingTrainer):
    """Adds what it was made with."""

    def __init__(self, add: float) -> None:
        super().__init__()
        self.add = add

    def train(self, *arguments: Any) -> Any:
        return {name: array + np.float32(self.add) for name, array in arguments[2].items()}


def devices_of(world: EdgeWorld, url: str, folder: Path, count: int, **settings: Any) -> list[Device]:
    return [
        world.device(
            GatewayConnection(url, timeout=10.0),
            folder / str(number),
            trainer=Eager(0.25 * (1 + number)),
            settings=DeviceSettings(jobs=(JOB,), capabilities={"os": "linux"}, wait_seconds=0.0, **settings),
        )
        for number in range(count)
    ]


def go(devices: list[Device], call: Any, branch: Any, until: Any, seconds: float = 30.0) -> None:
    import time

    ends = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < ends, [(one.standing.state, one._cohort and one._cohort.step) for one in devices]
        for device in devices:
            device.step()
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        time.sleep(0.02)


def reported(world: EdgeWorld) -> int:
    return sum(name == "reported" for name, _ in world.events)


def test_the_gateway_has_the_sum_and_nothing_else(world: EdgeWorld, gateway: Any, tmp_path: Path) -> None:
    url, call, branch = gateway
    world.events.clear()
    devices = devices_of(world, url, tmp_path, 4)
    go(devices, call, branch, lambda: reported(world) == 4)
    partial = call(lambda _: branch.take())
    assert partial.count == 4
    total = partial.versions[1]
    assert total.weight == 4 * 8.0
    for name, array in total.sums.items():
        np.testing.assert_allclose(array, 8.0 * 0.25 * (1 + 2 + 3 + 4), atol=1e-5, err_msg=name)
    for device in devices:
        device.step()
        assert device.standing.state == "joined", "none trains the same version twice"
        device._connection.close()


def test_devices_that_vanish_and_one_that_is_restarted(world: EdgeWorld, gateway: Any, tmp_path: Path) -> None:
    """The first leaves before it masks, the second after; the sum is of those whose results came."""
    url, call, branch = gateway
    world.events.clear()
    devices = devices_of(world, url, tmp_path, 4)
    go(devices, call, branch, lambda: all(one._cohort and one._cohort.step == "shares" for one in devices))
    gone = devices.pop(0)
    gone._connection.close()
    again = world.device(GatewayConnection(url, timeout=10.0), tmp_path / "0", settings=DeviceSettings(jobs=(JOB,)))
    assert again.standing.state == "joined", "its keys went with the process"
    again._connection.close()
    go(devices, call, branch, lambda: reported(world) == 3)
    total = call(lambda _: branch.take()).versions[1]
    assert total.count == 3
    np.testing.assert_allclose(total.sums["a.bias"], 8.0 * 0.25 * (2 + 3 + 4), atol=1e-5)
    for device in devices:
        device._connection.close()


def test_too_few_give_nothing_and_may_try_again(world: EdgeWorld, gateway: Any, tmp_path: Path) -> None:
    url, call, branch = gateway
    world.events.clear()
    devices = devices_of(world, url, tmp_path, 2)

    def dropped() -> bool:
        return sum(name == "dropped" for name, _ in world.events) >= 2

    go(devices, call, branch, dropped)
    assert call(lambda _: branch.take()) is None
    assert any("fewer than the threshold" in details["message"] for name, details in world.events if name == "dropped")
    devices += devices_of(world, url, tmp_path / "more", 2)
    go(devices, call, branch, lambda: reported(world) == 4)
    assert call(lambda _: branch.take()).count == 4
    for device in devices:
        device._connection.close()


def test_plain_results_of_a_masked_job_are_refused(world: EdgeWorld, gateway: Any, tmp_path: Path) -> None:
    """A device that lacks masks is told that there is no job; one that sends its result as it is, is not counted."""
    url, _, _ = gateway
    (device,) = devices_of(world, url, tmp_path, 1)
    while device.standing.state != "masking":
        device.step()
    task, proof = device.standing.task, device._gateway()
    assert task is not None
    words = ResultRequest(
        token=device._token,
        request="ab" * 16,
        answer_key="cd" * 32,
        job="job-1",
        version=task.version,
        task=task.digest,
        weight=8.0,
        encoding="f32",
        compressed=False,
        cookie=task.cookie,
    )
    charter = world.federation.charter().id
    raw = device._memory.result() or b""
    sealed = seal_request("result", words.to_bytes(), raw, key=device._key, group_key=proof.group_key, charter=charter)
    body = device._connection.send("result", sealed)
    answer = read_words(ResultAnswer, open_answer(body, bytes.fromhex("cd" * 32), "ab" * 16), where="result")
    assert answer.status == "INVALID_REQUEST"
    assert "masked" in answer.message
    device._connection.close()
