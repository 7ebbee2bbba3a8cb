"""Guests with GPUs at a real broker, by both protocols: good devices are in the EAR, one bad one refuses the guest."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import nvidia_world as gpus
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from test_kbs_protocol import KbsClient, KbsGuest, TeeKey, unb64url

from appliance import node
from attestation.attester.boot import Boot
from attestation.attester.gpu import additional_evidence
from attestation.binding import device_nonce, kbs_device_nonce, report_data
from attestation.broker.appraisal import brief_ear
from attestation.canonical import canonical_bytes, digests
from attestation.client import BrokerClient, GuestSession
from attestation.ear import EarDocument
from attestation.ears import MAX_EAR
from attestation.endorsements.nvidia_endorsements import GpuEndorsements
from attestation.errors import AttesterUnavailable, BrokerRefused
from attestation.evidence.composite import MAX_ADDITIONAL, SnpEvidence
from attestation.evidence.report import Product
from attestation.identity import appraise_peer
from attestation.verifier.composite import Devices, verify_bound_devices
from attestation.verifier.gpu.profile import BROKER_GPU, GpuProfile
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment
from policies.errors import Refused, Unusable
from policies.init_data import parse_init_data, write_init_data

GPU_KEY = "borealis-hospital/key/gpu"
GPU_RULES = b"""package sealwright.release

import rego.v1

default allow := false

kbs := true

allow if count(reasons) == 0

reasons contains "the guest has no two attested GPUs" if count(gpus) != 2

reasons contains "a measurement is not the one that was reviewed" if {
	some gpu in gpus
	gpu["ear.veraison.annotated-evidence"].measurements["20"] != "%s"
}

gpus contains gpu if {
	some name, gpu in input.ear.submods
	startswith(name, "gpu")
	gpu["ear.status"] == "affirming"
}
""" % gpus.digest("m20").hex().encode()

Raw = Callable[..., Any]


def section(**changes: Any) -> str:
    """The charter's section on devices: the tests' own vendor, one driver, everything demanded."""
    own = gpus.profile(**changes)
    document = {
        **BROKER_GPU.model_dump(by_alias=True),
        "device-roots": own.device_roots,
        "rim-roots": own.rim_roots,
        "versions": {**own.versions.model_dump(by_alias=True), "drivers": [gpus.DRIVER]},
    }
    return gpu_profile_to_toml(GpuProfile.model_validate(document), section="gpu")


def put_endorsements(folder: Path, devices: tuple[gpus.Device, ...], moment: Any) -> None:
    """What the broker's operator fetches: manifests, and what the vendor says about revocation."""
    folder.mkdir()
    rules = {"since": moment - timedelta(hours=1), "until": moment + timedelta(days=1)}
    for number, raw in enumerate(gpus.good_rims()):
        (folder / f"{number}.swidtag").write_bytes(raw)
    for device in devices:
        chain, keys = device.chain, ("ica", "identity", "device root")
        for step in range(3):
            answer = gpus.ocsp_response(chain[step + 1], chain[step + 2], keys[step], gpus.OcspRules(**rules))
            (folder / f"{device.ueid}-{step}.ocsp").write_bytes(answer)
    chain, keys = gpus.rim_signer(), ("rim l3", "rim ca", "rim root")
    for step in range(3):
        answer = gpus.ocsp_response(chain[step], chain[step + 1], keys[step], gpus.OcspRules(**rules))
        (folder / f"rim{step}.ocsp").write_bytes(answer)


