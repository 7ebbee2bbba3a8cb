"""The cores of the Android and iOS kits, which `make kits` builds: what they make, and how they talk with a gateway."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from edge_world import JOB, EdgeWorld, found_edge, version_of

from fl.edge.deltas import DeltaForm, decode_delta
from fl.edge.gateway import Call, Gateway
from fl.edge.kits.vectors.sealed import group_keys, p256
from fl.edge.kits.vectors.tensors import deltas
from fl.edge.messages import ANSWERS, Answer
from fl.edge.protocol import SENDS, STATUSES, Message, State, Status, next_state
from fl.edge.task import DeviceTask
from fl.tensors import TensorSpec
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.devices import TaskApproval
from policies.errors import Refused

PROJECT = Path(__file__).parents[2]
OUT = PROJECT / "build/kits"
KITS = {
    "android": ("java", "-cp", "android/classes:/usr/share/java/bcprov.jar", "org.sealwright.edge.Conversation"),
    "ios": ("ios/debug/EdgeTests", "converse"),
}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=KITS)
def kit(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not (OUT / name / "made.json").exists():
        pytest.skip(f"the {name} kit is not built here: make kits")
    return name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("kits"))


def made(kit: str) -> dict[str, Any]:
    """What the kit's core made of the vectors, for the reference to open."""
    found: dict[str, Any] = json.loads((OUT / kit / "made.json").read_bytes())
    return found


def test_the_reference_opens_what_a_kit_seals(kit: str) -> None:
    sealed = bytes.fromhex(made(kit)["request"])
    wanted = json.loads((Path(__file__).parent / "edge/vectors/sealing.json").read_bytes())["request"]
    opened = group_keys().open("result", sealed)
    assert opened.words.hex() == wanted["words"]
    assert bytes(opened.tensors).hex() == wanted["tensors"]
    assert opened.is_signed_by(p256("device").public_key())
    assert not opened.is_signed_by(p256("another").public_key())
    with pytest.raises(Refused):
        group_keys().open("task", sealed)
    with pytest.raises(Refused):
        group_keys("cd" * 32).open("result", sealed)


def test_the_reference_inflates_what_a_kit_compresses(kit: str) -> None:
    tensors = deltas()
    schema = {one["name"]: TensorSpec("F32", tuple(one["shape"])) for one in tensors["tensors"]}
    for encoding, raw in made(kit)["deltas"].items():
        assert zlib.decompress(bytes.fromhex(raw)).hex() == tensors["encoded"][encoding]
        assert decode_delta(bytes.fromhex(raw), DeltaForm.of(schema, encoding), compressed=True).keys() == schema.keys()


class Phone:
    """A device with a kit's core: its folder, its key and its token."""

    def __init__(self, kit: str, world: EdgeWorld, folder: Path) -> None:
        self._kit, self._world, self._folder = kit, world, folder
        key = ec.generate_private_key(ec.SECP256R1())
        self._own = {
            "root": world.root.decode(),
            "token": world.token(key),
            "key": key.private_numbers().private_value.to_bytes(32, "big").hex(),
        }

    def converse(self, url: str, **changes: Any) -> list[dict[str, Any]]:
        """Let it talk with the gateway at `url`: what it heard."""
        said = {"url": url, "encoding": "F32", "compressed": False, "production": False, "until": "reported"}
        settings = {**self._own, **said, "steps": 20, **changes}
        mounts: list[str] = []
        if self._kit == "ios":  # Foundation on Linux checks certificates as libcurl does, with no delegate to ask
            host = self._world.identity().dns_name
            settings["url"] = url.replace("127.0.0.1", host)
            (self._folder / "hosts").write_text(f"127.0.0.1 {host}\n")
            (self._folder / "issuer.pem").write_text(self._world.federation.issuer.certificate_pem)
            mounts = ["--ro-bind", str(self._folder / "hosts"), "/etc/hosts"]
            mounts += ["--ro-bind", str(self._folder / "issuer.pem"), "/etc/ssl/certs/ca-certificates.crt"]
        (self._folder / "settings.json").write_text(json.dumps(settings))
        inside = f"{self._kit}/{self._folder.name}"
        own = (*KITS[self._kit], f"{inside}/settings.json", inside)
        command = [str(PROJECT / "fl/edge/kits/build.sh"), "run", *mounts, *own]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1), done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def phone(kit: str, world: EdgeWorld) -> Iterator[Phone]:
    with tempfile.TemporaryDirectory(dir=OUT / kit) as folder:
        yield Phone(kit, world, Path(folder))


def names(heard: list[dict[str, Any]]) -> list[str]:
    return [one["event"] for one in heard]


@pytest.mark.parametrize(
    ("encoding", "compressed"), [("F32", False), ("BF16", False), ("INT8", True)], ids=["f32", "bf16", "int8-zlib"]
)
def test_a_kit_trains_a_version_at_a_real_gateway(
    phone: Phone, world: EdgeWorld, encoding: str, compressed: bool
) -> None:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        heard = phone.converse(url, encoding=encoding, compressed=compressed)
        assert names(heard) == ["joined", "task", "trained", "reported"], heard
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        partial = call(lambda _: branch.take())
        assert partial.count == 1
        assert np.allclose(partial.versions[1].sums["a.weight"], 0.5 * 8, rtol=0.01), "weighed by its eight examples"


