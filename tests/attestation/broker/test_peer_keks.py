"""Brokers whose key-encryption keys lie with their peers: released, rotated, started cold by members; every attack."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main
from appliance.kits.user_keys import UserKeys, create_user_keys, write_user_keys
from attestation.broker.cold_start import CUSTODIAN, Request, answer_request, deal_recovery
from attestation.broker.peer_kek import PeerKek
from attestation.broker.storage import read_database
from attestation.canonical import canonical_bytes
from attestation.client import BrokerClient, GuestSession
from attestation.errors import BrokerRefused, BrokerUnavailable
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product
from attestation.fresh_state import Store, StoreFile, derive_keys
from attestation.guest_vault import open_vault
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.entry import parse_entry
from attestation.messages import check_message
from attestation.virtual.chip import Chip
from attestation.virtual.port import Port, bind_port
from attestation.virtual.processor import LaunchContext, report_for
from attestation.virtual.vendor import Vendor
from policies.charter import Charter
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment, ImageReference, ReferenceMeasurement
from policies.errors import Refused, SealwrightError
from policies.init_data import BrokerAddress, InitData, write_init_data

NAMES = ("one", "two", "three")
OWNERS = dict(zip(NAMES, ("acme-pharma", "borealis-hospital", "cygnus-bio"), strict=True))
MEASUREMENT = bytes([3]) * 48
RESOURCE, VALUE = "borealis-hospital/key/data", b"north's data key"


class Platform:
    """The virtual platform of one broker's machine: its port, and what it launches next."""

    def __init__(self, path: Path, chip: Chip, vendor: Vendor) -> None:
        self._chip = chip
        self.context: LaunchContext | None = None
        self._loop = asyncio.new_event_loop()
        port = Port(self._report, chip.certificate_table(vendor))
        port.admit(os.getsid(0))
        self._thread = threading.Thread(target=self._run, args=(port, path), daemon=True)
        self._thread.start()

    def _report(self, data: bytes, vmpl: int) -> bytes:
        assert self.context is not None
        return report_for(self._chip, self.context, data, vmpl)

    def _run(self, port: Port, path: Path) -> None:
        async def serve() -> None:
            self._ended = asyncio.Event()
            async with await asyncio.start_unix_server(port.handle, sock=bind_port(path)):
                await self._ended.wait()

        self._loop.run_until_complete(serve())
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)


@dataclass
class Peers:
    """Three brokers of three members, each a guest of the two others."""

    world: Any
    start: Callable[..., Any]
    custodians: Mapping[str, UserKeys]
    platforms: dict[str, Platform]
    running: dict[str, Any] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        return Path(self.world.folder / name)

    def entry(self, name: str) -> Any:
        return next(entry for entry in self.world.entries if entry.name == name)

    def launch(self, name: str, **overrides: Any) -> None:
        """Boot the broker's machine anew: another REPORT_ID, and whatever its host has changed."""
        honest = {
            "measurement": MEASUREMENT,
            "host_data": sha256(self.world.init_data[f"broker/{name}"]).digest(),
            "report_id": os.urandom(32),
        }
        self.platforms[name].context = LaunchContext(**{**honest, **overrides})
        self.running[name] = self.start(self.folder(name), self.entry(name))

    def kill(self, *names: str) -> None:
        for name in names:
            running = self.running.pop(name, None)
            if running is not None:
                running.stop(signal.SIGKILL)

    def settle(self, name: str, text: str) -> None:
        """Change the broker's settings and have them read."""
        path = self.folder(name) / "broker.toml"
        kept = [line for line in path.read_text().splitlines() if not line.startswith(("kek", "old_keks"))]
        path.write_text("\n".join([text, *kept]) + "\n")
        if name in self.running:
            self.running[name].process.send_signal(signal.SIGHUP)

    def client(self, name: str) -> BrokerClient:
        return BrokerClient(self.entry(name), "virtual.trial")

    def keys(self, name: str) -> set[str]:
        """Under which keys the broker's resources are."""
        database = self.folder(name) / "state/broker.sqlite"
        return set(read_database(database, lambda step: step.count_by_kek()))

    def problem(self, name: str) -> str:
        """The broker's last word on its key, if it has none."""
        told = [line for line in self.running[name].lines if line.get("event") == "key-encryption"]
        return str(told[-1].get("problem", "")) if told else ""

    def request(self, name: str) -> Request:
        client = self.client(name)
        try:
            asked = client.answer("GET", "/v1/cold-start", None, nonce="").result["request"]
        finally:
            client.close()
        return check_message(Request, asked)

    def answered(self, name: str, member: str, request: Request) -> str:
        """A custodian's answer, made from the charter that the broker shows and the root that the member has."""
        keys = self.custodians[member]
        charter = self.charter()
        return answer_request(request, charter, now(), member, keys.results_key, keys.signing_key)

    def charter(self) -> Charter:
        return self.world.charter()  # type: ignore[no-any-return]

    def give(self, name: str, token: str) -> int:
        client = self.client(name)
        try:
            answer = client.answer("POST", "/v1/cold-start", json.dumps({"answer": token}).encode(), nonce="")
            return int(answer.result["needed"])
        finally:
            client.close()

    def released(self, name: str) -> bytes:
        """What a guest gets from the broker."""
        guest: GuestSession = self.world.guest(timeout=10.0)
        try:
            guest.attest()
            return guest.release_from(name, RESOURCE)
        finally:
            guest.close()


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def usable(peers: Peers, name: str) -> bool:
    try:
        return peers.released(name) == VALUE
    except BrokerUnavailable:
        return False


