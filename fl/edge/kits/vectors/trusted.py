"""Vectors of trust: charters, gateways that prove themselves under them, tasks; and what the reference makes of each.

One charter for hardware, in three versions of which the second has a second root, and one for the virtual platform.
Two brokers' EARs are needed. Each case changes one thing; `says` is the reference's first reason, "" for none.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import sha256
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from attestation.canonical import b64, canonical_bytes, format_time
from attestation.ear import EarDocument, sign_ear
from attestation.introduction import Introduction
from attestation.jws import sign_jws
from fl.edge.kits.python.trust import Trust
from fl.edge.kits.vectors.sealed import ed25519, group_keys, p256
from fl.edge.kits.vectors.words import TASK
from fl.edge.messages import PROOF_TYPE, Task
from fl.edge.task import DeviceTask
from policies.charter import Changes, amend, found
from policies.charter.proposal import files_of
from policies.devices import TaskApproval
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
from policies.errors import Refused, SealwrightError
from policies.keys import public_pem

AT: Final = datetime(2026, 6, 1, tzinfo=UTC)
NOW: Final = AT + timedelta(hours=1)
JOB: Final = "heart-rate"
NONCE: Final = "00112233445566778899aabbccddeeff"
MEMBERS: Final = ("acme-pharma", "borealis-hospital", "cygnus-bio")
BROKERS: Final = ("one", "two", "three")
GRAPH: Final = b"graph"
MEASUREMENT: Final = "77" * 48
_TASK: Final = DeviceTask(JOB, "executorch", GRAPH, {"batch_size": 4, "lr": 0.5})
_LAPSED: Final = DeviceTask(JOB, "executorch", GRAPH, {"batch_size": 8})

Store = dict[str, bytes]


@dataclass(frozen=True)
class _Founded:
    """A consortium of three members and three brokers, two of whom must vouch. `owner`: whose keys they are."""

    platform: Literal["virtual", "hardware"]
    owner: str = ""

    @cached_property
    def consortium(self) -> Consortium:
        virtual = self.platform == "virtual"
        return Consortium(
            name="trial",
            platform=self.platform,
            trust_domain="virtual.trial" if virtual else "trial.example",
            members=tuple(Member(name=name, public_key=public_pem(self._key(name))) for name in MEMBERS),
            brokers=tuple(_broker(name, public_pem(self._key(f"broker {name}"))) for name in BROKERS),
            threshold=2,
            broker_threshold=2,
            virtual_roots=(VirtualRoot(product="Genoa", ark_spki_sha256="00" * 32),) if virtual else (),
            lease_seconds=600,
        )

    @cached_property
    def first(self) -> Store:
        roles: tuple[tuple[Role, str], ...] = (("gateway", MEASUREMENT), ("server", "11" * 48))
        documents = [
            ImageReference(
                name=f"{role}-image",
                platform=self.platform,
                manifest_sha256="0" * 64,
                svn=1,
                roles=(role,),
                measurements=(_measured(measurement),),
            )
            for role, measurement in roles
        ]
        guests: tuple[tuple[Role, str, tuple[str, ...] | None], ...] = (
            ("gateway", "gate", None),
            ("gateway", "chip", ("cd" * 64,)),
            ("gateway", "turin", ("ef" * 8,)),
            ("server", "hub", None),
        )
        places = [
            Enrolment(
                role=role,
                name=name,
                member="acme-pharma",
                image=f"{role}-image",
                init_data_sha256=_init_data(role, name),
                chips=chips,
            )
            for role, name, chips in guests
        ]
        tasks = [
            TaskApproval(task=_TASK.digest, job=JOB, expires=AT + timedelta(days=30)),
            TaskApproval(task=_LAPSED.digest, job=JOB, expires=AT),
        ]
        files = files_of([*documents, *places, *tasks])
        return found(self.consortium, files, self._member_keys(), self._broker_keys(), AT)

    @cached_property
    def second(self) -> Store:
        """With another lease, and so another root."""
        changed = self.consortium.model_copy(update={"lease_seconds": 300})
        return self._amended(self.first, Changes(consortium=changed))

    @cached_property
    def current(self) -> Store:
        """With one more task."""
        other = TaskApproval(task="ee" * 32, job="sleep", expires=AT + timedelta(days=30))
        return self._amended(self.second, Changes(put=files_of([other])))

    @property
    def root(self) -> bytes:
        return self.first["metadata/1.root.json"]

    @property
    def id(self) -> str:
        return sha256(self.root).hexdigest()

    def _amended(self, store: Store, changes: Changes) -> Store:
        return amend(store, changes, self._member_keys(), self._broker_keys(), AT)

    def _key(self, name: str) -> Ed25519PrivateKey:
        return ed25519(self.owner + name)

    def _member_keys(self) -> list[Ed25519PrivateKey]:
        return [self._key(name) for name in MEMBERS]

    def _broker_keys(self) -> list[Ed25519PrivateKey]:
        """Of those who put the time on a charter: as many as are needed, since one more would begin another version."""
        return [self._key(f"broker {name}") for name in BROKERS[:2]]


def _measured(measurement: str) -> ReferenceMeasurement:
    return ReferenceMeasurement(measurement=measurement, vcpu_model="EPYC-v4", vcpus=1, vmm="qemu", guest_features=1)


def _init_data(role: str, name: str) -> str:
    return sha256(f"{role}/{name}".encode()).hexdigest()


def _broker(name: str, signing_key: str) -> BrokerEntry:
    key = p256(f"issuer {name}")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} issuer")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1 + BROKERS.index(name))
        .not_valid_before(AT)
        .not_valid_after(AT + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return BrokerEntry(
        name=name,
        member=MEMBERS[BROKERS.index(name)],
        url=f"https://{name}.example",
        signing_key=signing_key,
        issuer_certificate=certificate.public_bytes(Encoding.PEM).decode(),
    )


@dataclass(frozen=True)
class _Gateway:
    """A gateway's introduction, true but for what is changed."""

    under: _Founded
    name: str = "gate"
    role: str = "gateway"
    brokers: tuple[str, ...] = ("one", "two")
    forged: tuple[str, ...] = ()
    age: int = 0
    seconds: int = 300
    charter: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    status: str = "affirming"
    claims: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    """What broker two claims otherwise."""
    subject: Mapping[str, str] = field(default_factory=dict)
    word: Mapping[str, Any] = field(default_factory=dict)
    typ: str = PROOF_TYPE
    signer: str = "gateway"

    def proof(self) -> str:
        public = ed25519("gateway").public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        group = group_keys(self.under.id)
        word = {
            "charter": {"id": self.under.id, "version": 3},
            "group_key": b64(group.public),
            "key_id": group.id.hex(),
            "nonce": NONCE,
            **self.word,
        }
        said = Introduction(
            word=sign_jws(word, ed25519(self.signer), kid=f"gateway/{self.name}", typ=self.typ),
            sign_key=b64(public),
            ears=tuple(self._ear(broker, sha256(public).hexdigest()) for broker in self.brokers),
        )
        return said.model_dump_json()

    def _ear(self, broker: str, key: str) -> str:
        issued = int(NOW.timestamp()) - self.age
        evidence = {
            "measurement": MEASUREMENT if self.role == "gateway" else "11" * 48,
            "host_data": _init_data(self.role, self.name),
            "chip_id": "ab" * 64,
            **self.claims,
            **(self.other if broker == "two" else {}),
        }
        document = {
            "eat_profile": "urn:sealwright:ear:1",
            "iat": issued,
            "exp": issued + self.seconds,
            "iss": broker,
            "nonce": "bm9uY2U=",
            "charter": {"id": self.charter or self.under.id, "version": 3},
            "platform": self.under.platform,
            "subject": {
                "role": self.role,
                "name": self.name,
                "member": "acme-pharma",
                "image": f"{self.role}-image",
                **self.subject,
            },
            "keys": {"sign": key, **self.keys},
            "submods": {
                "cpu0": {
                    "ear.status": self.status,
                    "ear.trustworthiness-vector": {"hardware": 2},
                    "ear.appraisal-policy-id": "policies/appraisal.toml",
                    "ear.veraison.annotated-evidence": evidence,
                }
            },
        }
        name = "forger" if broker in self.forged else f"broker {broker}"
        return sign_ear(EarDocument.model_validate(document), ed25519(name))