@pytest.fixture(scope="module")
def devices() -> tuple[gpus.Device, ...]:
    return gpus.make_device(number=0), gpus.make_device(number=1), gpus.make_device("LS_10", number=0)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_vendor: Vendor,
    virtual_chips: Mapping[Product, Chip],
    tools: Any,
    devices: tuple[gpus.Device, ...],
) -> Any:
    made = tools.found_world(tmp_path_factory.mktemp("gpus"), virtual_vendor, virtual_chips, ("one",))
    made.change(
        Changes(
            put={
                "policies/appraisal.toml": section().encode(),
                "members/borealis-hospital/release/key.gpu.rego": GPU_RULES,
            }
        )
    )
    enrol_site_with_gpus(made)
    put_endorsements(made.folder / "one/gpu", devices, datetime.now(UTC).replace(microsecond=0))
    return made


def enrol_site_with_gpus(made: Any) -> None:
    """A site whose init-data ask for the key."""
    north = parse_init_data(made.init_data["site/north"])
    raw = write_init_data(north.model_copy(update={"name": "gpus", "resources": {"model": GPU_KEY}}))
    made.init_data["site/gpus"] = raw
    place = Enrolment(
        role="site",
        name="gpus",
        member="borealis-hospital",
        image="site-image",
        init_data_sha256=sha256(raw).hexdigest(),
    )
    made.change(Changes(put=files_of([place])))


@pytest.fixture(scope="module", autouse=True)
def deposited(world: Any, broker: Any) -> None:
    client = BrokerClient(broker.entry, "virtual.trial")
    client.deposit(GPU_KEY, b"for two GPUs", world.member_keys["borealis-hospital"], charter_id=world.charter().id)
    client.close()


def answers(*devices: gpus.Device, nonce: bytes, **options: Any) -> str:
    """What the devices' collector sends for a nonce."""
    return additional_evidence(tuple(gpus.evidence(device, nonce=nonce, **options) for device in devices))


class GpuGuest:
    """A raw guest with devices at the broker's own protocol."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        charter = raw.world.charter()
        self.here = (raw.entry.name, charter.id, charter.version, raw.nonce)

    def nonce(self) -> bytes:
        return device_nonce(*self.here, digests(self.raw.keys()))

    def evidence(self, text: str) -> SnpEvidence:
        evidence: SnpEvidence = self.raw.attester.evidence(report_data(*self.here, self.raw.keys(), text))
        return evidence

    def refused(self, text: str, *, bound: str | None = None) -> str:
        """Why this is refused, `bound` being what the CPU vouches for."""
        return "; ".join(self.raw.refused(self.evidence(text if bound is None else bound), devices=text))


@pytest.fixture
def gpu_guest(raw_guests: Raw) -> Callable[[], GpuGuest]:
    return lambda: GpuGuest(raw_guests())


def claims_of(token: str) -> Any:
    return json.loads(unb64url(token.split(".")[1]))


def test_good_devices_are_in_the_ear_and_open_what_asks_for_them(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]
) -> None:
    guest = gpu_guest()
    text = answers(*devices[:2], nonce=guest.nonce())
    result = guest.raw.attest(guest.evidence(text), devices=text)
    shown, full = claims_of(result["ear"]), claims_of(result["full_ear"])
    assert sorted(full["submods"]) == sorted(shown["submods"]) == ["cpu0", "gpu0", "gpu1"]
    assert shown["submods"]["cpu0"] == full["submods"]["cpu0"]
    for name in ("gpu0", "gpu1"):
        claims = full["submods"][name]["ear.veraison.annotated-evidence"]
        assert claims["measurements"]["20"] == gpus.digest("m20").hex()
        assert claims["driver_version"] == gpus.DRIVER
        brief = shown["submods"][name]["ear.veraison.annotated-evidence"]
        assert brief["claims_sha256"] == sha256(canonical_bytes(claims)).hexdigest()
        assert (brief["ueid"], "measurements" in brief) == (claims["ueid"], False)
        assert shown["submods"][name]["ear.status"] == "affirming"
    body = json.dumps({"job": None, "resource": GPU_KEY}).encode()
    assert guest.raw.post("/v1/release", body)["resource"] == GPU_KEY


class TestDevices:
    """A guest's GPUs, as its session asks them."""

    __test__ = False
    seconds = 5.0

    def __init__(self, *devices: gpus.Device) -> None:
        self.devices = devices

    def evidence(self, nonce: bytes) -> str:
        return answers(*self.devices, nonce=nonce)