PEERS = 'kek = { kind = "peers", init_data = "init-data.toml", port = "port.sock", generation = %d }'


@pytest.fixture(scope="module")
def peers(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_vendor: Vendor,
    virtual_chips: Mapping[Product, Chip],
    tools: Any,
) -> Iterator[Peers]:
    """All three have gone over from a file to their peers, one after another, while they served."""
    folder = tmp_path_factory.mktemp("peers")
    world = tools.found_world(folder, virtual_vendor, virtual_chips, NAMES)
    custodians = {name: create_user_keys("virtual.trial", name, CUSTODIAN, now()) for name in world.member_keys}
    chip = virtual_chips[Product.MILAN]
    platforms = {name: Platform(folder / name / "port.sock", chip, virtual_vendor) for name in NAMES}
    made = Peers(world, tools.start_broker, custodians, platforms)
    enrol(made, tools)
    try:
        for name in NAMES:
            made.launch(name)
        for name in NAMES:
            tools.deposit_all(world, made.entry(name))
        for name in NAMES:
            made.settle(name, PEERS % 1 + '\nold_keks = ["keys/kek"]')
            until(lambda name=name: all(key.startswith("peers:") for key in made.keys(name)))  # type: ignore[misc]
            made.settle(name, PEERS % 1)
            (made.folder(name) / "keys/kek").unlink()
        yield made
    finally:
        for running in made.running.values():
            running.stop()
        for platform in platforms.values():
            platform.close()


def enrol(peers: Peers, tools: Any) -> None:
    """The charter's word on the brokers: an image, a place for each, a release policy of each owner, custodians."""
    world = peers.world
    measured = ReferenceMeasurement(
        measurement=MEASUREMENT.hex(), vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1
    )
    image = ImageReference(
        name="broker-image",
        platform="virtual",
        manifest_sha256="0" * 64,
        svn=1,
        measurements=(measured,),
        roles=("broker",),
    )
    floor = (Path(__file__).parents[3] / "policies/rego/floor.rego").read_text()
    places, rules = [], {"policies/floor.rego": floor.replace('roles := {"', 'roles := {"broker", "').encode()}
    for name, owner in OWNERS.items():
        others = tuple(BrokerAddress(name=e.name, url=e.url) for e in world.entries if e.name != name)
        raw = write_init_data(
            InitData(
                version=1, algorithm="sha256", charter=world.charter().id, role="broker", name=name, brokers=others
            )
        )
        world.init_data[f"broker/{name}"] = raw
        (peers.folder(name) / "init-data.toml").write_bytes(raw)
        places.append(
            Enrolment(
                role="broker",
                name=name,
                member=owner,
                image="broker-image",
                init_data_sha256=sha256(raw).hexdigest(),
            )
        )
        rules[f"members/{owner}/release/vault-broker.{name}.rego"] = tools.release_rules("broker", name)
    users = [keys.document(rights=()) for keys in peers.custodians.values()]
    world.change(Changes(put={**files_of([image, *places, *users]), **rules}))