def trust() -> dict[str, Any]:
    """Roots, stores by name, and the cases."""
    hardware, virtual = _Founded("hardware"), _Founded("virtual")
    stores: dict[str, Store] = {
        "hardware-1": hardware.first,
        "hardware-2": hardware.second,
        "hardware-3": hardware.current,
        "virtual-1": virtual.first,
        # A root that its own signers alone have signed, and all that follows from it.
        "usurped": {**_Founded("hardware", "usurper ").current, "metadata/1.root.json": hardware.root},
    }
    changes = _store_changes(hardware)
    charters = [_charter_case(hardware, "hardware-3", {}, stores)]
    charters += [_charter_case(hardware, "hardware-3", change, stores) for change in changes]
    charters += [
        _charter_case(hardware, name, {}, stores) for name in ("hardware-1", "hardware-2", "virtual-1", "usurped")
    ]
    charters += [
        _charter_case(hardware, "hardware-2", {}, stores, known="hardware-3"),
        _charter_case(hardware, "hardware-3", {}, stores, known="hardware-2"),
        _charter_case(hardware, "hardware-3", {}, stores, at=AT + timedelta(days=400)),
        _charter_case(hardware, "hardware-3", {}, stores, at=AT + timedelta(days=2)),
        _charter_case(virtual, "virtual-1", {}, stores),
        _charter_case(virtual, "virtual-1", {}, stores, production=False),
    ]
    return {
        "roots": {"hardware": hardware.root.decode(), "virtual": virtual.root.decode()},
        "stores": {
            name: {file: base64.b64encode(raw).decode() for file, raw in store.items()}
            for name, store in stores.items()
        },
        "charters": charters,
        "proofs": [_proof_case(hardware, name, raw) for name, raw in _proofs(hardware, virtual).items()],
        "tasks": [_task_case(hardware, words) for words in _tasks()],
    }


