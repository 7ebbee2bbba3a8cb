"""A small consortium with one broker as a process of its own, behind real TLS, and guests on virtual chips."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from postgres_server import PostgresServer, find_binaries, running_postgres

from attestation.binding import report_data
from attestation.broker.config import create_broker
from attestation.broker.storage import read_database
from attestation.canonical import b64, unb64
from attestation.client import BrokerClient, GuestSession
from attestation.errors import BrokerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product
from attestation.hybrid import HybridPrivateKey
from attestation.ledger.audit import AuditReport, verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.messages import Call, sign_proof
from attestation.virtual.chip import Chip
from attestation.virtual.processor import LaunchContext, report_for
from attestation.virtual.vendor import Vendor
from policies.charter import Charter, load_charter, write_store
from policies.charter.making import Changes, amend, found
from policies.charter.proposal import files_of
from policies.documents import (
    BrokerEntry,
    Consortium,
    Enrolment,
    ImageReference,
    Member,
    ReferenceMeasurement,
    Role,
    VirtualRoot,
)
from policies.init_data import BrokerAddress, InitData, write_init_data
from policies.keys import public_pem

MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")
LEASE = 900
"""Seconds. Leases have tests of their own; the others are not to race a busy machine."""
MEASUREMENTS = {"site-image": bytes([1]) * 48, "server-image": bytes([2]) * 48}
RULES = Path(__file__).parents[3] / "policies/rego"
SITE_KEY, OTHER_KEY, MODEL_KEY, KBS_KEY, TWICE_KEY, FIVE_KEY = (
    "borealis-hospital/key/data",
    "cygnus-bio/key/data",
    "acme-pharma/key/model",
    "borealis-hospital/key/open",
    "borealis-hospital/key/twice",
    "borealis-hospital/key/five",
)
SECRETS = {
    SITE_KEY: b"north's data key",
    OTHER_KEY: b"south's data key",
    MODEL_KEY: b"the model key",
    KBS_KEY: b"opened to the KBS protocol",
    TWICE_KEY: b"twice a boot at most",
    FIVE_KEY: b"five times in all",
}


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class ChipAttester:
    """A guest's secure processor: one launched guest on one chip."""

    chip: Chip
    vendor: Vendor
    context: LaunchContext
    seen: list[SnpEvidence] = field(default_factory=list)

    def evidence(self, report_data: bytes) -> SnpEvidence:
        found = SnpEvidence(report_for(self.chip, self.context, report_data), self.chip.certificate_table(self.vendor))
        self.seen.append(found)
        return found