@pytest.fixture
def all_up(peers: Peers) -> Iterator[Peers]:
    """All three run, with their keys."""
    yield peers
    for name in NAMES:
        if name not in peers.running:
            peers.launch(name)
    if not all(usable(peers, name) for name in NAMES):
        for name in ("one", "two"):
            if not usable(peers, name):
                cold_start(peers, name)
        until(lambda: all(usable(peers, name) for name in NAMES))


def cold_start(peers: Peers, name: str, members: tuple[str, ...] = ("acme-pharma", "cygnus-bio")) -> None:
    """The ceremony, as members have it."""
    request = peers.request(name)
    assert [peers.give(name, peers.answered(name, member, request)) for member in members] == [1, 0]


def test_a_broker_that_was_killed_has_its_key_from_its_peers_who_write_it_down(all_up: Peers) -> None:
    before = all_up.keys("one")
    all_up.kill("one")
    all_up.launch("one")
    until(lambda: usable(all_up, "one"))
    assert all_up.keys("one") == before
    for name in ("two", "three"):
        entries = read_database(all_up.folder(name) / "state/broker.sqlite", lambda step: step.entries(0, step.size()))
        released = [entry for entry in map(parse_entry, entries) if entry.kind == "release"]
        assert [e.body["subject"]["role"] for e in released if e.body["resource"] == "acme-pharma/vault-broker/one"]


def test_nothing_in_its_folder_opens_what_it_keeps(all_up: Peers) -> None:
    assert not (all_up.folder("one") / "keys/kek").exists()
    raw = b"".join(path.read_bytes() for path in all_up.folder("one").rglob("*") if path.is_file())
    assert VALUE not in raw


def test_rotation_while_it_serves(all_up: Peers) -> None:
    before = all_up.keys("two")
    all_up.settle("two", PEERS % 2)
    until(lambda: len(all_up.keys("two")) == 1 and not all_up.keys("two") & before)
    assert all_up.released("two") == VALUE
    all_up.kill("two")
    all_up.launch("two")
    until(lambda: usable(all_up, "two"))


def test_one_peer_of_two_is_too_few(all_up: Peers) -> None:
    all_up.kill("one", "three")
    all_up.launch("one")
    until(lambda: "three" in all_up.problem("one"))
    with pytest.raises(BrokerUnavailable, match="locked"):
        all_up.released("one")
    all_up.launch("three")
    # `three` has lost its own key with its process and needs `one`: of the three, two are locked and one is not
    until(lambda: "locked" in all_up.problem("one"))
    cold_start(all_up, "one")
    until(lambda: usable(all_up, "three"))
    assert all_up.released("one") == VALUE


def test_all_are_killed_and_members_start_them(all_up: Peers) -> None:
    before = {name: all_up.keys(name) for name in NAMES}
    all_up.kill(*NAMES)
    for name in NAMES:
        all_up.launch(name)
    for name in NAMES:
        until(lambda name=name: "locked" in all_up.problem(name))  # type: ignore[misc]
        with pytest.raises(BrokerUnavailable, match="locked"):
            all_up.released(name)
    cold_start(all_up, "one", ("acme-pharma", "borealis-hospital"))
    assert all_up.released("one") == VALUE
    cold_start(all_up, "two", ("borealis-hospital", "cygnus-bio"))
    until(lambda: usable(all_up, "three"))
    assert {name: all_up.keys(name) for name in NAMES} == before
    with pytest.raises(BrokerRefused, match="has its keys"):
        all_up.request("one")


