"""The attacks: each plays an adversary of the threat model with real processes, keys and bytes, and must be refused.

An attack returns who refused it and every reason; one that gets through raises AttackSucceeded, and the demonstration
fails.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.demo.guests import Start, honest_start, last_refusal, start_otherwise
from appliance.demo.setting import BROKER, BROKERS, IMAGE, OWNER, SERVER, Setting
from appliance.processes import Processes
from attestation.binding import NONCE_SIZE, report_data
from attestation.canonical import b64, unb64
from attestation.connection import BrokerClient
from attestation.errors import BrokerRefused
from attestation.evidence.composite import SnpEvidence
from attestation.hybrid import HybridPrivateKey
from attestation.messages import Call, sign_proof
from attestation.virtual.chip import Chip
from attestation.virtual.launch import LaunchSettings, launch, read_init_data, read_measured
from attestation.virtual.processor import report_for
from attestation.virtual.vendor import Vendor
from fl.environments.kit import current_charter, open_kit
from fl.environments.user_client import UserClient
from fl.jobs.bundle import Bundle, make_bundle
from fl.transport.memory import SealedMemory
from policies.charter import path_of
from policies.errors import Refused
from policies.init_data import InitData, parse_init_data, write_init_data
from policies.kits import INIT_DATA

REFUSAL_SECONDS: Final = 30.0
CONTACT_SECONDS: Final = 10.0
SITE: Final = "borealis-site"
DEBUG_POLICY: Final = 0x30000 | 1 << 19


class AttackSucceeded(Exception):
    """An attack was not refused: the demonstration has found a hole."""


@dataclass(frozen=True)
class Repelled:
    """A refused attack: who refused it, with every reason."""

    attack: str
    refused_by: str
    reasons: tuple[str, ...]


def changed_image(title: str, setting: Setting, processes: Processes) -> Repelled:
    """A site's host boots an image that differs from the approved one by one byte of its archive."""
    image = setting.folder / "attacks/image"
    shutil.copytree(setting.image, image, dirs_exist_ok=True)
    archive = bytearray((image / "initrd").read_bytes())
    place = archive.index(b"the guest's serial console")
    archive[place] ^= 0x20
    (image / "initrd").write_bytes(archive)
    start = replace(honest_start(setting, SITE), image=image, id_block=False)
    return _boot(title, setting, processes, start)


def foreign_charter(title: str, setting: Setting, processes: Processes) -> Repelled:
    """A host boots the approved image with init-data that names another charter.

    The guest itself turns away from brokers of another charter; so a program of the host's sends the evidence as well.
    """
    document = _init_data(setting, SITE).model_copy(update={"charter": "0" * 64})
    booted = _boot_with(title, setting, processes, document)
    client = _client(setting)
    try:
        host = _impostor(setting, write_init_data(document))
        session = host.open(client)
        sent = _attest(title, host, client, session, host.evidence(session, host.keys()), host.keys())
    finally:
        client.close()
    return Repelled(title, f"the guest and {sent.refused_by}", (*sent.reasons, *booted.reasons))


def another_place(title: str, setting: Setting, processes: Processes) -> Repelled:
    """A site's host boots the approved image with init-data that claims the server's place."""
    at = setting.broker().url.removeprefix("https://")
    document = _init_data(setting, SERVER).model_copy(update={"listen": at})
    return _boot_with(title, setting, processes, document)


def debug_guest(title: str, setting: Setting, processes: Processes) -> Repelled:
    """A host starts the approved guest so that it may read its memory."""
    start = replace(honest_start(setting, SITE), policy=DEBUG_POLICY, id_block=False)
    return _boot(title, setting, processes, start)


def replayed_evidence(title: str, setting: Setting, _: Processes) -> Repelled:
    """Evidence that was good in an earlier session is sent in a new one."""
    client = _client(setting)
    try:
        guest = _impostor(setting)
        first = guest.open(client)
        old = guest.evidence(first, guest.keys())
        second = guest.open(client)
        return _attest(title, guest, client, second, old, guest.keys())
    finally:
        client.close()


