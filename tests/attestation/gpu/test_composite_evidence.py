"""A CPU's report with its devices: bound to one session, and the worst of them decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha384

import nvidia_world as world
import pytest

from attestation.binding import device_nonce, kbs_device_nonce, kbs_report_data, report_data
from attestation.canonical import digests
from attestation.endorsements.chain import Endorsements
from attestation.endorsements.nvidia_endorsements import GpuEndorsements, parse_gpu_endorsements
from attestation.endorsements.nvidia_revocation import RevocationData
from attestation.endorsements.roots import RootPin
from attestation.errors import MalformedEvidence, MalformedProfile
from attestation.evidence.gpu.document import write_gpu_document
from attestation.evidence.report import Product
from attestation.verifier.appraisal_policy import load_appraisal_policy
from attestation.verifier.check import Expected
from attestation.verifier.composite import CompositeAppraisal, Devices, read_additional_evidence, verify_composite
from attestation.verifier.gpu.profile import BROKER_GPU
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml
from attestation.verifier.profile import BROKER, SHOW, Profile, with_virtual_roots
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor
from policies.errors import Unusable

KEY = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": "AA", "y": "BB"}
SESSION = "bm9uY2U="
DEVICE_NONCE = kbs_device_nonce(SESSION, KEY)
KEYS = {"kem": b"k", "sign": b"s", "tls": b"t"}
RIMS = GpuEndorsements(rims=world.good_rims())


def additional(*devices: world.Device, nonce: bytes = DEVICE_NONCE) -> str:
    evidence = tuple(world.evidence(device, nonce=nonce) for device in devices)
    return json.dumps({"nvidia": json.loads(write_gpu_document(evidence))})


def devices_of(text: str, endorsements: GpuEndorsements = RIMS) -> Devices | None:
    evidence = read_additional_evidence(text)
    return Devices(evidence, world.profile(), DEVICE_NONCE, endorsements) if evidence else None


def test_report_data_binds_nonce_key_and_additional_evidence() -> None:
    canonical = (
        b'{"additional-evidence":"","nonce":"bm9uY2U=","tee-pubkey":'
        b'{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"AA","y":"BB"}}'
    )
    assert kbs_report_data(SESSION, KEY, "") == sha384(canonical).digest() + bytes(16)
    assert sha384(canonical.replace(b'"additional-evidence":"",', b"")).digest()[:32] == DEVICE_NONCE
    assert len({kbs_report_data(*one) for one in ((SESSION, KEY, ""), ("x", KEY, ""), (SESSION, KEY, "x"))}) == 3
    assert len({kbs_device_nonce(*one) for one in ((SESSION, KEY), ("x", KEY), (SESSION, {}))}) == 3


def test_our_own_protocol_binds_devices_to_the_session_too() -> None:
    session = ("one", "a" * 64, 1, bytes(32))
    others = (("two", "a" * 64, 1, bytes(32)), ("one", "a" * 64, 2, bytes(32)), ("one", "a" * 64, 1, b"\1" * 32))
    nonces = {device_nonce(*one, digests(KEYS)) for one in (session, *others)}
    nonces.add(device_nonce(*session, digests({**KEYS, "tls": b"other"})))
    assert len(nonces) == 5
    assert {len(nonce) for nonce in nonces} == {32}
    assert len({report_data(*session, KEYS, text) for text in ("", "x", "y")}) == 3
    assert report_data(*session, KEYS, "") == report_data(*session, KEYS), "without devices as it always was"


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"tdx": {}}', '{"nvidia": []}', '{"nvidia": {}, "more": 1}', '{"nvidia": "{"}', '"\ud800"'],
)
def test_other_additional_evidence_is_refused(text: str) -> None:
    with pytest.raises(MalformedEvidence):
        read_additional_evidence(text)


def test_additional_evidence_may_be_text_inside() -> None:
    (device,) = [world.make_device()]
    inner = write_gpu_document((world.evidence(device),)).decode()
    assert len(read_additional_evidence(json.dumps({"nvidia": inner}))) == 1
    assert read_additional_evidence("") == ()


@pytest.fixture(scope="module")
def milan(virtual_vendor: Vendor) -> tuple[Profile, Endorsements]:
    authority = virtual_vendor.authority(Product.MILAN)
    profile = with_virtual_roots(SHOW, [RootPin(Product.MILAN, authority.ark_spki_sha256, virtual=True)])
    return profile, Endorsements(intermediates=(authority.ask, authority.ark))


def test_cpu_and_gpu_in_one_session(virtual_chips: Mapping[Product, Chip], milan: tuple[Profile, Endorsements]) -> None:
    chip, (profile, endorsements) = virtual_chips[Product.MILAN], milan
    runtime = additional(world.make_device())
    now = datetime.now(UTC)

    def appraise(bound: str, claimed: str) -> CompositeAppraisal:
        report = sign_report(chip, report_data=kbs_report_data(SESSION, KEY, bound))
        mine = Endorsements(chip.vcek, endorsements.intermediates)
        expected = Expected(report_data=kbs_report_data(SESSION, KEY, claimed))
        return verify_composite(report, mine, profile, expected, devices_of(claimed), now)

    good = appraise(runtime, runtime)
    assert good.status == "affirming", good.parts
    assert {name: part.status for name, part in good.parts.items()} == {"cpu0": "affirming", "gpu0": "affirming"}
    swapped = appraise(runtime, additional(world.make_device(number=9)))
    assert swapped.status == "contraindicated", "another GPU than the one the CPU vouched for"
    assert [failure.check for failure in swapped.cpu.failures] == ["freshness"]
    assert swapped.devices["gpu0"].status == "affirming", "good by itself, but not this machine's"
    left_out = appraise(runtime, "")
    assert left_out.status == "contraindicated", "the GPU left out"


def test_the_devices_are_judged_where_the_cpu_is_not_believed() -> None:
    devices = devices_of(additional(world.make_device()))
    composite = verify_composite(bytes(1184), Endorsements(), SHOW, Expected(), devices, world.AT)
    assert composite.status == "none", "the worst of both"
    assert composite.parts["gpu0"].status == "affirming"


def test_a_device_of_another_session_is_refused() -> None:
    devices = devices_of(additional(world.make_device(), nonce=bytes(32)), GpuEndorsements())
    composite = verify_composite(bytes(1184), Endorsements(), SHOW, Expected(), devices, world.AT)
    assert [failure.check for failure in composite.parts["gpu0"].failures] == ["gpu-freshness"]


def test_only_manifests_that_the_policy_lists_count() -> None:
    devices = devices_of(additional(world.make_device()))
    assert devices is not None
    listed = world.profile(manifests=["00" * 32])
    strict = Devices(devices.evidence, listed, devices.nonce, devices.endorsements)
    composite = verify_composite(bytes(1184), Endorsements(), SHOW, Expected(), strict, world.AT)
    assert "gpu-driver-measurements" in composite.parts["gpu0"].not_judged


def test_too_many_devices_are_refused_before_anything_is_verified() -> None:
    text = additional(*(world.make_device(number=number) for number in range(3)))
    assert len(read_additional_evidence(text, most=3)) == 3
    with pytest.raises(MalformedEvidence, match="3 devices, more than 2"):
        read_additional_evidence(text, most=2)


def test_endorsements_have_one_form() -> None:
    whole = GpuEndorsements((b"rim",), RevocationData(ocsp=(b"o",), crls=(b"c", b"d")))
    assert parse_gpu_endorsements(whole.to_bytes()) == whole
    for bad in (b"{}", b"[]", whole.to_bytes() + b" ", b'{"crls":[1],"ocsp":[],"rims":[]}'):
        with pytest.raises(Unusable):
            parse_gpu_endorsements(bad)
    with pytest.raises(Unusable, match="more than"):
        GpuEndorsements((bytes(1 << 20),)).to_bytes()


def test_a_policy_without_a_section_for_devices_accepts_none() -> None:
    assert load_appraisal_policy(None).gpu is None
    assert load_appraisal_policy('name = "ours"').gpu is None


def test_a_policy_about_devices_alone_keeps_the_rules_for_cpus() -> None:
    policy = load_appraisal_policy('[gpu.versions]\nminimum-driver = "570.1"\n')
    assert policy.cpu == BROKER
    assert policy.gpu is not None
    assert policy.gpu.required == BROKER_GPU.required
    assert policy.gpu.versions.minimum_driver == "570.1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gpu = 1", "must be a table"),
        ("[gpu]", "any driver would do"),
        ("[gpu.checks]\ngpu-trusted-root = 'allow'", "gpu-trusted-root"),
        ("[gpu.versions]\ndrivers = [1]", "drivers"),
    ],
)
def test_a_section_that_says_too_little_or_too_much_is_refused(text: str, why: str) -> None:
    with pytest.raises(MalformedProfile, match=why):
        load_appraisal_policy(text)


def test_the_section_that_is_printed_is_read_back() -> None:
    text = gpu_profile_to_toml(BROKER_GPU, section="gpu").replace("# minimum-driver =", "minimum-driver =")
    policy = load_appraisal_policy(text)
    assert policy.gpu is not None
    assert policy.gpu.model_copy(update={"versions": BROKER_GPU.versions}) == BROKER_GPU
    assert policy.gpu.versions.minimum_driver == "570.86.15"