def test_the_ceremony_by_its_commands(all_up: Peers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str | Path) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        code = ended.value.code
        return (code if isinstance(code, int) else 1), json.loads(capsys.readouterr().out)

    all_up.kill(*NAMES)
    for name in NAMES:
        all_up.launch(name)
    for name in NAMES:
        until(lambda name=name: "locked" in all_up.problem(name))  # type: ignore[misc]
    root, request = tmp_path / "root.json", tmp_path / "request.json"
    root.write_bytes(all_up.world.root)
    there = ("--broker", f"one={all_up.entry('one').url}", "--root", root)
    status, told = run("broker", "cold-start", "export", request, *there)
    assert (status, told["needed"], told["custodians"]) == (0, 2, sorted(OWNERS.values()))
    for member, keys in all_up.custodians.items():
        write_user_keys(tmp_path / member, keys)
    answer = ("broker", "cold-start", "answer", request)
    for member in ("acme-pharma", "cygnus-bio"):
        words = (tmp_path / f"{member}.jws", "--root", root, "--member", member, "--keys", tmp_path / member)
        assert run(*answer, *words)[0] == 0
        assert run(*answer, *words)[0] == 2  # the file is there already
    other = ("--member", "acme-pharma", "--keys", tmp_path / "cygnus-bio")
    assert run(*answer, tmp_path / "other.jws", "--root", root, *other)[0] == 1  # not the key that it was sealed to
    spoilt = json.loads(request.read_text())
    spoilt["request"]["nonce"] = "A" * 43 + "="
    (tmp_path / "spoilt.json").write_text(json.dumps(spoilt))
    spoiling = ("broker", "cold-start", "answer", tmp_path / "spoilt.json", tmp_path / "none.jws", "--root", root)
    assert run(*spoiling, "--member", "acme-pharma", "--keys", tmp_path / "acme-pharma")[0] == 1
    assert not (tmp_path / "none.jws").exists()
    assert run("broker", "cold-start", "join", tmp_path / "acme-pharma.jws", *there) == (1, {"needed": 1})
    assert run("broker", "cold-start", "join", tmp_path / "cygnus-bio.jws", *there) == (0, {"needed": 0})
    assert all_up.released("one") == VALUE
    assert run("broker", "cold-start", "export", tmp_path / "again.json", *there)[0] == 1


def test_fewer_custodians_than_the_threshold_and_one_who_answers_twice(all_up: Peers) -> None:
    all_up.kill(*NAMES)
    for name in NAMES:
        all_up.launch(name)
    until(lambda: "locked" in all_up.problem("one"))
    request = all_up.request("one")
    for _ in range(3):
        assert all_up.give("one", all_up.answered("one", "acme-pharma", request)) == 1
    with pytest.raises(BrokerUnavailable, match="locked"):
        all_up.released("one")


def test_an_answer_is_worth_nothing_to_another_boot_or_broker(all_up: Peers) -> None:
    all_up.kill(*NAMES)
    for name in NAMES:
        all_up.launch(name)
    for name in NAMES:
        until(lambda name=name: "locked" in all_up.problem(name))  # type: ignore[misc]
    old = all_up.answered("one", "acme-pharma", all_up.request("one"))
    with pytest.raises(BrokerRefused, match="another request"):
        all_up.give("two", old)
    all_up.kill("one")
    all_up.launch("one")
    until(lambda: "locked" in all_up.problem("one"))
    with pytest.raises(BrokerRefused, match="another request"):
        all_up.give("one", old)


def test_custodians_answer_nobody_but_the_enrolled_broker(all_up: Peers) -> None:
    all_up.kill(*NAMES)
    for name in NAMES:
        all_up.launch(name, **({"measurement": bytes(48)} if name == "one" else {}))
    until(lambda: "locked" in all_up.problem("two"))
    until(lambda: "measurement" in all_up.problem("one"))  # its peers refuse it too
    request = all_up.request("one")
    with pytest.raises(Refused, match="measurement"):
        all_up.answered("one", "acme-pharma", request)
    honest = all_up.request("two")
    for changed in (
        request.model_copy(update={"evidence": honest.evidence, "init_data": honest.init_data}),  # relayed
        honest.model_copy(update={"keys": request.keys}),  # the host's own keys
        honest.model_copy(update={"recovery": request.recovery}),
        honest.model_copy(update={"version": honest.version + 1}),
    ):
        with pytest.raises(Refused):
            all_up.answered("two", "acme-pharma", changed)
    all_up.kill("one")