def swapped_key(title: str, setting: Setting, _: Processes) -> Repelled:
    """Somebody between guest and broker puts a key of its own beside the guest's evidence."""
    client = _client(setting)
    try:
        guest = _impostor(setting)
        session = guest.open(client)
        evidence = guest.evidence(session, guest.keys())
        thief = _impostor(setting)
        return _attest(title, thief, client, session, evidence, thief.keys())
    finally:
        client.close()


def one_signature(title: str, setting: Setting, _: Processes) -> Repelled:
    """One member alone publishes a charter that approves another image."""
    reference, folder = setting.charter().image(IMAGE), setting.folder / "attacks"
    if reference is None:
        raise AttackSucceeded(f"the charter has no image {IMAGE} to replace")
    other, proposal = folder / "image.json", folder / "alone.json"
    other.write_bytes(reference.model_copy(update={"svn": reference.svn + 1}).to_bytes())
    words = ("--put", f"images/{IMAGE}.json={other}", "--out", proposal)
    setting.seal("charter", "propose", setting.charter_folder, *words)
    setting.seal("charter", "sign", proposal, "--key", setting.member_key(OWNER), "--yes")
    try:
        setting.seal("charter", "publish", proposal, "--to", setting.charter_folder)
    except Refused as refusal:
        return Repelled(title, "charter", refusal.reasons)
    raise AttackSucceeded("a charter that one member signed was published")


@dataclass(frozen=True)
class Attack:
    """An attack with its title; calling it plays it."""

    title: str
    play: Callable[[str, Setting, Processes], Repelled]

    def __call__(self, setting: Setting, processes: Processes) -> Repelled:
        return self.play(self.title, setting, processes)


ATTACKS: Final[tuple[Attack, ...]] = (
    Attack("a site's image differs by one byte", changed_image),
    Attack("init-data names another charter", foreign_charter),
    Attack("a site asks for the server's place", another_place),
    Attack("evidence is replayed from an earlier session", replayed_evidence),
    Attack("another key is put beside evidence", swapped_key),
    Attack("a charter has one signature where two are needed", one_signature),
    Attack("a guest may be debugged by its host", debug_guest),
)


def changed_bundle(bundle: Bundle, first_model: Callable[[], SealedMemory]) -> Attack:
    """One bit of the training script is changed after approval.

    The submitter's own program does not stop it: it was shown a charter that somebody wrote an approval into.
    """

    def play(title: str, setting: Setting, _: Processes) -> Repelled:
        altered, kit = _with_changed_bit(bundle, "train.py"), open_kit(setting.kit)
        with current_charter(kit, timeout=CONTACT_SECONDS) as current, first_model() as model:
            approved = next(one for one in current.charter.bundles() if one.bundle == bundle.digest)
            approval = approved.model_copy(update={"bundle": altered.digest})
            forged = replace(current.charter, documents={**current.charter.documents, path_of(approval): approval})
            with UserClient.connected(kit, forged, current.at) as client:
                try:
                    client.submit(altered, model, roster=None, recipients=[kit.user])
                except Refused as refusal:
                    return Repelled(title, SERVER, refusal.reasons)
        raise AttackSucceeded("a changed bundle was accepted")

    return Attack("a bundle is changed by one bit after its approval", play)


def _boot_with(title: str, setting: Setting, processes: Processes, document: InitData) -> Repelled:
    path = setting.folder / "attacks" / f"{_slug(title)}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(write_init_data(document))
    return _boot(title, setting, processes, replace(honest_start(setting, SITE), init_data=path))


def _boot(title: str, setting: Setting, processes: Processes, start: Start) -> Repelled:
    """Boot a guest that must be refused."""
    name = f"attack-{_slug(title)}"
    start_otherwise(processes, setting, name, start)
    log = processes.log_of(name)
    status = processes.finish(name, within=REFUSAL_SECONDS, what="it should have been refused")
    reasons = last_refusal(log)
    if status != 1 or not reasons:
        raise AttackSucceeded(f"{title}: the guest ended with status {status} and was not refused (see {log})")
    return _told_by_brokers(title, reasons)


def _told_by_brokers(title: str, reasons: tuple[str, ...]) -> Repelled:
    """What a guest was told by several brokers, each reason once, and by whom."""
    told: dict[str, list[str]] = {}
    for reason in reasons:
        broker, colon, rest = reason.partition(": ")
        if colon and broker in BROKERS:
            told.setdefault(rest, []).append(broker)
    if not told:
        return Repelled(title, BROKER, reasons)
    brokers = [broker for broker in BROKERS if any(broker in named for named in told.values())]
    return Repelled(title, ", ".join(brokers), tuple(told))