def _store_changes(of: _Founded) -> list[dict[str, bytes | None]]:
    """What is done to the files of the current store, each of which has to be refused."""
    store = of.current
    changes: list[dict[str, bytes | None]] = []

    def named(end: str) -> str:
        return max(name for name in store if name.endswith(end))

    for end in (".root.json", ".snapshot.json", ".targets.json", ".enrolments.json", ".code.json", "timestamp.json"):
        name = named(end)
        changes.append({name: None} if end != ".root.json" else {name: store[name][:-2]})
        changes += [{name: _signed_less(store[name])}, {name: _forged(store[name])}]
    image = named(".gateway-image.json")
    changes += [{image: None}, {image: store[image].replace(b"77777777", b"88888888")}]
    changes += [{"metadata/1.root.json": None}, {"metadata/1.root.json": store["metadata/2.root.json"]}]
    changes += [{"metadata/timestamp.json": of.first["metadata/timestamp.json"]}]
    changes += [{name: store[name].replace(b'"version":3', b'"version":4') for name in (named(".snapshot.json"),)}]
    changes += [{"metadata/timestamp.json": b"{}"}, {"metadata/timestamp.json": b"[" * 5000}]
    return changes


def _signed_less(raw: bytes) -> bytes:
    """The metadata with one signature alone."""
    metadata = json.loads(raw)
    metadata["signatures"] = metadata["signatures"][:1]
    return canonical_bytes(metadata)


def _forged(raw: bytes) -> bytes:
    """The metadata with its signatures' first digit changed."""
    metadata = json.loads(raw)
    for one in metadata["signatures"]:
        one["sig"] = f"{int(one['sig'][0], 16) ^ 1:x}{one['sig'][1:]}"
    return canonical_bytes(metadata)


def _charter_case(
    of: _Founded,
    name: str,
    change: Mapping[str, bytes | None],
    stores: Mapping[str, Store],
    *,
    known: str | None = None,
    at: datetime = NOW,
    production: bool = True,
) -> dict[str, Any]:
    device = Trust(of.root, production=production)
    if known is not None:
        device.follow(_answer(stores[known]), at)
    said = {**stores[name], **change}
    good = True
    try:
        device.follow(_answer({file: raw for file, raw in said.items() if raw is not None}), at)
    except SealwrightError:
        good = False
    return {
        "root": of.platform,
        "store": name,
        "changed": {file: None if raw is None else base64.b64encode(raw).decode() for file, raw in change.items()},
        "known": known,
        "at": format_time(at),
        "production": production,
        "good": good,
        "version": device.version if good else None,
    }


def _answer(store: Mapping[str, bytes]) -> bytes:
    return canonical_bytes({"files": {name: b64(raw) for name, raw in store.items()}})