@dataclass(frozen=True)
class BrokerProcess:
    """A running broker: its folder, its entry, its log."""

    folder: Path
    entry: BrokerEntry
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]]
    reader: threading.Thread

    def wait_for(self, event: str, seconds: float = 15) -> dict[str, Any]:
        """The first log line with this event; fails after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if line.get("event") == event:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the broker did not say {event!r}: {self.lines[-5:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=15)
        self.reader.join(timeout=15)  # it ends with the pipe; closed under its hands, it would fail
        if self.process.stderr:
            self.process.stderr.close()


def start_broker(folder: Path, entry: BrokerEntry, *, wait: bool = True) -> BrokerProcess:
    """Start the broker in `folder`; `wait` until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attestation.broker", str(folder / "broker.toml")],
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    lines: list[dict[str, Any]] = []

    def read() -> None:
        lines.extend(
            json.loads(line) if line.startswith("{") else {"event": "text", "text": line.rstrip()}
            for line in process.stderr or ()
        )

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    running = BrokerProcess(folder, entry, process, lines, reader)
    if wait:
        running.wait_for("ready", 60)  # a machine that runs other tests too may start it slowly
    return running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """The consortium: keys, charter, virtual vendor and chips."""

    folder: Path
    vendor: Vendor
    chips: Mapping[Product, Chip]
    member_keys: Mapping[str, Ed25519PrivateKey]
    entries: tuple[BrokerEntry, ...]
    store: dict[str, bytes] = field(default_factory=dict, repr=False)
    init_data: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> bytes:
        return self.store["metadata/1.root.json"]

    def charter(self, at: datetime | None = None) -> Charter:
        return load_charter(self.store, self.root, at or now())

    def broker_key(self, index: int = 0) -> Ed25519PrivateKey:
        from policies.keys import load_private_key

        return load_private_key(self.folder / self.entries[index].name / "keys/signing.pem")

    def broker_keys(self, needed: int) -> list[Ed25519PrivateKey]:
        """The signing keys of as many brokers as have to sign the charter's timestamp."""
        return [self.broker_key(index) for index in range(needed)]

    def change(self, changes: Changes, *, to: tuple[str, ...] | None = None) -> None:
        """Make the members sign a change, and publish it to every broker, or to those named."""
        stamping = self.broker_keys(self.charter().consortium.broker_threshold)
        self.store = amend(self.store, changes, self.member_keys.values(), stamping, now())
        self.publish(to)

    def publish(self, to: tuple[str, ...] | None = None) -> None:
        for entry in self.entries:
            if to is not None and entry.name not in to:
                continue
            (self.folder / entry.name / "root.json").write_bytes(self.root)
            write_store(self.folder / entry.name / "charter", self.store)

    def context(self, role: str, name: str, **overrides: Any) -> LaunchContext:
        """How the virtual platform launches this guest; `overrides` make it dishonest."""
        image = "server-image" if role == "server" else "site-image"
        honest = {
            "measurement": MEASUREMENTS[image],
            "host_data": sha256(self.init_data[f"{role}/{name}"]).digest(),
            "report_id": os.urandom(32),
        }
        return LaunchContext(**{**honest, **overrides})

    def attester(self, role: str, name: str, *, product: Product = Product.MILAN, **overrides: Any) -> ChipAttester:
        return ChipAttester(self.chips[product], self.vendor, self.context(role, name, **overrides))

    def guest(
        self, role: str = "site", name: str = "north", *, timeout: float = 10.0, **overrides: Any
    ) -> GuestSession:
        return GuestSession(self.attester(role, name, **overrides), self.init_data[f"{role}/{name}"], timeout=timeout)


def release_rules(role: str, name: str, *, kbs: bool = False, per_boot: int | None = None, most: int = 1000) -> bytes:
    """An owner's release policy: the one that comes with the product, for one guest."""
    text = (RULES / "release.rego").read_text()
    text = text.replace('roles := {"site"}', f'roles := {{"{role}"}}').replace(
        "names := set()", f'names := {{"{name}"}}'
    )
    text = text.replace("max_releases := 1000", f"max_releases := {most}")
    text += "\nkbs := true\n" if kbs else ""
    if per_boot is not None:
        text += f'\nreasons contains "not again in this boot" if input.counters.releases_this_boot >= {per_boot}\n'
    return text.encode()


