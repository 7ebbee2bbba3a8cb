"""A small consortium for tests of the federated runtime: its charter, users, and guests with attested identities.

No broker runs: EARs and certificates are made here with a broker's keys, as its service would make them.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from attestation.broker.keys import Issuer, create_issuer, load_issuer
from attestation.ear import TYPE as EAR_TYPE
from attestation.ear import EarDocument, sign_ear
from attestation.hybrid import HybridPrivateKey
from attestation.identity import Identity, spiffe_id
from attestation.jws import read_jws
from fl.environments.kit import Kit, KitFile
from fl.environments.user_client import UserClient
from fl.guard.limits import Limits
from fl.jobs.bundle import Bundle, make_bundle
from fl.recipes.fedavg import FedAvgRecipe
from fl.server import serve
from fl.site import run as run_site
from fl.tracking import add_experiment_tracking
from fl.transport.memory import SealedMemory
from policies.charter import Changes, Charter, amend, found, load_charter
from policies.charter.proposal import files_of
from policies.documents import (
    Allowance,
    BrokerEntry,
    BundleApproval,
    Consortium,
    Enrolment,
    ImageReference,
    Member,
    ReferenceMeasurement,
    User,
    VirtualRoot,
)
from policies.init_data import BrokerAddress, ServerAddress
from policies.keys import public_pem

MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")
SITES = ("borealis-hospital", "cygnus-bio")
SERVER = "hub"
DOMAIN = "virtual.trial"
IMAGES = {"server": "11" * 48, "site": "22" * 48}
CHIP = "ab" * 64
MODEL_KEY = bytes(range(32))
RULES = Path(__file__).parents[2] / "policies/rego"

TRAIN = """
import numpy as np
from fl import client as flare