def test_shares_that_a_host_made_up_give_no_key(all_up: Peers) -> None:
    """A host that deals a key of its own to the custodians, with a store under it, is told apart by the peers' word."""
    all_up.kill(*NAMES)
    folder, vault = all_up.folder("one") / "state/kek", "acme-pharma/vault-broker/one"
    kept = folder.with_name("kek-as-it-was")
    shutil.copytree(folder, kept)
    keys = derive_keys(vault, bytes(32))
    packed = keys.volume + keys.seal + keys.root
    made = deal_recovery("one", vault, 1, packed, all_up.charter(), os.urandom)
    (folder / "recovery.json").write_bytes(canonical_bytes(made.model_dump(mode="json")))
    StoreFile(folder / "store", vault, keys).write(Store(9, {"kek-000001": bytes(32)}))
    for name in NAMES:
        all_up.launch(name)
    for name in NAMES:
        until(lambda name=name: "locked" in all_up.problem(name))  # type: ignore[misc]
    request = all_up.request("one")
    all_up.give("one", all_up.answered("one", "acme-pharma", request))
    with pytest.raises(SealwrightError, match="never made"):
        all_up.give("one", all_up.answered("one", "cygnus-bio", request))
    with pytest.raises(BrokerUnavailable, match="locked"):
        all_up.released("one")
    all_up.kill("one")
    shutil.rmtree(folder)
    kept.rename(folder)


def test_another_member_s_broker_and_another_guest_get_no_share(all_up: Peers) -> None:
    vault = "acme-pharma/vault-broker/one"
    host = all_up.world.attester(
        "broker",
        "two",
        measurement=MEASUREMENT,
        host_data=sha256(all_up.world.init_data["broker/two"]).digest(),
    )
    for attester, init in (
        (host, all_up.world.init_data["broker/two"]),
        (all_up.world.attester("site", "north"), all_up.world.init_data["site/north"]),
    ):
        session = GuestSession(attester, init)
        try:
            session.attest()
            with pytest.raises(BrokerRefused, match="vault"):
                open_vault(session, lambda _, __: Path("/nowhere"), vault=vault)
            with pytest.raises(BrokerRefused):
                session.release_from("three", vault)
        finally:
            session.close()


def test_a_peer_that_gives_a_wrong_share_is_found_out(all_up: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker's own code, over an honest platform, with one of its two peers that lies."""
    import attestation.broker_session as sessions

    real = sessions.BrokerSession.open_vault

    def lying(self: Any, vault: str, epoch: int) -> tuple[bytes, Any]:
        share, state = real(self, vault, epoch)
        return (bytes([*share[:-1], share[-1] ^ 1]) if self.name == "three" else share), state

    monkeypatch.setattr(sessions.BrokerSession, "open_vault", lying)
    all_up.kill("one")
    context = LaunchContext(
        measurement=MEASUREMENT,
        host_data=sha256(all_up.world.init_data["broker/one"]).digest(),
        report_id=os.urandom(32),
    )
    vendor, chip = all_up.world.vendor, all_up.world.chips[Product.MILAN]

    class Here:
        def evidence(self, report_data: bytes) -> SnpEvidence:
            return SnpEvidence(report_for(chip, context, report_data), chip.certificate_table(vendor))

    kek = PeerKek(all_up.folder("one") / "state/kek", all_up.world.init_data["broker/one"], Here)
    try:
        with pytest.raises(BrokerRefused, match="1 brokers gave a good share"):
            kek.tend(all_up.charter())
        assert "three: the share is not the one" in kek.problem
        assert kek.locked
        with pytest.raises(BrokerUnavailable, match="locked"):
            kek.wrap(bytes(32), b"")
    finally:
        kek.close()


def test_an_auditor_follows_all_of_it(all_up: Peers, tmp_path: Path) -> None:
    for name in NAMES:
        folder = tmp_path / name
        read_database(all_up.folder(name) / "state/broker.sqlite", partial(export_bundle, folder=folder))
        report = verify_audit(folder, all_up.world.root)
        assert report.ok, report.problems
        assert report.kinds.get("cold-start", 0) > 0 or name == "three"