def test_a_guests_own_session_brings_them(world: Any, broker: Any, devices: tuple[gpus.Device, ...]) -> None:
    attester, init_data = world.attester("site", "north"), world.init_data["site/north"]
    guest = GuestSession(attester, init_data, devices=TestDevices(*devices[:2]))
    try:
        identity = guest.attest()
        peer = appraise_peer(
            load_pem_x509_certificates(identity.certificate_pem.encode())[0].public_bytes(Encoding.DER),
            world.charter(),
            datetime.now(UTC),
        )
        assert sorted(peer.ear.document.submods) == ["cpu0", "gpu0", "gpu1"]
        assert guest.release(GPU_KEY) == b"for two GPUs"
    finally:
        guest.close()


def test_a_guest_without_them_does_not_get_it(gpu_guest: Callable[[], GpuGuest], broker: Any) -> None:
    guest = gpu_guest()
    guest.raw.attest(guest.evidence(""))
    with pytest.raises(BrokerRefused, match="no two attested GPUs"):
        guest.raw.post("/v1/release", json.dumps({"job": None, "resource": GPU_KEY}).encode())


def test_gpus_and_the_switch_between_them(gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]) -> None:
    one, two, switch = devices
    guest = gpu_guest()
    nonce = guest.nonce()
    mode = {
        "FEATURE_FLAG": b"\2\0",
        "PROTECTED_PCIE_STATUS": b"\xaa",
        "SWITCH_PDI": gpus.linked_to([switch]),
    }
    linked = [gpus.evidence(device, gpus.gpu_fields(**mode), nonce=nonce) for device in (one, two)]
    through = gpus.evidence(switch, gpus.switch_fields(switch, [one, two]), nonce=nonce)
    text = additional_evidence((*linked, through))
    result = guest.raw.attest(guest.evidence(text), devices=text)
    assert sorted(claims_of(result["ear"])["submods"]) == ["cpu0", "gpu0", "gpu1", "switch0"]
    alone = gpu_guest()
    nonce = alone.nonce()
    without = additional_evidence(tuple(gpus.evidence(d, gpus.gpu_fields(**mode), nonce=nonce) for d in (one, two)))
    assert "gpu-topology" in alone.refused(without)


def test_one_bad_device_of_two_refuses_the_guest(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]
) -> None:
    guest = gpu_guest()
    good = gpus.evidence(devices[0], nonce=guest.nonce())
    wrong = tuple(
        replace(block, value=gpus.digest("another driver")) if block.index == 21 else block
        for block in gpus.measurements()
    )
    bad = gpus.evidence(devices[1], blocks=wrong, nonce=guest.nonce())
    why = guest.refused(additional_evidence((good, bad)))
    assert "gpu1: gpu-driver-measurements" in why
    assert "gpu1: gpu-devtools" in why
    assert "gpu0" not in why


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"DRIVER_VERSION": b"500.1.1\0"}, f"gpu0: gpu-driver-version: 500.1.1; expected {gpus.DRIVER}"),
        ({"FWID": bytes(48)}, "gpu0: gpu-fwid"),
    ],
)
def test_a_device_that_the_charter_does_not_let_in(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...], fields: dict[str, bytes], why: str
) -> None:
    guest = gpu_guest()
    bad = gpus.evidence(devices[0], gpus.gpu_fields(**fields), nonce=guest.nonce())
    assert why in guest.refused(additional_evidence((bad,)))


def test_a_device_of_which_the_vendor_says_nothing_is_refused(gpu_guest: Callable[[], GpuGuest]) -> None:
    guest = gpu_guest()
    unknown = gpus.make_device(number=7)
    assert "gpu0: gpu-revocation: not judged" in guest.refused(answers(unknown, nonce=guest.nonce()))