flare.init()
add = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    flare.log("seen", float(received.params["w"][0]), step=received.current_round)
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(add)}, metrics={"m": add}))
"""


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass
class UserKeys:
    """A user with private keys."""

    member: str
    name: str
    tls: ec.EllipticCurvePrivateKey
    certificate: str
    signing: Ed25519PrivateKey
    results: HybridPrivateKey
    rights: tuple[Any, ...]

    def document(self) -> User:
        return User(
            name=self.name,
            member=self.member,
            tls_certificate=self.certificate,
            signing_key=public_pem(self.signing),
            results_key=base64.b64encode(self.results.public_bytes()).decode(),
            rights=self.rights,
        )


def make_user(member: str, name: str, *rights: str) -> UserKeys:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{member}/{name}")])
    uri = x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/user/{member}/{name}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(minutes=5))
        .not_valid_after(now() + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM).decode()
    return UserKeys(member, name, key, pem, Ed25519PrivateKey.generate(), HybridPrivateKey.generate(), rights)


@dataclass
class FederationWorld:
    """The consortium. `charter` is current for all of its guests; `change` publishes a new version."""

    issuer: Issuer
    broker_key: Ed25519PrivateKey
    member_keys: Mapping[str, Ed25519PrivateKey]
    users: Mapping[str, UserKeys]
    store: dict[str, bytes] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    ledger: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    way: dict[str, Any] = field(default_factory=dict)
    """How sites and users get to the server: fields of a `ServerAddress`."""
    _charter: Charter | None = None
    _stops: dict[str, threading.Event] = field(default_factory=dict)

    def charter(self) -> Charter:
        if self._charter is None:
            self._charter = load_charter(self.store, self.store["metadata/1.root.json"], now())
        return self._charter

    def change(self, changes: Changes) -> None:
        self.store = amend(self.store, changes, self.member_keys.values(), [self.broker_key], now())
        self._charter = None

    def approve(
        self,
        bundle: Bundle,
        sites: tuple[str, ...] = SITES,
        *,
        days: int = 1,
        job: str | None = None,
        bits: int | None = 1 << 50,
    ) -> None:
        expires = now() + timedelta(days=days)
        approval = BundleApproval(
            bundle=bundle.digest,
            job=job or bundle.settings.name,
            sites=sites,
            expires=expires,
            budget=Allowance(bits=bits),
        )
        if self.charter().bundle(bundle.digest) != approval:  # another test of this second approved the same
            self.change(Changes(put=files_of([approval])))

    def record(self, kind: str, document: Mapping[str, Any]) -> str:
        self.ledger.append((kind, dict(document)))
        return ""

    def identity(
        self,
        role: str,
        name: str,
        *,
        seconds: int = 60,
        age: int = 0,
        member: str | None = None,
        broker_key: Ed25519PrivateKey | None = None,
        **claims: Any,
    ) -> Identity:
        """A guest's attested identity. `age` and `claims` make it an old or a false one."""
        keys = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate(), HybridPrivateKey.generate()
        tls, sign, kem = keys
        spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        issued = now() - timedelta(seconds=age)
        charter = self.charter()
        enrolled = charter.enrolment(role, name)
        digests = {
            "tls": sha256(tls.public_key().public_bytes(*spki)).hexdigest(),
            "sign": sha256(sign.public_key().public_bytes(*spki)).hexdigest(),
            "kem": sha256(kem.public_bytes()).hexdigest(),
        }
        document = EarDocument.model_validate(
            {
                "eat_profile": "urn:sealwright:ear:1",
                "iat": int(issued.timestamp()),
                "exp": int(issued.timestamp()) + seconds,
                "iss": "one",
                "nonce": "bm9uY2U=",
                "charter": {"id": charter.id, "version": charter.version},
                "platform": "virtual",
                "subject": {
                    "role": role,
                    "name": name,
                    "member": member or (enrolled.member if enrolled else "acme-pharma"),
                    "image": f"{role}-image",
                },
                "keys": digests,
                "submods": {
                    "cpu0": {
                        "ear.status": "affirming",
                        "ear.trustworthiness-vector": {},
                        "ear.appraisal-policy-id": "policies/appraisal.toml",
                        "ear.veraison.annotated-evidence": {
                            "measurement": IMAGES.get(role, IMAGES["site"]),
                            "host_data": sha256(f"{role}/{name}".encode()).hexdigest(),
                            "chip_id": CHIP,
                            **claims,
                        },
                    }
                },
            }
        )
        ear = sign_ear(document, broker_key or self.broker_key)
        der = self.issuer.guest_certificate(
            tls.public_key(), trust_domain=DOMAIN, role=role, name=name, ears=[ear], at=issued, seconds=86000
        )
        leaf = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()
        return Identity(
            spiffe_id=spiffe_id(DOMAIN, role, name),
            role=role,
            name=name,
            tls_key_pem=tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            certificate_pem=leaf + self.issuer.certificate_pem,
            sign_key=sign,
            kem_key=kem,
            ears=(ear,),
            lease_ends=issued + timedelta(seconds=seconds),
        )

    def renewed(self, identity: Identity, seconds: int) -> Identity:
        """The same guest after a fresh attestation: the same keys, a newer EAR."""
        payload = read_jws(identity.ears[0], self.broker_key.public_key(), typ=EAR_TYPE)
        issued = int(now().timestamp())
        document = EarDocument.model_validate({**payload, "iat": issued, "exp": issued + seconds})
        ends = datetime.fromtimestamp(issued + seconds, UTC)
        return replace(identity, ears=(sign_ear(document, self.broker_key),), lease_ends=ends)

    def replace_issuer(self, folder: Path) -> None:
        """The charter's broker issues under another certificate from now on."""
        self.issuer = load_issuer(folder / "new.pem", create_issuer(folder / "new.pem", "one", now()))
        consortium = self.charter().consortium
        entry = consortium.brokers[0].model_copy(update={"issuer_certificate": self.issuer.certificate_pem})
        self.change(Changes(consortium=consortium.model_copy(update={"brokers": (entry,)})))

    def recertified(self, identity: Identity) -> Identity:
        """The same guest with a newer certificate over the same key."""
        leaf = x509.load_der_x509_certificate(identity.certificate_der)
        key = leaf.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        der = self.issuer.guest_certificate(
            key,
            trust_domain=DOMAIN,
            role=identity.role,
            name=identity.name,
            ears=identity.ears,
            at=now(),
            seconds=80000,
        )
        pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()
        return replace(identity, certificate_pem=pem + self.issuer.certificate_pem)

    def to(self, address: str) -> ServerAddress:
        """The way to the server that listens on `address`."""
        return ServerAddress(**{"name": SERVER, "address": address, **self.way})

    def kit(self, user: str, address: str) -> Kit:
        keys = self.users[user]
        charter = self.charter()
        return Kit(
            KitFile(
                member=keys.member,
                user=keys.name,
                charter=charter.id,
                brokers=(BrokerAddress(name="one", url="https://127.0.0.1:1"),),
                server=self.to(address),
            ),
            self.store["metadata/1.root.json"],
            keys.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            keys.certificate,
            keys.signing,
            keys.results,
            MODEL_KEY,
        )

    @contextmanager
    def client(self, address: str, user: str = "acme-pharma/ada") -> Iterator[UserClient]:
        with UserClient.connected(self.kit(user, address), self.charter(), now()) as client:
            yield client

    @contextmanager
    def server(self, identity: Any = None, **changes: Any) -> Iterator[str]:
        """A running server; its address. `identity`: its own, or a function that gives it."""
        found = identity or self.identity("server", SERVER, seconds=600)
        own = found if callable(found) else lambda: found
        stop, ready, addresses = threading.Event(), threading.Event(), []

        def listening(address: str) -> None:
            addresses.append(address)
            ready.set()

        arguments: dict[str, Any] = {
            "identity": own,
            "charter": self.charter,
            "clock": now,
            "listen": "127.0.0.1:0",
            "model_key": MODEL_KEY,
            "record": self.record,
            "stop": stop,
            "tell": self.told.append,
            "ready": listening,
            **changes,
        }
        thread = threading.Thread(target=lambda: serve(**arguments), name="server")
        thread.start()
        try:
            assert ready.wait(10), "the server does not listen"
            self._stops[addresses[0]] = stop
            yield addresses[0]
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"

    def stop_server(self, address: str) -> None:
        self._stops[address].set()

    @contextmanager
    def site(
        self, address: str, name: str, *, number: float = 1.0, identity: Any = None, **changes: Any
    ) -> Iterator[RunningSite]:
        """A running site whose data is one number, once it is connected or has ended."""
        found = identity or self.identity("site", name, seconds=600)
        own = found if callable(found) else lambda: found
        running = RunningSite()
        arguments: dict[str, Any] = {
            "identity": own,
            "charter": self.charter,
            "clock": now,
            "server": self.to(address),
            "server_name": SERVER,
            "data": {"number.txt": str(number).encode()},
            "record": self.record,
            "stop": running.stop,
            "tell": self.told.append,
            "limits": Limits(),
            "patience": 2.0,
            "pause": 1.0,
            "connected": running.connected.set,
            **changes,
        }

        def target() -> None:
            try:
                run_site(**arguments)
            except Exception as error:
                running.error = error
            finally:
                running.connected.set()
                running.ended.set()

        thread = threading.Thread(target=target, name=f"site {name}")
        thread.start()
        try:
            assert running.connected.wait(15), "the site does not connect"
            yield running
        finally:
            running.stop.set()
            thread.join(20)
            assert not thread.is_alive(), "the site does not stop"


