"""A gateway's credential and group key come from real brokers, to an attested guest alone; devices check k EARs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import uvloop
from edge_world import FAST
from federation_world import now, wait_until

from appliance.node import SERVICES
from appliance.node import Lease as NodeLease
from attestation.client import GuestSession
from attestation.connection import BrokerClient
from attestation.errors import BrokerRefused
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip, create_chip
from attestation.virtual.vendor import Vendor, create_vendor
from benchmarks.trials import load_trial
from fl.edge.gateway import Gateway
from fl.edge.gateway_service import GatewayService
from fl.edge.kits.python import GatewayConnection, Trust
from fl.edge.sealing import GroupKeys, new_group_key
from fl.party import Party
from fl.server.certificates import ServerCertificates, TlsContexts
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment, ImageReference, ReferenceMeasurement
from policies.errors import Refused, SealwrightError, Unusable
from policies.init_data import BrokerAddress, InitData, ServerAddress, write_init_data
from policies.ready_made import release_policy

NAMES = ("one", "two")
GROUP = "acme-pharma/key/gateways"
MEASUREMENT = bytes([7]) * 48


@dataclass
class Trial:
    world: Any
    value: bytes


@pytest.fixture(scope="module")
def trial(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> Iterator[Trial]:
    """Two brokers, both of which have to vouch; a gateway's image and place; the group key, deposited."""
    tools = load_trial("attestation/broker/conftest.py", "broker_trial")
    folder = tmp_path_factory.mktemp("gateway")
    world = tools.found_world(folder, virtual_vendor, virtual_chips, NAMES, broker_threshold=2)
    raw = write_init_data(
        InitData(
            version=1,
            algorithm="sha256",
            charter=world.charter().id,
            role="gateway",
            name="gate",
            brokers=tuple(BrokerAddress(name=entry.name, url=entry.url) for entry in world.entries),
            listen="127.0.0.1:0",
            server=ServerAddress(name="hub", address="127.0.0.1:1"),
            resources={"group": GROUP},
        )
    )
    world.init_data["gateway/gate"] = raw
    reference = ReferenceMeasurement(
        measurement=MEASUREMENT.hex(), vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1
    )
    image = ImageReference(
        name="gateway-image",
        platform="virtual",
        manifest_sha256="0" * 64,
        svn=1,
        measurements=(reference,),
        roles=("gateway",),
    )
    place = Enrolment(
        role="gateway",
        name="gate",
        member="acme-pharma",
        image="gateway-image",
        init_data_sha256=sha256(raw).hexdigest(),
    )
    rules = {"members/acme-pharma/release/key.gateways.rego": release_policy(roles=["gateway"])}
    world.change(Changes(put={**files_of([image, place]), **rules}))
    brokers: list[Any] = []
    value = new_group_key()
    try:
        for entry in world.entries:
            brokers.append(tools.start_broker(world.folder / entry.name, entry))
            client = BrokerClient(entry, "virtual.trial")
            client.deposit(GROUP, value, world.member_keys["acme-pharma"], charter_id=world.charter().id)
            client.close()
        yield Trial(world, value)
    finally:
        for broker in brokers:
            broker.stop()