def test_devices_of_another_session(gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]) -> None:
    first, second = gpu_guest(), gpu_guest()
    text = answers(devices[0], nonce=first.nonce())
    why = second.refused(text)
    assert "gpu0: gpu-freshness" in why
    assert " freshness" not in why.replace("gpu-freshness", "")
    third = gpu_guest()
    mixed = (gpus.evidence(devices[0], nonce=third.nonce()), gpus.evidence(devices[1], nonce=first.nonce()))
    assert "gpu1: gpu-freshness" in third.refused(additional_evidence(mixed))


def test_devices_that_the_cpu_did_not_vouch_for(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]
) -> None:
    guest = gpu_guest()
    one, two = (gpus.evidence(device, nonce=guest.nonce()) for device in devices[:2])
    assert "freshness" in guest.refused(additional_evidence((two, one)), bound=additional_evidence((one, two)))
    guest = gpu_guest()
    text = answers(devices[0], nonce=guest.nonce())
    assert "freshness" in guest.refused(text, bound=""), "a device added on the way"
    guest = gpu_guest()
    text = answers(devices[0], nonce=guest.nonce())
    assert "freshness" in guest.refused("", bound=text), "a device left out on the way"


def test_one_device_twice(gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]) -> None:
    guest = gpu_guest()
    assert "gpu-distinct-devices" in guest.refused(answers(devices[0], devices[0], nonce=guest.nonce()))


def test_devices_without_a_cpu(gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]) -> None:
    guest = gpu_guest()
    text = answers(devices[0], nonce=guest.nonce())
    assert "the evidence cannot be used" in "; ".join(guest.raw.refused(SnpEvidence(b""), devices=text))
    report = gpus.evidence(devices[0], nonce=gpu_guest().nonce()).report
    assert "the evidence cannot be used" in "; ".join(gpu_guest().raw.refused(SnpEvidence(report), devices=""))


@pytest.mark.parametrize("text", ["x", "{}", '{"tdx":{}}', '{"nvidia":{"device_evidence_list":[]}}'])
def test_what_is_no_evidence_of_devices(gpu_guest: Callable[[], GpuGuest], text: str) -> None:
    assert "the evidence of further devices cannot be used" in gpu_guest().refused(text)


def test_too_many_devices_and_too_much_evidence(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...]
) -> None:
    guest = gpu_guest()
    many = gpus.evidence(devices[0], nonce=guest.nonce())
    entry = json.loads(additional_evidence((many,)))["nvidia"]["device_evidence_list"][0]
    small = {**entry, "certificate": entry["certificate"][:400]}
    text = json.dumps({"nvidia": {"device_evidence_list": [small] * 17}})
    assert "17 devices, more than 16" in guest.refused(text)
    with pytest.raises(Unusable, match="devices"):
        guest.raw.attest(guest.evidence(""), devices="x" * (MAX_ADDITIONAL + 1))


def test_a_charter_that_says_nothing_of_gpus_takes_none(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...], world: Any, broker: Any
) -> None:
    world.change(Changes(remove=frozenset({"policies/appraisal.toml"})))
    broker.process.send_signal(1)
    try:
        guest = gpu_guest()
        why = guest.refused(answers(devices[0], nonce=guest.nonce()))
        assert "has no section [gpu]" in why
    finally:
        world.change(Changes(put={"policies/appraisal.toml": section().encode()}))