def _proofs(hardware: _Founded, virtual: _Founded) -> dict[str, str]:
    true = _Gateway(hardware).proof()
    said = json.loads(true)
    group = group_keys(hardware.id)
    return {
        "true": true,
        "three brokers, one of them forged": _Gateway(
            hardware, brokers=("one", "two", "three"), forged=("three",)
        ).proof(),
        "one broker": _Gateway(hardware, brokers=("one",)).proof(),
        "one broker twice": _Gateway(hardware, brokers=("one", "one", "two")).proof(),
        "a broker that is none": _Gateway(hardware, brokers=("one", "four")).proof(),
        "a forged EAR": _Gateway(hardware, forged=("two",)).proof(),
        "EARs that ended": _Gateway(hardware, age=301).proof(),
        "EARs that end now": _Gateway(hardware, age=300).proof(),
        "EARs of the future": _Gateway(hardware, age=-61).proof(),
        "EARs that live too long": _Gateway(hardware, seconds=301).proof(),
        "another charter": _Gateway(hardware, charter="99" * 32).proof(),
        "the virtual platform": _Gateway(virtual).proof(),
        "another role": _Gateway(hardware, role="server", name="hub").proof(),
        "a place that is none": _Gateway(hardware, name="other").proof(),
        "another member": _Gateway(hardware, subject={"member": "cygnus-bio"}).proof(),
        "another image's name": _Gateway(hardware, subject={"image": "server-image"}).proof(),
        "a measurement that is none": _Gateway(hardware, claims={"measurement": "99" * 48}).proof(),
        "the server's measurement": _Gateway(hardware, claims={"measurement": "11" * 48}).proof(),
        "other init-data": _Gateway(hardware, claims={"host_data": "00" * 32}).proof(),
        "another chip": _Gateway(hardware, name="chip").proof(),
        "its chip": _Gateway(hardware, name="chip", claims={"chip_id": "cd" * 64}).proof(),
        "its short chip": _Gateway(hardware, name="turin", claims={"chip_id": "ef" * 8 + "0" * 112}).proof(),
        "two guests": _Gateway(hardware, other={"chip_id": "cd" * 64}).proof(),
        "not affirming": _Gateway(hardware, status="warning").proof(),
        "EARs of another key": _Gateway(hardware, keys={"sign": "00" * 32}).proof(),
        "a word of another key": _Gateway(hardware, signer="other").proof(),
        "a word of another type": _Gateway(hardware, typ="other+jwt").proof(),
        "another nonce": _Gateway(hardware, word={"nonce": "00" * 16}).proof(),
        "a word on another charter": _Gateway(hardware, word={"charter": {"id": "99" * 32, "version": 3}}).proof(),
        "another group key's id": _Gateway(hardware, word={"key_id": "00" * 32}).proof(),
        "a short group key": _Gateway(hardware, word={"group_key": b64(group.public[:-1])}).proof(),
        "no group key": _Gateway(hardware, word={"group_key": 1}).proof(),
        "no EARs": json.dumps({**said, "ears": []}),
        "more than it should say": json.dumps({**said, "more": 1}),
        "a key that is none": json.dumps({**said, "sign_key": "AAAA"}),
        "a word that is none": json.dumps({**said, "word": "a.b"}),
        "no introduction": "{}",
        "nothing": "",
    }


def _proof_case(of: _Founded, name: str, raw: str) -> dict[str, Any]:
    device = Trust(of.root)
    device.follow(_answer(of.current), NOW)
    case: dict[str, Any] = {"name": name, "proof": raw, "nonce": NONCE, "at": format_time(NOW), "until": None}
    try:
        until = format_time(device.appraise(raw.encode(), NONCE, NOW).until)
    except Refused as error:
        return {**case, "says": error.reasons[0]}
    return {**case, "says": "", "until": until}


def _tasks() -> list[dict[str, Any]]:
    named = {**TASK, "name": JOB, "graph": {**TASK["graph"], "sha256": sha256(GRAPH).hexdigest()}}
    true = {**named, "digest": _TASK.digest, "config": dict(_TASK.config)}
    other = DeviceTask(JOB, "executorch", GRAPH, {"batch_size": 5})
    return [
        true,
        {**true, "config": {"batch_size": 5}},
        {**true, "digest": other.digest, "config": dict(other.config)},
        {**true, "digest": _LAPSED.digest, "config": dict(_LAPSED.config)},
        {**true, "name": "sleep"},
        {**true, "graph": TASK["graph"]},
    ]


def _task_case(of: _Founded, words: Mapping[str, Any]) -> dict[str, Any]:
    device = Trust(of.root)
    device.follow(_answer(of.current), NOW)
    try:
        device.admit(Task.model_validate(words), NOW)
    except Refused as error:
        return {"task": dict(words), "at": format_time(NOW), "says": error.reasons[0]}
    return {"task": dict(words), "at": format_time(NOW), "says": ""}