def found_world(
    folder: Path,
    vendor: Vendor,
    chips: Mapping[Product, Chip],
    brokers: tuple[str, ...],
    *,
    broker_threshold: int = 1,
    lease_seconds: int = LEASE,
    more: Mapping[str, bytes] | None = None,
) -> World:
    """Found the consortium's charter with these brokers and `more` files, enrol three guests, publish."""
    at = now()
    keys = {name: Ed25519PrivateKey.generate() for name in MEMBERS}
    entries = []
    for index, name in enumerate(brokers):
        listen = f"127.0.0.1:{free_port()}"
        owner = MEMBERS[index % len(MEMBERS)]
        entries.append(
            create_broker(folder / name, name=name, member=owner, url=f"https://{listen}", listen=listen, at=at)
        )
    world = World(folder, vendor, chips, keys, tuple(entries))
    consortium = Consortium(
        name="trial",
        platform="virtual",
        trust_domain="virtual.trial",
        members=tuple(Member(name=name, public_key=public_pem(key)) for name, key in keys.items()),
        brokers=tuple(entries),
        threshold=2,
        broker_threshold=broker_threshold,
        lease_seconds=lease_seconds,
        virtual_roots=tuple(
            VirtualRoot(product=product.value, ark_spki_sha256=vendor.authority(product).ark_spki_sha256)
            for product in Product
        ),
    )
    images = [
        ImageReference(
            name=name,
            platform="virtual",
            manifest_sha256="0" * 64,
            svn=1,
            measurements=(
                ReferenceMeasurement(
                    measurement=value.hex(), vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1
                ),
            ),
            roles=("server",) if name == "server-image" else ("site",),
        )
        for name, value in MEASUREMENTS.items()
    ]
    files = files_of(images)
    files["policies/floor.rego"] = (RULES / "floor.rego").read_bytes()
    files["members/borealis-hospital/release/key.data.rego"] = release_rules("site", "north")
    files["members/borealis-hospital/release/key.open.rego"] = release_rules("site", "north", kbs=True)
    files["members/borealis-hospital/release/key.twice.rego"] = release_rules("site", "north", per_boot=2)
    files["members/borealis-hospital/release/key.five.rego"] = release_rules("site", "north", most=5)
    files["members/cygnus-bio/release/key.data.rego"] = release_rules("site", "south")
    files["members/acme-pharma/release/key.model.rego"] = release_rules("server", "hub")
    files |= more or {}
    world.store = found(consortium, files, keys.values(), world.broker_keys(broker_threshold), at)
    places: tuple[tuple[Role, str, str, str], ...] = (
        ("site", "north", "borealis-hospital", "site-image"),
        ("site", "south", "cygnus-bio", "site-image"),
        ("server", "hub", "acme-pharma", "server-image"),
    )
    enrolments = []
    for role, name, member, image in places:
        raw = write_init_data(
            InitData(
                version=1,
                algorithm="sha256",
                charter=world.charter().id,
                role=role,
                name=name,
                brokers=tuple(BrokerAddress(name=entry.name, url=entry.url) for entry in entries),
            )
        )
        world.init_data[f"{role}/{name}"] = raw
        enrolments.append(
            Enrolment(role=role, name=name, member=member, image=image, init_data_sha256=sha256(raw).hexdigest())
        )
    world.change(Changes(put=files_of(enrolments)))
    return world


def deposit_all(world: World, entry: BrokerEntry) -> None:
    client = BrokerClient(entry, "virtual.trial")
    for resource, value in SECRETS.items():
        owner = resource.partition("/")[0]
        client.deposit(resource, value, world.member_keys[owner], charter_id=world.charter().id)
    client.close()


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> World:
    """A consortium with one broker, `one`, not yet running."""
    return found_world(tmp_path_factory.mktemp("world"), virtual_vendor, virtual_chips, ("one",))


@pytest.fixture(scope="module")
def broker(world: World) -> Iterator[BrokerProcess]:
    """The broker `one`, running, with everyone's resources in it."""
    running = start_broker(world.folder / "one", world.entries[0])
    try:
        deposit_all(world, running.entry)
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


@pytest.fixture
def guests(world: World, broker: BrokerProcess) -> Iterator[Callable[..., GuestSession]]:
    """Makes guests (see World.guest) and closes them."""
    made: list[GuestSession] = []

    def make(*place: str, **overrides: Any) -> GuestSession:
        made.append(world.guest(*place, **overrides))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