def _init_data(setting: Setting, guest: str) -> InitData:
    return parse_init_data((setting.guest_kit(guest) / INIT_DATA).read_bytes())


def _client(setting: Setting) -> BrokerClient:
    return BrokerClient(setting.broker(), setting.charter().consortium.trust_domain)


def _slug(title: str) -> str:
    return "-".join("".join(letter for letter in title if letter.isalnum() or letter == " ").split())[:50]


def _impostor(setting: Setting, init_data: bytes | None = None) -> Impostor:
    """A program at a site's host, which owns the site's chip; `init_data`: other than the site's."""
    own = read_init_data(setting.guest_kit(SITE) / INIT_DATA)
    chip, vendor = setting.processor(SITE)
    return Impostor(BROKER, chip, vendor, setting.image, own if init_data is None else init_data, "EPYC-Milan")


class Impostor:
    """A program on a host that owns a chip, knows the protocol, and speaks to a broker as it likes."""

    def __init__(self, broker: str, chip: Chip, vendor: Vendor, image: Path, init_data: bytes, vcpu_model: str) -> None:
        """`image` is what its chip says that it launched."""
        self._broker = broker
        self._chip, self._vendor = chip, vendor
        self._init_data = init_data
        settings = LaunchSettings(vcpu_model=vcpu_model)
        self._context = launch(read_measured(image), settings, self._init_data, os.urandom(32))
        self._kem, self._tls = HybridPrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
        self._sign = Ed25519PrivateKey.generate()
        self._nonce = b64(os.urandom(NONCE_SIZE))

    def keys(self) -> dict[str, bytes]:
        spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        return {
            "kem": self._kem.public_bytes(),
            "sign": self._sign.public_key().public_bytes(*spki),
            "tls": self._tls.public_key().public_bytes(*spki),
        }

    def open(self, client: BrokerClient) -> Mapping[str, Any]:
        """Open a session; the broker's answer holds its id and nonce."""
        body = json.dumps({"nonce": self._nonce}).encode()
        return {"own": self._nonce, **client.answer("POST", "/v1/sessions", body, nonce=self._nonce).result}

    def evidence(self, session: Mapping[str, Any], keys: Mapping[str, bytes]) -> SnpEvidence:
        """A genuine report for this session and these keys."""
        charter = session["charter"]
        nonce = unb64(session["nonce"], where="nonce")
        data = report_data(self._broker, charter["id"], charter["version"], nonce, keys)
        table = self._chip.certificate_table(self._vendor)
        return SnpEvidence(report_for(self._chip, self._context, data), table)

    def attest(
        self, client: BrokerClient, session: Mapping[str, Any], evidence: SnpEvidence, keys: Mapping[str, bytes]
    ) -> None:
        """Send evidence and keys, with this program's own proof of possession."""
        message = {
            "evidence": {"certificates": b64(evidence.certificates), "report": b64(evidence.report)},
            "init_data": b64(self._init_data),
            "keys": {purpose: b64(key) for purpose, key in keys.items()},
            "session": session["session"],
        }
        body = json.dumps(message).encode()
        proof = sign_proof(Call(self._broker, "POST", "/v1/attest", body, session["session"], 1), self._sign)
        client.answer("POST", "/v1/attest", body, nonce=session["own"], proof=proof)


def _attest(
    attack: str,
    guest: Impostor,
    client: BrokerClient,
    session: Mapping[str, Any],
    evidence: SnpEvidence,
    keys: Mapping[str, bytes],
) -> Repelled:
    try:
        guest.attest(client, session, evidence, keys)
    except BrokerRefused as refusal:
        return Repelled(attack, BROKER, refusal.reasons)
    raise AttackSucceeded(f"{attack}: the broker affirmed it")


def _with_changed_bit(bundle: Bundle, path: str) -> Bundle:
    """The bundle with one bit of one file changed, and a manifest that fits it: another digest."""
    files = dict(bundle.files)
    files[path] = files[path][:-1] + bytes([files[path][-1] ^ 0x02])
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        return make_bundle(Path(folder), bundle.settings)