@dataclass
class RunningSite:
    """A site in a thread, and what it ended with."""

    stop: threading.Event = field(default_factory=threading.Event)
    connected: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


def found_federation(folder: Path, sites: Mapping[str, str] | None = None) -> FederationWorld:
    """Found the charter: a server and `sites` (name → member; None: SITES) enrolled, three users."""
    sites = dict(zip(SITES, SITES, strict=True)) if sites is None else sites
    at = now()
    broker_key = Ed25519PrivateKey.generate()
    issuer = load_issuer(folder / "issuer.pem", create_issuer(folder / "issuer.pem", "one", at))
    members = {name: Ed25519PrivateKey.generate() for name in MEMBERS}
    users = {
        f"{user.member}/{user.name}": user
        for user in (
            make_user("acme-pharma", "ada", "submit", "view", "download"),
            make_user("borealis-hospital", "ole", "view", "operate"),
            make_user("cygnus-bio", "cy", "view"),
        )
    }
    world = FederationWorld(issuer, broker_key, members, users)
    consortium = Consortium(
        name="trial",
        platform="virtual",
        trust_domain=DOMAIN,
        members=tuple(Member(name=name, public_key=public_pem(key)) for name, key in members.items()),
        brokers=(
            BrokerEntry(
                name="one",
                member="acme-pharma",
                url="https://127.0.0.1:1",
                signing_key=public_pem(broker_key),
                issuer_certificate=issuer.certificate_pem,
            ),
        ),
        threshold=2,
        lease_seconds=900,  # leases have tests of their own; the others are not to race a busy machine
        virtual_roots=(VirtualRoot(product="Milan", ark_spki_sha256="0" * 64),),
    )
    images = [
        ImageReference(
            name=f"{role}-image",
            platform="virtual",
            manifest_sha256="0" * 64,
            svn=1,
            measurements=(
                ReferenceMeasurement(measurement=value, vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1),
            ),
            roles=("server",) if role == "server" else ("site",),
        )
        for role, value in IMAGES.items()
    ]
    enrolments = [
        Enrolment(
            role="server" if name == SERVER else "site",
            name=name,
            member=sites.get(name, "acme-pharma"),
            image="server-image" if name == SERVER else "site-image",
            init_data_sha256=sha256(f"{'server' if name == SERVER else 'site'}/{name}".encode()).hexdigest(),
        )
        for name in (SERVER, *sites)
    ]
    files = files_of([*images, *enrolments, *(user.document() for user in users.values())])
    files["policies/floor.rego"] = (RULES / "floor.rego").read_bytes()
    world.store = found(consortium, files, members.values(), [broker_key], at)
    return world


def make_job(folder: Path, script: str = TRAIN, **changes: Any) -> tuple[Bundle, SealedMemory]:
    """A bundle of one script, and its first model of three zeros."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(script)
    tracking = changes.pop("tracking", False)
    arguments: dict[str, Any] = {
        "name": "trial",
        "initial_model": {"w": np.zeros(3, dtype=np.float32)},
        "min_clients": 2,
        "num_rounds": 2,
        "train_script": str(code / "client.py"),
        "round_seconds": 30,
        **changes,
    }
    recipe = FedAvgRecipe(**arguments)
    if tracking:
        add_experiment_tracking(recipe, tracking_type="tensorboard")
    return make_bundle(code, recipe.settings), recipe.first_model()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition came true in time."""
    import time

    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