@pytest.mark.long
def test_a_gateway_has_its_place_and_its_key_from_k_brokers_and_shows_both_to_devices(trial: Trial) -> None:
    session = trial.world.guest("gateway", "gate", measurement=MEASUREMENT)
    lease = NodeLease(session, threading.Event())
    party = Party(lease.identity, lease.charter, lease.now, lambda kind, document: "", lambda line: None)
    value = lease.release(GROUP)
    assert value == trial.value
    keys = GroupKeys.parse(value, lease.charter().id)
    gateway = Gateway(lambda: keys, lease.charter, lease.identity, lease.now, dict, FAST)

    async def asked() -> Any:
        tls = TlsContexts(ServerCertificates(party), strangers=True).switching()
        service = GatewayService(gateway, lease.charter_store, tls)
        await service.start("127.0.0.1:0")
        connection = GatewayConnection(f"https://{service.address}", timeout=10.0)
        trust = Trust(trial.world.root, production=False)
        try:
            files = await asyncio.to_thread(connection.charter, None)
            assert files is not None
            trust.follow(files, now())
            assert await asyncio.to_thread(connection.charter, trust.version) is None
            raw = await asyncio.to_thread(connection.proof, "0" * 32)
            proof = trust.appraise(raw, "0" * 32, now())
            said = json.loads(raw)
            said["ears"] = said["ears"][:1]
            with pytest.raises(Refused, match="1 of the 2 EARs that are needed"):
                trust.appraise(json.dumps(said).encode(), "0" * 32, now())
            return proof
        finally:
            connection.close()
            await service.stop()

    try:
        proof = uvloop.run(asked())
        assert (proof.name, proof.group_key) == ("gate", keys.public)
    finally:
        session.close()


@pytest.mark.long
def test_the_role_gateway_of_an_image_serves_devices(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    """As the node starts it: init-data, lease, the keys that brokers released; its parent is not there yet."""
    session, stop = trial.world.guest("gateway", "gate", measurement=MEASUREMENT), threading.Event()
    lease = NodeLease(session, stop)
    nothing: Any = None
    arguments = (session.init, nothing, lease, {"group": lease.release(GROUP)}, stop)
    thread = threading.Thread(target=SERVICES["gateway"], args=arguments)
    thread.start()
    said: list[dict[str, Any]] = []
    try:

        def serving() -> bool:
            said.extend(json.loads(line) for line in capsys.readouterr().out.splitlines())
            return any(one["event"] == "serving" for one in said)

        assert wait_until(serving, 20), said
        address = next(one["address"] for one in said if one["event"] == "serving")
        connection = GatewayConnection(f"https://{address}", timeout=10.0)
        trust = Trust(trial.world.root, production=False)
        files = connection.charter(None)
        assert files is not None
        trust.follow(files, now())
        assert trust.appraise(connection.proof("1" * 32), "1" * 32, now()).name == "gate"
        connection.close()
    finally:
        stop.set()
        thread.join(20)
        session.close()
    assert not thread.is_alive()
    with pytest.raises(Unusable, match="for the purpose `group`"):
        SERVICES["gateway"](session.init, nothing, lease, {}, stop)


def test_a_bare_host_gets_neither_credential_nor_key(trial: Trial, tmp_path: Path) -> None:
    """It runs the gateway's program, has the gateway's init-data, and vouches for itself: by a processor of its own
    making that says what the gateway's would say, or by the gateway's own chip, which says what was launched there."""
    vendor = create_vendor(tmp_path / "vendor", (Product.MILAN,))
    made = create_chip(vendor, tmp_path / "chip")
    context = trial.world.context("gateway", "gate", measurement=MEASUREMENT)
    own = type(trial.world.attester("gateway", "gate"))(made, vendor, context)
    unknown, other = (trial.world.attester("gateway", "gate", measurement=bytes([n]) * 48) for n in (9, 1))
    for attester, said in ((own, "root"), (unknown, "measurement"), (other, "it runs site-image")):
        session = GuestSession(attester, trial.world.init_data["gateway/gate"], timeout=10.0)
        try:
            with pytest.raises(BrokerRefused) as refused:
                session.attest()
            assert any(said in reason for reason in refused.value.reasons), refused.value.reasons
            with pytest.raises((SealwrightError, RuntimeError)):
                session.release(GROUP)
        finally:
            session.close()


@pytest.mark.long
def test_the_group_key_is_for_gateways_alone(trial: Trial) -> None:
    session = trial.world.guest("site", "north")
    try:
        session.attest()
        with pytest.raises(BrokerRefused, match="the role that may have it"):
            session.release(GROUP)
    finally:
        session.close()