def test_an_ear_of_a_whole_machine_still_travels(devices: tuple[gpus.Device, ...]) -> None:
    """Eight GPUs and four switches: the EAR that a credential carries stays within its bound."""
    judged = Devices((gpus.evidence(devices[0]),), gpus.profile(), gpus.NONCE, GpuEndorsements(gpus.good_rims()))
    found = verify_bound_devices(judged, gpus.AT)["gpu0"]
    part = {
        "ear.status": found.status,
        "ear.trustworthiness-vector": dict(found.vector),
        "ear.appraisal-policy-id": "policies/appraisal.toml",
        "ear.veraison.annotated-evidence": found.claims,
    }
    document = {
        "eat_profile": "urn:sealwright:ear:1",
        "iat": 0,
        "exp": 1,
        "iss": "one",
        "nonce": "n",
        "charter": {"id": "0" * 64, "version": 1},
        "platform": "virtual",
        "subject": {"role": "site", "name": "north", "member": "borealis", "image": "site-image"},
        "keys": {"tls": "0" * 64, "kem": "0" * 64, "sign": "0" * 64},
        "submods": {
            "cpu0": {**part, "ear.veraison.annotated-evidence": {"as long as a CPU's": "x" * 4096}},
            **{f"gpu{number}": part for number in range(8)},
            **{f"switch{number}": part for number in range(4)},
        },
    }
    shown = brief_ear(EarDocument.model_validate(document))
    size = len(base64.urlsafe_b64encode(canonical_bytes(shown.model_dump(mode="json", by_alias=True))))
    assert size < MAX_EAR


# --- stock guests ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kbs_guest(world: Any, broker: Any) -> Callable[[], KbsGuest]:
    def make() -> KbsGuest:
        client = KbsClient(broker.entry.url, broker.entry.issuer_certificate)
        attester = world.attester("site", "north")
        key = TeeKey(ec.generate_private_key(ec.SECP256R1()))
        guest = KbsGuest(client, attester, Product.MILAN, world.init_data["site/north"].decode(), key)
        guest.auth()
        return guest

    return make


def test_a_stock_guest_with_gpus(kbs_guest: Callable[[], KbsGuest], devices: tuple[gpus.Device, ...]) -> None:
    guest = kbs_guest()
    text = answers(*devices[:2], nonce=kbs_device_nonce(guest.nonce, guest.key.jwk()))
    status, answer = guest.attest(more=text)
    assert status == 200, answer
    claims = claims_of(answer["token"])
    assert sorted(claims["submods"]) == ["cpu0", "gpu0", "gpu1"]
    assert claims["submods"]["gpu1"]["ear.veraison.annotated-evidence"]["measurements"]["0"] == gpus.digest("m0").hex()
    runtime = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]
    assert runtime["additional-evidence-sha256"] == sha256(text.encode()).hexdigest()
    status, jwe, _ = guest.resource(GPU_KEY)
    assert status == 200, jwe
    assert guest.key.open(jwe) == b"for two GPUs"


def test_a_stock_guest_with_devices_of_another_session(
    kbs_guest: Callable[[], KbsGuest], devices: tuple[gpus.Device, ...]
) -> None:
    first, second = kbs_guest(), kbs_guest()
    text = answers(devices[0], nonce=kbs_device_nonce(first.nonce, first.key.jwk()))
    status, error = second.attest(more=text)
    assert status == 401
    assert "gpu0: gpu-freshness" in error["detail"]


def test_a_stock_guest_with_too_much(kbs_guest: Callable[[], KbsGuest]) -> None:
    status, error = kbs_guest().attest(more="x" * (MAX_ADDITIONAL + 1))
    assert (status, set(error)) == (401, {"type", "detail"})
    status, error = kbs_guest().attest(more='{"nvidia":{}}')
    assert status == 401
    assert "further devices" in error["detail"]


def test_the_ledger_keeps_it_and_an_auditor_comes_to_the_same(
    gpu_guest: Callable[[], GpuGuest], devices: tuple[gpus.Device, ...], broker: Any, world: Any, audited: Any
) -> None:
    guest = gpu_guest()
    text = answers(*devices[:2], nonce=guest.nonce())
    guest.raw.attest(guest.evidence(text), devices=text)
    guest.raw.post("/v1/release", json.dumps({"job": None, "resource": GPU_KEY}).encode())
    late = gpu_guest()
    late.refused(answers(*devices[:2], nonce=guest.nonce()))
    report = audited(broker, world)
    assert report.problems == ()
    outcomes = [decision.outcome for decision in report.decisions]
    assert "released" in outcomes
    assert any("gpu1: gpu-freshness" in outcome for outcome in outcomes)


