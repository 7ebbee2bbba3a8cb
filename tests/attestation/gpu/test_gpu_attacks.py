"""Each check of GPU evidence against validly made evidence that breaks that one rule, and the check must name it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import nvidia_world as world
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from test_gpu_group import GROUP_ATTACKS

from attestation.endorsements.nvidia_revocation import RevocationData
from attestation.evidence.gpu.document import GpuEvidence
from attestation.evidence.gpu.opaque import OpaqueField
from attestation.evidence.gpu.spdm import MeasurementBlock
from attestation.verifier.appraisal import Appraisal
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.profile import BROKER_GPU, SHOW_GPU, SWITCHABLE
from attestation.verifier.gpu.verify import ALWAYS, ORDERED, verify_gpu

EXPECTED = GpuExpected(nonce=world.NONCE)


@pytest.fixture(scope="module")
def device() -> world.Device:
    return world.make_device()


def good_data(device: world.Device) -> RevocationData:
    return RevocationData(ocsp=world.device_ocsp(device) + world.rim_ocsp())


def appraise(device: world.Device, evidence: GpuEvidence | None = None, **options: Any) -> Appraisal:
    profile = options.pop("profile", None) or world.profile()
    settings = {"rims": world.good_rims(), "revocation": good_data(device), "at": world.AT, **options}
    expected = settings.pop("expected", EXPECTED)
    return verify_gpu(evidence or world.evidence(device), profile, expected, **settings)


def names(appraisal: Appraisal) -> set[str]:
    return {failure.check for failure in appraisal.failures}


def test_good_evidence_is_affirmed_in_every_claim(device: world.Device) -> None:
    appraisal = appraise(device)
    assert (appraisal.status, appraisal.failures, appraisal.not_judged) == ("affirming", (), ())
    judged = {name: value for name, value in appraisal.vector.items() if value}
    assert judged == {"instance-identity": 2, "configuration": 2, "executables": 3, "hardware": 2}
    claims = appraisal.claims
    assert (claims["product"], claims["driver_version"], claims["vbios_version"]) == (
        "GH100",
        world.DRIVER,
        world.VBIOS,
    )
    assert claims["platform"] == "unknown", "only NVIDIA's own root makes it hardware"
    assert claims["measurements"]["0"] == world.digest("m0").hex()


def test_nothing_at_hand_is_said_and_not_affirmed(device: world.Device) -> None:
    appraisal = appraise(device, rims=(), revocation=None, expected=GpuExpected())
    assert appraisal.status == "affirming"
    assert set(appraisal.not_judged) == {
        "gpu-freshness",
        "gpu-revocation",
        "gpu-devtools",
        "gpu-driver-measurements",
        "gpu-vbios-measurements",
        "rim-revocation",
    }
    assert {name for name, value in appraisal.vector.items() if value} == {"hardware"}


def test_a_brokers_profile_refuses_what_was_not_judged(device: world.Device) -> None:
    rules = BROKER_GPU.model_dump(by_alias=True, include={"name", "required", "revocation"})
    broker = world.profile(**{name.replace("_", "-"): value for name, value in rules.items()})
    assert appraise(device, profile=broker).status == "affirming"
    refused = appraise(device, profile=broker, rims=())
    assert refused.status == "contraindicated"
    assert {"gpu-devtools", "gpu-driver-measurements", "gpu-vbios-measurements", "rim-revocation"} <= names(refused)


# --- one attack for each check of one device -------------------------------------------------------------

Attack = Callable[[world.Device], Appraisal]


def _chain(device: world.Device, *certificates: Any) -> GpuEvidence:
    report = world.sign_report(device, world.gpu_fields())
    pem = b"".join(one.public_bytes(world.Encoding.PEM) for one in certificates)
    return GpuEvidence(report=report, chain=pem)


def too_short_a_chain(device: world.Device) -> Appraisal:
    return appraise(device, _chain(device, *device.chain[1:]))


def missing_link(device: world.Device) -> Appraisal:
    return appraise(device, _chain(device, *device.chain[:2], *device.chain[3:]))


def self_made_leaf(device: world.Device) -> Appraisal:
    rules = world.CertificateRules(
        ca=False,
        sign=False,
        extensions=[
            (world.device_info("GH100", device.ueid), False),
            (world.dice(world.key("rom GH100 0"), world.FWID), False),
        ],
    )
    leaf = device.chain[0]
    forged = world.certify(leaf.subject, world.key("mine").public_key(), leaf.issuer, world.key("mine"), rules)
    report = world.sign_report(device, world.gpu_fields(), signing_key="mine")
    pem = b"".join(one.public_bytes(world.Encoding.PEM) for one in (forged, *device.chain[1:]))
    return appraise(device, GpuEvidence(report=report, chain=pem))


def leaf_that_is_a_ca(device: world.Device) -> Appraisal:
    other = world.make_device(number=1, leaf=world.CertificateRules(ca=True, sign=True))
    return appraise(other)


def path_length_broken(device: world.Device) -> Appraisal:
    other = world.make_device(number=2, provisioner=world.CertificateRules(path_length=0))
    return appraise(other)


def foreign_root(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(**{"device-roots": ["00" * 32]}))


def another_chip_in_the_certificate(device: world.Device) -> Appraisal:
    return appraise(world.make_device(number=3, info="GH200"))


def another_boot_rom_in_dice(device: world.Device) -> Appraisal:
    return appraise(world.make_device(number=4, dice_key="another rom"))


def another_key_signed(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, signing_key="mine"))


def changed_on_the_way(device: world.Device) -> Appraisal:
    good = world.evidence(device)
    report = bytearray(good.report)
    report[report.index(world.digest("device nonce")[:32])] ^= 1
    return appraise(device, GpuEvidence(report=bytes(report), chain=good.chain))


def ended_certificate(device: world.Device) -> Appraisal:
    rules = world.CertificateRules(ca=False, sign=False, until=datetime(2025, 1, 1, tzinfo=UTC))
    return appraise(world.make_device(number=5, leaf=rules))


def revoked_device(device: world.Device) -> Appraisal:
    data = world.device_ocsp(device, status=ocsp.OCSPCertStatus.REVOKED) + world.rim_ocsp()
    return appraise(device, revocation=RevocationData(ocsp=data))


def unknown_chip(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(devices={"models": ["LS_10"]}))


def denied_device(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(devices={"deny": [device.ueid]}))


def unexpected_device(device: world.Device) -> Appraisal:
    return appraise(device, expected=GpuExpected(nonce=world.NONCE, devices=frozenset({"00" * 8})))


def replayed_report(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, nonce=bytes(32)))


def other_firmware(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, world.gpu_fields(FWID=world.digest("older"))))


def no_firmware_digest(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, world.gpu_fields(FWID=None)))


def document_says_otherwise(device: world.Device) -> Appraisal:
    lying = world.evidence(device).model_copy(update={"driver_version": "999.0", "arch": "BLACKWELL"})
    return appraise(device, lying)


def unknown_opaque_field(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, (*world.gpu_fields(), OpaqueField(99, b"\x01"))))


def undecodable_state(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, world.gpu_fields(NVDEC0_STATUS=b"\x12")))


def newer_opaque_layout(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, world.gpu_fields(OPAQUE_DATA_VERSION=b"\x09\0")))


def raw_measurement(device: world.Device) -> Appraisal:
    blocks = list(world.measurements())
    blocks[50] = MeasurementBlock(51, 0x81, blocks[50].value)
    return appraise(device, world.evidence(device, blocks=tuple(blocks)))


def old_driver(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(versions={"minimum-driver": "600.10.3"}))


def unlisted_vbios(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(versions={"vbioses": ["97.00.A1.00.04"]}))


def old_vbios(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(versions={"minimum-vbios": "97.00.B0.00.00"}))


def other_board(device: world.Device) -> Appraisal:
    return appraise(device, profile=world.profile(devices={"boards": ["T100/0002/890"]}))


def links_in_the_clear(device: world.Device) -> Appraisal:
    fields = world.gpu_fields(FEATURE_FLAG=b"\x02\0", PROTECTED_PCIE_STATUS=b"\xaa", SWITCH_PDI=b"")
    return appraise(device, world.evidence(device, fields), profile=world.profile(devices={"modes": ["spt"]}))


def mode_and_bus_disagree(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device, world.gpu_fields(PROTECTED_PCIE_STATUS=b"\xaa")))


def unlocked_switch(device: world.Device) -> Appraisal:
    switch = world.make_device("LS_10")
    fields = world.switch_fields(switch, (), LOCK_SWITCH_STATUS=b"\0\0")
    return appraise(switch, world.evidence(switch, fields))


def developer_tools(device: world.Device) -> Appraisal:
    return appraise(device, world.evidence(device).model_copy(update={"devtools_mode": True}))


def _changed_block(device: world.Device, index: int) -> Appraisal:
    blocks = list(world.measurements())
    blocks[index] = MeasurementBlock(index + 1, 1, world.digest("changed"))
    return appraise(device, world.evidence(device, blocks=tuple(blocks)))


def modified_driver(device: world.Device) -> Appraisal:
    return _changed_block(device, 25)


def modified_vbios(device: world.Device) -> Appraisal:
    return _changed_block(device, 3)


def _driver_rim(device: world.Device, rim: bytes) -> Appraisal:
    return appraise(device, rims=(rim, world.vbios_rim()))


def manifests_overlap(device: world.Device) -> Appraisal:
    return _driver_rim(device, world.make_rim(world.DRIVER, {11: (world.digest("m11"),), **world.DRIVER_GOLDEN}))


def golden_value_changed(device: world.Device) -> Appraisal:
    was, now = (world.digest(text).hex().encode() for text in ("m25", "changed"))
    assert world.driver_rim().count(was) == 1
    return _driver_rim(device, world.driver_rim().replace(was, now))


def foreign_rim_signer(device: world.Device) -> Appraisal:
    signer, *rest = world.rim_signer()
    forged = world.certify(
        signer.subject,
        world.key("rim signer").public_key(),
        signer.issuer,
        world.key("mine"),
        world.CertificateRules(ca=False, sign=False),
    )
    return _driver_rim(device, world.make_rim(world.DRIVER, world.DRIVER_GOLDEN, chain=(forged, *rest)))


def rim_signer_is_a_ca(device: world.Device) -> Appraisal:
    signer, *rest = world.rim_signer()
    ca = world.certify(signer.subject, world.key("rim signer").public_key(), signer.issuer, world.key("rim l3"))
    return _driver_rim(device, world.make_rim(world.DRIVER, world.DRIVER_GOLDEN, chain=(ca, *rest)))


def rim_under_another_root(device: world.Device) -> Appraisal:
    chain = world.rim_signer(root_key="another rim root")
    return _driver_rim(device, world.make_rim(world.DRIVER, world.DRIVER_GOLDEN, chain=chain))


def rim_signer_ended(device: world.Device) -> Appraisal:
    chain = world.rim_signer(until=datetime(2025, 8, 24, tzinfo=UTC))
    return _driver_rim(device, world.make_rim(world.DRIVER, world.DRIVER_GOLDEN, chain=chain))


def rim_signer_revoked(device: world.Device) -> Appraisal:
    chain = world.rim_signer()
    crl = world.revocation_list(chain[1], "rim l3", chain[:1])
    data = RevocationData(ocsp=world.device_ocsp(device) + world.rim_ocsp(), crls=(crl,))
    return appraise(device, revocation=data)


ATTACKS: list[tuple[str, Attack]] = [
    ("gpu-chain-length", too_short_a_chain),
    ("gpu-chain-signatures", missing_link),
    ("gpu-chain-signatures", self_made_leaf),
    ("gpu-chain-profile", leaf_that_is_a_ca),
    ("gpu-chain-profile", path_length_broken),
    ("gpu-trusted-root", foreign_root),
    ("gpu-device-identity", another_chip_in_the_certificate),
    ("gpu-device-identity", another_boot_rom_in_dice),
    ("gpu-report-signature", another_key_signed),
    ("gpu-report-signature", changed_on_the_way),
    ("gpu-certificate-validity", ended_certificate),
    ("gpu-revocation", revoked_device),
    ("gpu-model", unknown_chip),
    ("gpu-device", denied_device),
    ("gpu-device", unexpected_device),
    ("gpu-freshness", replayed_report),
    ("gpu-fwid", other_firmware),
    ("gpu-fwid", no_firmware_digest),
    ("gpu-document", document_says_otherwise),
    ("gpu-opaque-data", unknown_opaque_field),
    ("gpu-opaque-data", undecodable_state),
    ("gpu-opaque-data", newer_opaque_layout),
    ("gpu-measurement-format", raw_measurement),
    ("gpu-driver-version", old_driver),
    ("gpu-vbios-version", unlisted_vbios),
    ("gpu-vbios-version", old_vbios),
    ("gpu-board", other_board),
    ("gpu-mode", links_in_the_clear),
    ("gpu-mode", mode_and_bus_disagree),
    ("gpu-switch-lock", unlocked_switch),
    ("gpu-devtools", developer_tools),
    ("gpu-driver-measurements", modified_driver),
    ("gpu-vbios-measurements", modified_vbios),
    ("rim-overlap", manifests_overlap),
    ("rim-signature", golden_value_changed),
    ("rim-chain-signatures", foreign_rim_signer),
    ("rim-chain-profile", rim_signer_is_a_ca),
    ("rim-trusted-root", rim_under_another_root),
    ("rim-validity", rim_signer_ended),
    ("rim-revocation", rim_signer_revoked),
]

# Checks that one attack may fail beside its own, because they see the same change from another side.
_BESIDE = {
    too_short_a_chain: {"gpu-chain-profile", "gpu-device-identity", "gpu-report-signature", "gpu-model", "gpu-fwid"},
    missing_link: {"gpu-chain-length"},
    another_chip_in_the_certificate: {"gpu-model"},
    another_boot_rom_in_dice: {"gpu-fwid"},
    modified_driver: {"gpu-devtools"},
    modified_vbios: {"gpu-devtools"},
}


@pytest.mark.parametrize(("check", "attack"), ATTACKS, ids=[attack.__name__ for _, attack in ATTACKS])
def test_the_attack_is_refused_for_its_reason(device: world.Device, check: str, attack: Attack) -> None:
    appraisal = attack(device)
    assert appraisal.status == "contraindicated"
    assert check in names(appraisal)
    assert names(appraisal) <= {check} | _BESIDE.get(attack, set())
    assert all(failure.value and failure.expected for failure in appraisal.failures)
    if check in ALWAYS:
        assert appraisal.vector["hardware"] == 99


def test_every_check_has_an_attack_and_a_rule() -> None:
    assert {one.name for one in ORDERED} == {check for check, _ in ATTACKS} | set(GROUP_ATTACKS)
    for one in ORDERED:
        assert "Attack:" in one.rule, one.name
    assert set(SWITCHABLE) == {one.name for one in ORDERED} - ALWAYS


# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "attack"),
    [pair for pair in ATTACKS if pair[0] in SWITCHABLE and pair[1] not in _BESIDE],
    ids=[f"{attack.__name__}" for check, attack in ATTACKS if check in SWITCHABLE and attack not in _BESIDE],
)
def test_each_switchable_check_can_be_a_warning_or_off(
    monkeypatch: pytest.MonkeyPatch, device: world.Device, check: str, attack: Attack
) -> None:
    make = world.profile
    for severity, status in (("warn", "warning"), ("allow", "affirming")):
        monkeypatch.setattr(
            world, "profile", lambda severity=severity, **changes: make(**changes, checks={check: severity})
        )
        assert attack(device).status == status


def test_an_authenticity_check_has_no_line(device: world.Device) -> None:
    for name in ALWAYS:
        with pytest.raises(ValueError, match="Extra inputs"):
            world.profile(checks={name: "allow"})


def test_nvdec_measurement_counts_only_while_nvdec_is_enabled(device: world.Device) -> None:
    blocks = list(world.measurements())
    blocks[35] = MeasurementBlock(36, 1, bytes(48))
    enabled = appraise(device, world.evidence(device, blocks=tuple(blocks)))
    assert "gpu-driver-measurements" in names(enabled)
    disabled = world.evidence(device, world.gpu_fields(NVDEC0_STATUS=b"\x55"), blocks=tuple(blocks))
    assert appraise(device, disabled).status == "affirming"


def test_of_two_manifests_for_one_version_the_fitting_one_counts(device: world.Device) -> None:
    other = world.make_rim(world.VBIOS, {index: (world.digest("other board"),) for index in range(12)})
    rims = (other, *world.good_rims())
    assert appraise(device, rims=rims).status == "affirming"
    assert "gpu-vbios-measurements" in names(appraise(device, rims=(other, world.driver_rim())))


def test_manifests_for_others_do_no_harm_and_no_good(device: world.Device) -> None:
    others = (
        world.make_rim("600.10.03", world.DRIVER_GOLDEN),
        world.make_rim(world.VBIOS, world.VBIOS_GOLDEN, product="GH200"),
    )
    appraisal = appraise(device, rims=others)
    assert appraisal.status == "affirming"
    assert {"gpu-driver-measurements", "gpu-vbios-measurements", "gpu-devtools"} <= set(appraisal.not_judged)
    assert appraisal.vector["executables"] == 0


def test_a_missing_measurement_is_a_mismatch(device: world.Device) -> None:
    few = world.evidence(device, blocks=world.measurements(30))
    assert "gpu-driver-measurements" in names(appraise(device, few))


def test_only_the_tests_own_roots_are_trusted_where_they_are_named(device: world.Device) -> None:
    appraisal = appraise(device, profile=SHOW_GPU)
    assert {"gpu-trusted-root", "rim-trusted-root"} <= names(appraisal)


def test_another_curve_is_no_key_for_reports(device: world.Device) -> None:
    leaf = device.chain[0]
    small = ec.generate_private_key(ec.SECP256R1())
    rules = world.CertificateRules(ca=False, sign=False)
    forged = world.certify(leaf.subject, small.public_key(), leaf.issuer, world.key("rom GH100 0"), rules)
    appraisal = appraise(device, _chain(device, forged, *device.chain[1:]))
    assert {"gpu-chain-profile", "gpu-report-signature"} <= names(appraisal)


def test_times_and_nonces_must_be_whole(device: world.Device) -> None:
    evidence = world.evidence(device)
    with pytest.raises(ValueError, match="time zone"):
        verify_gpu(evidence, SHOW_GPU, EXPECTED, at=datetime(2026, 1, 1))  # noqa: DTZ001 (that is the point)
    with pytest.raises(ValueError, match="32 bytes"):
        verify_gpu(evidence, SHOW_GPU, GpuExpected(nonce=b"short"), at=world.AT)