def test_a_kit_sends_a_large_result_in_pieces(phone: Phone, world: EdgeWorld) -> None:
    branch = world.branch(shapes={"w": (1200, 1000)})
    with world.serving(world.gateway(branch)) as (url, call):
        heard = phone.converse(url)
        assert names(heard)[-1] == "reported", heard
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        assert call(lambda _: branch.take()).count == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measurement": "99" * 48}, "the measurement of gateway/gate is no approved image's"),
        ({"seconds": 60, "age": 100}, "the EAR ended at"),
    ],
    ids=["measurement", "expired"],
)
def test_a_kit_sends_nothing_to_a_gateway_that_is_not_attested(
    phone: Phone, world: EdgeWorld, changes: dict[str, Any], said: str
) -> None:
    with world.serving(world.gateway(world.branch(), identity=world.identity(**changes))) as (url, _):
        heard = phone.converse(url, until="refused")
        assert heard[-1]["event"] == "refused"
        assert any(said in reason for reason in heard[-1]["reasons"]), heard


def test_a_kit_in_production_refuses_the_virtual_platform(phone: Phone, world: EdgeWorld) -> None:
    with world.serving(world.gateway(world.branch())) as (url, _):
        heard = phone.converse(url, until="refused", production=True)
        assert "virtual platform" in heard[-1]["why"]


def test_a_kit_runs_no_task_that_the_charter_does_not_approve(phone: Phone, world: EdgeWorld) -> None:
    other = DeviceTask(JOB, "executorch", b"another graph", {"batch_size": 4, "lr": 0.5})
    branch = world.branch()
    branch.advance([version_of(2, other)], {other.digest: other})
    with world.serving(world.gateway(branch)) as (url, _):
        heard = phone.converse(url, until="refused")
        assert any("approves no device task" in reason for reason in heard[-1]["reasons"]), heard
        assert "trained" not in names(heard)


@pytest.mark.parametrize(("named", "event"), [("double", "reported"), ("none", "refused")])
def test_a_kit_applies_the_filters_that_its_task_names(phone: Phone, world: EdgeWorld, named: str, event: str) -> None:
    task = DeviceTask(JOB, "executorch", b"graph", {"batch_size": 4, "lr": 0.5, "filters_out": [named]})
    approval = TaskApproval(task=task.digest, job=JOB, expires=world.moment() + timedelta(days=1))
    world.federation.change(Changes(put=files_of([approval])))
    branch = world.branch()
    branch.advance([version_of(2, task)], {task.digest: task})
    with world.serving(world.gateway(branch)) as (url, call):
        heard = phone.converse(url, until=event)
        assert names(heard)[-1] == event, heard
        if event == "refused":
            assert heard[-1]["why"] == "this app has no filter none"
            return
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        assert np.allclose(call(lambda _: branch.take()).versions[2].sums["a.weight"], 2 * 0.5 * 8)


def test_a_kit_that_is_killed_after_every_step_goes_on(phone: Phone, world: EdgeWorld) -> None:
    branch = world.branch()
    with world.serving(world.gateway(branch)) as (url, call):
        heard = [name for _ in range(4) for name in names(phone.converse(url, steps=1))]
        assert heard == ["joined", "task", "trained", "reported"]
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        assert call(lambda _: branch.take()).count == 1


def test_a_kit_waits_where_no_gateway_answers(phone: Phone, world: EdgeWorld) -> None:
    with world.serving(world.gateway(world.branch())) as (url, _):
        pass
    heard = phone.converse(url, steps=2, until="joined")
    assert names(heard) == ["waiting", "waiting"]


def test_a_kit_asks_for_the_proof_again_when_the_group_key_is_gone(
    phone: Phone, world: EdgeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = world.gateway(world.branch())
    decide, asked = Gateway.decide, []

    def forgetting(own: Gateway, call: Call) -> Answer:
        asked.append(call.message)
        if len(asked) == 1:
            world.rotate(forget=True)
        return decide(own, call)

    monkeypatch.setattr(Gateway, "decide", forgetting)
    with world.serving(gateway) as (url, _):
        heard = phone.converse(url)
    assert names(heard) == ["joined", "task", "trained", "reported"]
    assert asked == ["job", "task", "selection", "result"]


@pytest.mark.parametrize("seed", range(3))
def test_a_kit_follows_the_table_whatever_a_gateway_answers(
    phone: Phone, world: EdgeWorld, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    branch = world.branch()
    gateway = world.gateway(branch)
    decide, chance = Gateway.decide, random.Random(seed)
    seen: list[tuple[Message, Status]] = []
    versions = itertools.count(2)

    def fickle(own: Gateway, call: Call) -> Answer:
        answer = decide(own, call)
        if answer.status != "OK":  # it has trained this version: there shall be another
            branch.advance([version_of(next(versions), world.task)], {world.task.digest: world.task})
        if len(seen) > 50:
            answer = ANSWERS[call.message](status="DONE")
        elif chance.random() < 0.4:
            status = chance.choice([s for s in STATUSES if s != "OK" and next_state(call.message, s).then != "over"])
            answer = ANSWERS[call.message](status=status)
        seen.append((call.message, answer.status))
        return answer

    monkeypatch.setattr(Gateway, "decide", fickle)
    with world.serving(gateway) as (url, _):
        heard = phone.converse(url, steps=200, until="over")
    assert names(heard)[-1] == "over", heard[-5:]
    state: State = "idle"
    for message, status in seen:
        if state == "training" and message == "result":
            state = "reporting"
        assert SENDS[state] == message, seen
        state = next_state(message, status).then
    assert state == "over"
    assert {"joined", "task", "trained"} <= set(names(heard))