# --- a guest's own order ---

SMI = """
import pathlib, sys
here = pathlib.Path(__file__).parent
told, words = here / "told", sys.argv[1:]
with told.open("a") as file:
    file.write(" ".join(("nvidia-smi", *words)) + "\\n")
broken = (here / "broken").read_text() if (here / "broken").exists() else ""
state = here / "state"
if words == ["conf-compute", "-f"]:
    print("CC status:", "OFF" if broken == "off" else "ON")
elif words == ["conf-compute", "-grs"]:
    ready = state.exists() or broken == "ready at once"
    print("Confidential Compute GPUs Ready state:", "ready" if ready else "not-ready")
elif words == ["conf-compute", "-srs", "1"]:
    state.touch() if broken != "never ready" else None
    print("Successfully set Confidential Compute GPUs Ready state to Ready")
elif words == ["conf-compute", "-srs", "0"]:
    state.unlink()
else:
    sys.exit(9)
"""
DAEMON = """
import pathlib, sys
with (pathlib.Path(__file__).parent / "told").open("a") as file:
    file.write(" ".join(("nvidia-persistenced", *sys.argv[1:])) + "\\n")
"""


@dataclass(frozen=True, slots=True)
class GpuBoot(Boot):
    """A guest with two GPUs, whose driver's programs lie below `guest`; the processor is the virtual one."""

    consortium: Any
    cards: tuple[gpus.Device, ...]

    def attester(self) -> Any:
        return self.consortium.attester("site", "gpus")

    def devices(self) -> Any:
        asked = TestDevices(*self.cards)

        class Asked:
            seconds = asked.seconds

            def evidence(_, nonce: bytes) -> str:
                with (self.guest / "usr/bin/told").open("a") as file:
                    file.write("evidence\n")
                return asked.evidence(nonce)

        return Asked()