class RawGuest:
    """A guest that makes each call by hand, so that any part of any call can be another's."""

    def __init__(self, world: World, entry: BrokerEntry, attester: ChipAttester, init_data: bytes) -> None:
        self.world = world
        self.entry = entry
        self.attester = attester
        self.init_data = init_data
        self.client = BrokerClient(entry, "virtual.trial")
        self.sign_key = Ed25519PrivateKey.generate()
        self.tls_key = ec.generate_private_key(ec.SECP256R1())
        self.kem_key = HybridPrivateKey.generate()
        self.guest_nonce = b64(os.urandom(32))
        self.session = ""
        self.nonce = b""
        self.counter = 0

    def keys(self) -> dict[str, bytes]:
        spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        return {
            "kem": self.kem_key.public_bytes(),
            "sign": self.sign_key.public_key().public_bytes(*spki),
            "tls": self.tls_key.public_key().public_bytes(*spki),
        }

    def open(self) -> RawGuest:
        body = json.dumps({"nonce": self.guest_nonce}).encode()
        result = self.client.answer("POST", "/v1/sessions", body, nonce=self.guest_nonce).result
        self.session, self.nonce, self.counter = result["session"], unb64(result["nonce"], where="t"), 0
        return self

    def evidence(self, *, broker: str | None = None, keys: Mapping[str, bytes] | None = None) -> SnpEvidence:
        charter = self.world.charter()
        data = report_data(broker or self.entry.name, charter.id, charter.version, self.nonce, keys or self.keys())
        return self.attester.evidence(data)

    def attest_body(self, evidence: SnpEvidence, **changes: Any) -> bytes:
        message = {
            "evidence": {"certificates": b64(evidence.certificates), "report": b64(evidence.report)},
            "init_data": b64(self.init_data),
            "keys": {purpose: b64(key) for purpose, key in self.keys().items()},
            "session": self.session,
        }
        return json.dumps({**message, **changes}).encode()

    def proof(self, method: str, path: str, body: bytes, *, key: Ed25519PrivateKey | None = None) -> str:
        self.counter += 1
        call = Call(self.entry.name, method, path, body, self.session, self.counter)
        return sign_proof(call, key or self.sign_key)

    def post(self, path: str, body: bytes, *, proof: str | None = None) -> dict[str, Any]:
        signed = proof or self.proof("POST", path, body)
        return self.client.answer("POST", path, body, nonce=self.guest_nonce, proof=signed).result

    def attest(self, evidence: SnpEvidence | None = None, **changes: Any) -> dict[str, Any]:
        return self.post("/v1/attest", self.attest_body(evidence or self.evidence(), **changes))

    def refused(self, evidence: SnpEvidence | None = None, **changes: Any) -> tuple[str, ...]:
        """Why an attestation is refused; fails if it is not."""
        with pytest.raises(BrokerRefused) as refused:
            self.attest(evidence, **changes)
        return refused.value.reasons


@pytest.fixture
def raw_guests(world: World, broker: BrokerProcess) -> Iterator[Callable[..., RawGuest]]:
    """Makes raw guests with an open session; `init_data` and launch settings can be anything."""
    made: list[RawGuest] = []

    def make(role: str = "site", name: str = "north", *, init_data: bytes | None = None, **overrides: Any) -> RawGuest:
        raw = init_data if init_data is not None else world.init_data[f"{role}/{name}"]
        settings = {"host_data": sha256(raw).digest(), **overrides}
        made.append(RawGuest(world, broker.entry, world.attester(role, name, **settings), raw))
        return made[-1].open()

    yield make
    for guest in made:
        guest.client.close()


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The makers of this file, for tests that need a second world."""
    return SimpleNamespace(
        found_world=found_world,
        start_broker=start_broker,
        RawGuest=RawGuest,
        deposit_all=deposit_all,
        release_rules=release_rules,
        free_port=free_port,
        now=now,
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of this run's own."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL server here (apt install postgresql)")
    with running_postgres(binaries) as server:
        yield server


@pytest.fixture
def audited(tmp_path: Path) -> Callable[[BrokerProcess, World], AuditReport]:
    """Exports a broker's ledger as it is now and audits it."""

    def audit(broker: BrokerProcess, world: World) -> AuditReport:
        folder = tmp_path / f"audited-{broker.entry.name}"
        read_database(broker.folder / "state/broker.sqlite", lambda step: export_bundle(step, folder))
        return verify_audit(folder, world.root)

    return audit
