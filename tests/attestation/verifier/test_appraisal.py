"""The verdict as a whole: what is not judged is never affirmed, and a broker's profile refuses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from attestation.endorsements.chain import Endorsements
from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.errors import MalformedEvidence
from attestation.evidence.report import Product
from attestation.verifier import (
    BROKER,
    SHOW,
    Appraisal,
    Expected,
    Profile,
    load_profile,
    verify_snp,
    with_virtual_roots,
)
from attestation.verifier.appraisal import VECTOR_NAMES
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor

NOW = datetime.now(UTC)
MEASUREMENT, HOST_DATA, REPORT_DATA = b"\x01" * 48, b"\x02" * 32, b"\x03" * 64
ALL = Expected(REPORT_DATA, frozenset({MEASUREMENT, b"\x09" * 48}), HOST_DATA)


class Guest:
    """An honest guest on a virtual Genoa chip."""

    def __init__(self, vendor: Vendor, chip: Chip) -> None:
        self.chip = chip
        self.pins = [RootPin(product, one.ark_spki_sha256, virtual=True) for product, one in vendor.authorities.items()]
        self.endorsements = from_certificate_table(chip.certificate_table(vendor))
        self.report = sign_report(chip, report_data=REPORT_DATA, measurement=MEASUREMENT, host_data=HOST_DATA)

    def profile(self, profile: Profile = SHOW) -> Profile:
        return with_virtual_roots(profile, self.pins)

    def appraise(self, profile: Profile, expected: Expected, endorsements: Endorsements | None = None) -> Appraisal:
        return verify_snp(self.report, endorsements or self.endorsements, self.profile(profile), expected, NOW)


@pytest.fixture(scope="module")
def guest(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> Guest:
    return Guest(virtual_vendor, virtual_chips[Product.GENOA])


def test_what_a_broker_needs_is_affirmed_claim_by_claim(guest: Guest) -> None:
    appraisal = guest.appraise(BROKER, ALL)
    assert appraisal.affirming, appraisal.failures
    assert dict(appraisal.vector) == {
        "instance-identity": 2,
        "configuration": 2,
        "executables": 3,
        "file-system": 0,
        "hardware": 2,
        "runtime-opaque": 2,
        "storage-opaque": 0,
        "sourced-data": 0,
    }


@pytest.mark.parametrize(
    ("missing", "expected", "claim"),
    [
        ("freshness", Expected(None, ALL.measurements, HOST_DATA), "instance-identity"),
        ("measurement", Expected(REPORT_DATA, None, HOST_DATA), "executables"),
        ("init-data", Expected(REPORT_DATA, ALL.measurements, None), "configuration"),
    ],
)
def test_what_is_not_judged_is_refused_by_a_broker_and_unasserted_by_show(
    guest: Guest, missing: str, expected: Expected, claim: str
) -> None:
    refused = guest.appraise(BROKER, expected)
    assert [(failure.check, failure.value) for failure in refused.failures] == [(missing, "not judged")]
    assert refused.status == "contraindicated"
    assert refused.vector[claim] == 96
    shown = guest.appraise(SHOW, expected)
    assert shown.affirming
    assert missing in shown.not_judged
    assert shown.vector[claim] in {0, 3}  # 3: a configuration without known weakness, but not a known one


def test_revocation_is_demanded_by_a_broker(guest: Guest) -> None:
    without = Endorsements(guest.endorsements.vek, guest.endorsements.intermediates)
    assert [failure.check for failure in guest.appraise(BROKER, ALL, without).failures] == ["revocation"]
    shown = guest.appraise(SHOW, ALL, without)
    assert shown.affirming
    assert shown.vector["instance-identity"] == 0


def test_a_demanded_check_cannot_be_allowed_away(guest: Guest) -> None:
    lax = load_profile('required = ["measurement"]\n[checks]\nmeasurement = "allow"')
    assert [failure.check for failure in guest.appraise(lax, ALL).failures] == ["measurement"]


def test_reference_values_may_stand_in_the_profile(guest: Guest) -> None:
    text = f"""
    [reference]
    measurements = ["{MEASUREMENT.hex()}"]
    host-data = ["{HOST_DATA.hex()}"]
    report-data = "{REPORT_DATA.hex()}"
    """
    appraisal = guest.appraise(load_profile(text), Expected())
    assert appraisal.affirming
    assert not {"measurement", "init-data", "freshness"} & set(appraisal.not_judged)
    other = Expected(bytes(64), frozenset({bytes(48)}), bytes(32))
    both = guest.appraise(load_profile(text), other)
    assert {failure.check for failure in both.failures} == {"measurement", "init-data", "freshness"}
    wrong = guest.appraise(load_profile(text.replace("01" * 48, "05" * 48)), Expected())
    assert [failure.check for failure in wrong.failures] == ["measurement"]


def test_an_empty_set_of_reference_values_lets_nothing_in(guest: Guest) -> None:
    appraisal = guest.appraise(SHOW, Expected(measurements=frozenset()))
    assert [failure.check for failure in appraisal.failures] == ["measurement"]


def test_chips_are_let_in_and_kept_out(guest: Guest) -> None:
    found, other = guest.chip.chip_id, b"\x07" * 64
    assert guest.appraise(SHOW, Expected(chips=frozenset({found, other}))).affirming
    assert not guest.appraise(SHOW, Expected(chips=frozenset())).affirming
    allow = load_profile(f'[chips]\nallow = ["{other.hex()}"]')
    deny = load_profile(f'[chips]\ndeny = ["{found.hex()}"]')
    assert [failure.check for failure in guest.appraise(allow, Expected()).failures] == ["chip"]
    assert [failure.check for failure in guest.appraise(deny, Expected()).failures] == ["chip"]


def test_no_key_is_no_verdict(guest: Guest) -> None:
    appraisal = verify_snp(guest.report, Endorsements(), guest.profile(), ALL, NOW)
    assert appraisal.status == "none"
    assert set(appraisal.vector.values()) == {0}
    assert {failure.check for failure in appraisal.failures} == {"report-signature", "vek-profile"}


def test_the_json_is_the_contracts(guest: Guest) -> None:
    printed = json.loads(json.dumps(guest.appraise(SHOW, Expected()).to_json()))
    assert set(printed) == {"status", "failures", "not-judged", "claims", "trustworthiness-vector"}
    assert tuple(printed["trustworthiness-vector"]) == VECTOR_NAMES
    claims = printed["claims"]
    assert claims["platform"] == "virtual"
    assert claims["measurement"] == MEASUREMENT.hex()
    assert claims["cpuid"] == {"family": 0x19, "model": 0x11, "stepping": 1}
    assert claims["reported_tcb"] == {"bootloader": 10, "tee": 0, "snp": 23, "microcode": 84}
    assert claims["policy"]["debug"] is False


@pytest.mark.parametrize("size", [0, 1183, 1185])
def test_what_is_no_report_is_unusable(guest: Guest, size: int) -> None:
    with pytest.raises(MalformedEvidence):
        verify_snp(bytes(size), guest.endorsements, SHOW, ALL, NOW)


def test_nonsense_of_the_right_size_is_refused_and_decoded(guest: Guest) -> None:
    for filler in (b"\x00", b"\xff", b"A"):
        appraisal = verify_snp(filler * 1184, guest.endorsements, guest.profile(), ALL, NOW)
        assert appraisal.status == "contraindicated"
        json.dumps(appraisal.to_json())


def test_a_time_without_a_zone_is_no_time(guest: Guest) -> None:
    with pytest.raises(ValueError, match="time zone"):
        verify_snp(guest.report, guest.endorsements, SHOW, ALL, datetime(2026, 1, 1))  # noqa: DTZ001  # on purpose


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"committed_build": 39}, "provisional-firmware"),
        ({"cpuid_fam_id": 0x17, "cpuid_mod_id": 0x31}, "product"),
        ({"cpuid_mod_id": 0xA0}, None),  # Bergamo and Siena are certified by Genoa's root
        ({"key_info": 7 << 2}, "signing-key"),
        ({"vmpl": 0xFFFFFFFF}, "vmpl"),
    ],
)
def test_odd_but_signed_reports_are_judged(guest: Guest, fields: dict[str, int], check: str | None) -> None:
    report = sign_report(guest.chip, **fields)
    appraisal = verify_snp(report, guest.endorsements, guest.profile(), Expected(), NOW)
    assert [failure.check for failure in appraisal.failures] == ([] if check is None else [check])


def test_alias_check_is_asked_only_of_firmware_that_looks(guest: Guest) -> None:
    old = {"current_minor": 55, "current_build": 37, "committed_minor": 55, "committed_build": 37}
    report = sign_report(guest.chip, platform_info=0x05, **old)
    assert verify_snp(report, guest.endorsements, guest.profile(), Expected(), NOW).affirming
    strict = guest.profile(load_profile('[platform]\nalias-check = "set"'))
    refused = verify_snp(report, guest.endorsements, strict, Expected(), NOW)
    assert [failure.check for failure in refused.failures] == ["platform-alias-check"]