@pytest.fixture
def gpu_boot(world: Any, devices: tuple[gpus.Device, ...], tmp_path: Path) -> GpuBoot:
    programs = tmp_path / "usr/bin"
    programs.mkdir(parents=True)
    for name, text in (("nvidia-smi", SMI), ("nvidia-persistenced", DAEMON)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    return GpuBoot(tmp_path, {}, world.init_data["site/gpus"], "virtual", None, {}, world, devices[:2])


def run_node(boot: GpuBoot, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the guest's node with a service that ends at once; what happened, in order."""
    told = boot.guest / "usr/bin/told"

    def say(event: str, **fields: Any) -> None:
        with told.open("a") as file:
            file.write(f"{event}\n")

    def service(init: Any, boot: Any, lease: Any, keys: Mapping[str, bytes], stop: Any) -> None:
        say("service", keys=keys)
        assert keys == {"model": b"for two GPUs"}

    monkeypatch.setattr(node, "say", say)
    monkeypatch.setitem(node.SERVICES, "site", service)
    try:
        assert node._run(boot, threading.Event()) == 0
    finally:
        lines = told.read_text().splitlines()
    return lines


def test_gpus_work_only_after_all_evidence_was_judged_and_keys_were_released(
    broker: Any, gpu_boot: GpuBoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run_node(gpu_boot, monkeypatch)
    assert [line for line in lines if line != "renewed"] == [
        "nvidia-persistenced --uvm-persistence-mode",
        "nvidia-smi conf-compute -f",
        "nvidia-smi conf-compute -grs",
        "attesting",
        "evidence",
        "attested",
        "released",
        "nvidia-smi conf-compute -srs 1",
        "nvidia-smi conf-compute -grs",
        "gpus work",
        "service",
        "nvidia-smi conf-compute -srs 0",
        "nvidia-smi conf-compute -grs",
        "stopped",
    ]


@pytest.mark.parametrize(
    ("broken", "said", "last"),
    [
        ("off", "confidential mode is OFF", "nvidia-smi conf-compute -f"),
        ("ready at once", "take work before they were attested", "nvidia-smi conf-compute -grs"),
        ("never ready", "did not become ready", "nvidia-smi conf-compute -grs"),
    ],
)
def test_gpus_in_another_state_get_nothing_to_work_on(
    broker: Any, gpu_boot: GpuBoot, monkeypatch: pytest.MonkeyPatch, broken: str, said: str, last: str
) -> None:
    (gpu_boot.guest / "usr/bin/broken").write_text(broken)
    with pytest.raises(Refused, match=said):
        run_node(gpu_boot, monkeypatch)
    lines = (gpu_boot.guest / "usr/bin/told").read_text().splitlines()
    assert lines[-1] == last
    assert "service" not in lines
    assert ("attested" in lines) == (broken == "never ready")


def test_gpus_of_a_refused_guest_stay_without_work(
    broker: Any, gpu_boot: GpuBoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two GPUs is not admitted: neither key nor work."""
    unknown = replace(gpu_boot, cards=(gpu_boot.cards[0], gpus.make_device(number=7)))
    with pytest.raises(Refused):
        run_node(unknown, monkeypatch)
    lines = (gpu_boot.guest / "usr/bin/told").read_text().splitlines()
    assert "evidence" in lines
    assert not {"released", "service", "nvidia-smi conf-compute -srs 1"} & set(lines)


@pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes needs root")
def test_what_is_no_gpu_is_no_node_to_work_with(gpu_boot: GpuBoot, tmp_path: Path) -> None:
    found = gpu_boot.gpu_session()
    assert found is not None
    session = replace(found, nodes=tmp_path)
    with pytest.raises(AttesterUnavailable, match="no device node of a GPU"):
        session.work_nodes()
    for number, name in enumerate(("nvidia1", "nvidia0", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")):
        os.mknod(tmp_path / name, 0o666 | stat.S_IFCHR, os.makedev(1, 3 + number))
    with pytest.raises(AttesterUnavailable, match="no device node nvidiactl"):
        session.work_nodes()
    (tmp_path / "nvidiactl").write_bytes(b"")
    with pytest.raises(AttesterUnavailable, match="no device node nvidiactl"):
        session.work_nodes()
    (tmp_path / "nvidiactl").unlink()
    os.mknod(tmp_path / "nvidiactl", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert [path.name for path in session.work_nodes()] == ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"]


def test_a_driver_that_is_silent_or_unclear_ends_the_guest(gpu_boot: GpuBoot) -> None:
    session = gpu_boot.gpu_session()
    assert session is not None
    smi = gpu_boot.guest / "usr/bin/nvidia-smi"
    for text, said in (
        ("import sys; sys.exit('no devices were found')", "status 1: no devices were found"),
        ("print('CC status: ON\\nCC status: OFF')", "does not say it once and clearly"),
        ("print('CC status: ONE TWO')", "does not say it once and clearly"),
    ):
        smi.write_text(f"#!{sys.executable}\n{text}\n")
        with pytest.raises(AttesterUnavailable, match=said):
            session.begin(seconds=0.1)
    smi.write_text(f"#!{sys.executable}\nprint('Confidential Compute GPUs Ready state: almost')\n")
    with pytest.raises(AttesterUnavailable, match="'almost'"):
        session.is_ready()
    smi.unlink()
    with pytest.raises(AttesterUnavailable, match="cannot be started"):
        session.begin(seconds=0.1)
    assert Boot(gpu_boot.guest, {}, b"", "hardware", None, {}).gpu_session() is None
