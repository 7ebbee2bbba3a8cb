"""A consortium with a gateway, an issuer of devices' tokens and an approved task, for tests of devices.

The gateway's EARs are made here with the broker's keys (`federation_world`); all else is the real thing.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation_world import FederationWorld, found_federation, now

from attestation.identity import Identity
from fl.edge.branch import TreeBranch
from fl.edge.contract import EdgeJob, ModelVersion, UpdateBounds
from fl.edge.gateway import Gateway, Pace
from fl.edge.gateway_service import GatewayService
from fl.edge.kits.python import Device, DeviceSettings, Trust
from fl.edge.kits.python.data import ArrayDataset, Arrays, Dataset
from fl.edge.masks import capabilities_of
from fl.edge.sealing import GroupKeys, new_group_key
from fl.edge.task import DeviceTask
from fl.edge.tokens import issue_token
from fl.tensors import TensorSpec, encode, parse
from fl.transport.tls import server_context
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.devices import DeviceIssuer, TaskApproval
from policies.documents import Enrolment, ImageReference, ReferenceMeasurement
from policies.keys import public_pem

MEASUREMENT = "77" * 48
JOB = "heart-rate"
SHAPES: Mapping[str, tuple[int, ...]] = {"a.weight": (3, 4), "a.bias": (3,)}
FAST = Pace(no_job=0.05, task=0.05, again=0.05)


def model_of(value: float, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> bytes:
    """A model whose numbers are all `value`."""
    arrays = {name: np.full(shape, value, dtype="<f4") for name, shape in shapes.items()}
    return encode({name: (TensorSpec("F32", array.shape), array.tobytes()) for name, array in arrays.items()})


def version_of(number: int, task: DeviceTask, model: bytes | None = None) -> ModelVersion:
    raw = model_of(float(number)) if model is None else model
    return ModelVersion(number, sha256(raw).hexdigest(), raw, task.digest)


class AddingTrainer:
    """Adds 0.5 to every number, in three steps. It shows what devices do around training, not training."""

    def __init__(self) -> None:
        self.trained = 0
        self.before_step: Callable[[], None] = lambda: None

    def train(
        self,
        graph: bytes,
        config: Mapping[str, Any],
        model: Arrays,
        dataset: Dataset,
        rng: np.random.Generator,
        go_on: Callable[[], None],
    ) -> Arrays:
        assert graph == b"graph"
        for _ in range(3):
            self.before_step()
            go_on()
        self.trained += 1
        return {name: array + np.float32(0.5) for name, array in model.items()}


class Source:
    """Eight examples."""

    def dataset(self, job: str, config: Mapping[str, Any]) -> Dataset:
        assert job == JOB
        return ArrayDataset(np.zeros((8, 4), np.float32), np.zeros(8, np.int64))


@dataclass
class EdgeWorld:
    """The consortium of `federation_world`, with what devices need."""

    federation: FederationWorld
    issuer: DeviceIssuer
    issuer_key: Ed25519PrivateKey
    task: DeviceTask
    group_value: bytes
    moment: Callable[[], datetime] = now
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def root(self) -> bytes:
        return self.federation.store["metadata/1.root.json"]

    def keys(self) -> GroupKeys:
        return GroupKeys.parse(self.group_value, self.federation.charter().id)

    def rotate(self, *, forget: bool = False) -> None:
        self.group_value = new_group_key(b"" if forget else self.group_value)

    def identity(self, **claims: Any) -> Identity:
        return self.federation.identity("gateway", "gate", **{"seconds": 600, "measurement": MEASUREMENT, **claims})

    def branch(
        self, *, permits: int = 1 << 20, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **bounds: Any
    ) -> TreeBranch:
        job = EdgeJob(
            "job-1",
            JOB,
            "fedbuff",
            {"epoch": 1},
            {"os": "linux", **capabilities_of(self.task.config)},
            UpdateBounds(**bounds),
        )
        schema = parse(model_of(0.0, shapes), max_size=1 << 30).schema
        branch = TreeBranch(job, schema, secrets.token_hex(16), time.monotonic)
        branch.grant(permits)
        branch.advance([version_of(1, self.task, model_of(1.0, shapes))], {self.task.digest: self.task})
        return branch

    def gateway(self, *branches: Any, identity: Identity | None = None) -> Gateway:
        own = identity or self.identity()
        keys, value = self.keys(), self.group_value

        def current() -> GroupKeys:
            nonlocal keys, value
            if value is not self.group_value:
                keys, value = self.keys(), self.group_value
            return keys

        return Gateway(
            current,
            self.federation.charter,
            lambda: own,
            self.moment,
            lambda: {one.job.job: one for one in branches},
            FAST,
        )

    @contextmanager
    def serving(self, gateway: Gateway) -> Iterator[tuple[str, Callable[[Callable[[GatewayService], Any]], Any]]]:
        """A running service: its URL, and what calls it in its own thread."""
        own = gateway.identity()
        tls = server_context(
            own.tls_key_pem, own.certificate_pem, self.federation.issuer.certificate_pem, strangers=True
        )
        service = GatewayService(gateway, lambda: (self.federation.charter(), self.federation.store), tls)
        loop = uvloop.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="gateway")
        thread.start()

        def run(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

        async def called(function: Callable[[GatewayService], Any]) -> Any:
            return function(service)

        try:
            run(service.start("127.0.0.1:0"))
            yield f"https://{service.address}", lambda function: run(called(function))
        finally:
            run(service.stop())
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    def token(self, key: ec.EllipticCurvePrivateKey, name: str | None = None, **changes: Any) -> str:
        arguments = {"issuer": self.issuer, "signing_key": self.issuer_key, "charter": self.federation.charter().id}
        arguments |= {"key": key.public_key(), "device": name or secrets.token_hex(16), "at": self.moment()}
        return issue_token(**{**arguments, **changes})

    def device(self, connection: Any, folder: Path, **changes: Any) -> Device:
        key = changes.pop("key", None) or ec.generate_private_key(ec.SECP256R1())
        arguments: dict[str, Any] = {
            "trust": Trust(self.root, production=False),
            "token": changes.pop("token", None) or self.token(key),
            "key": key,
            "source": Source(),
            "trainer": AddingTrainer(),
            "settings": DeviceSettings(
                jobs=("heart-*",), capabilities={"os": "linux"}, encoding="f32", wait_seconds=0.0
            ),
            "event": lambda name, details: self.events.append((name, dict(details))),
            "clock": self.moment,
            "rng": np.random.default_rng(1),
        }
        return Device(connection, folder=folder, **{**arguments, **changes})


def found_edge(folder: Path) -> EdgeWorld:
    """Found the consortium: a gateway `gate`, an issuer `phones`, the task of the job `heart-rate`."""
    federation = found_federation(folder)
    issuer_key = Ed25519PrivateKey.generate()
    issuer = DeviceIssuer(name="phones", member="borealis-hospital", signing_key=public_pem(issuer_key))
    task = DeviceTask(JOB, "executorch", b"graph", {"batch_size": 4, "lr": 0.5})
    documents = [
        ImageReference(
            name="gateway-image",
            platform="virtual",
            manifest_sha256="0" * 64,
            svn=1,
            measurements=(
                ReferenceMeasurement(
                    measurement=MEASUREMENT, vcpu_model="EPYC-v4", vcpus=1, vmm="qemu", guest_features=1
                ),
            ),
            roles=("gateway",),
        ),
        Enrolment(
            role="gateway",
            name="gate",
            member="acme-pharma",
            image="gateway-image",
            init_data_sha256=sha256(b"gateway/gate").hexdigest(),
        ),
        issuer,
        TaskApproval(task=task.digest, job=JOB, expires=now() + timedelta(days=1)),
    ]
    federation.change(Changes(put=files_of(documents)))
    return EdgeWorld(federation, issuer, issuer_key, task, new_group_key())
