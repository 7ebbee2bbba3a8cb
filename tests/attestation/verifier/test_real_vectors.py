"""Real and synthetic evidence, each with the outcome that its README gives, for the reason given there.

The vectors lie beside the project (`SEAL_VECTORS`, default `../shared/vectors`); without them these tests are skipped,
and test_attacks.py covers the same ground on the virtual platform.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attestation.endorsements.certificates import load_certificate, spki_sha256
from attestation.endorsements.chain import Endorsements, resolve_chain
from attestation.endorsements.roots import AMD_ROOTS
from attestation.endorsements.sources import from_certificate_table, from_files
from attestation.errors import MalformedEvidence
from attestation.evidence.azure_json import parse_azure_evidence
from attestation.evidence.guest_components_json import parse_guest_components
from attestation.evidence.report import encode_report, parse_report
from attestation.verifier import BROKER, SHOW, Appraisal, Expected, Profile, load_profile, verify_hcl, verify_snp

VECTORS = Path(os.environ.get("SEAL_VECTORS", Path(__file__).parents[4] / "shared" / "vectors"))
AT = datetime(2026, 11, 1, tzinfo=UTC)

pytestmark = pytest.mark.skipif(not (VECTORS / "amd-ca").is_dir(), reason=f"no vectors at {VECTORS}")

ACCEPT: dict[str, str] = {
    "milan-v2-virtee": "",
    "milan-v2-azure-provisional": '[checks]\nprovisional-firmware = "allow"',
    "milan-v3-azure": "",
    "milan-v3-dstack": "",
    "milan-v3-aci": "",
    "genoa-v3-siena-model-a0": "",
    "genoa-v3-azure": "",
    "genoa-v3-tsme": "",
    "turin-v5": "",
    "milan-v2-debug-policy": '[policy]\ndebug = "any"',
}
"""Real reports that are accepted, with the setting that the vector's note names, if any."""

REFUSE: dict[str, set[str]] = {
    "snp/milan-v2-debug-policy": {"policy-debug"},
    "snp/milan-v2-azure-provisional": {"provisional-firmware"},
    "negative/measurement-flip": {"report-signature"},
    "negative/signature-r-flip": {"report-signature"},
    "negative/signature-bigendian": {"report-signature"},
    "negative/wrong-chip-vcek": {"report-signature", "hardware-id", "certificate-tcb"},
    "negative/turin-ucode-flip": {"report-signature", "certificate-tcb"},
    "synthetic/debug-bit": {"policy-debug"},
    "synthetic/vmpl2": {"vmpl"},
    "synthetic/vcek-tcb-mismatch": {"certificate-tcb"},
    "synthetic/hwid-mismatch": {"hardware-id"},
    "synthetic/vcek-expired": {"certificate-validity"},
}


def appraise(
    folder: str, settings: str = "", *, expected: Expected | None = None, crls: tuple[Path, ...] = ()
) -> Appraisal:
    place = VECTORS / folder
    synthetic = folder.startswith("synthetic/")
    chain = VECTORS / ("synthetic/_roots" if synthetic else "amd-ca")
    profile = synthetic_profile(settings) if synthetic else load_profile(settings)
    endorsements = from_files(vek=place / "vcek.der", chain=chain, crls=crls)
    report = (place / "report.bin").read_bytes()
    return verify_snp(report, endorsements, profile, expected or Expected(), AT)


def synthetic_profile(settings: str = "") -> Profile:
    ark = load_certificate((VECTORS / "synthetic/_roots/ark.pem").read_bytes())
    return load_profile(f'{settings}\n[[roots]]\nproduct = "Genoa"\nspki-sha256 = "{spki_sha256(ark)}"')


def failed(appraisal: Appraisal) -> set[str]:
    return {failure.check for failure in appraisal.failures}


def test_every_report_of_the_set_has_its_outcome_here() -> None:
    folders = {f"{kind}/{one.name}" for kind in ("snp", "negative", "synthetic") for one in (VECTORS / kind).iterdir()}
    named = {f"snp/{name}" for name in ACCEPT} | set(REFUSE) | {"negative/truncated-1183", "synthetic/baseline"}
    assert {folder for folder in folders if (VECTORS / folder / "report.bin").exists()} == named


@pytest.mark.parametrize("name", ACCEPT)
def test_healthy_hardware_is_affirmed(name: str) -> None:
    appraisal = appraise(f"snp/{name}", ACCEPT[name])
    assert appraisal.failures == ()
    assert appraisal.affirming
    assert appraisal.claims["platform"] == "hardware"
    assert appraisal.claims["product"] == json.loads((VECTORS / "snp" / name / "meta.json").read_text())["product"]
    assert {"freshness", "measurement", "init-data", "revocation"} <= set(appraisal.not_judged)
    assert appraisal.vector["executables"] == appraisal.vector["instance-identity"] == 0
    assert appraisal.vector["hardware"] == appraisal.vector["runtime-opaque"] == 2


@pytest.mark.parametrize("folder", REFUSE)
def test_the_rest_is_refused_for_its_reason(folder: str) -> None:
    appraisal = appraise(folder)
    assert failed(appraisal) == REFUSE[folder]
    assert appraisal.status == "contraindicated"


def test_a_truncated_report_is_no_report() -> None:
    with pytest.raises(MalformedEvidence, match="1184"):
        appraise("negative/truncated-1183")


def test_the_synthetic_baseline_passes_the_strict_default_under_its_own_root() -> None:
    assert appraise("synthetic/baseline").affirming


def test_the_synthetic_root_is_not_amds() -> None:
    place = VECTORS / "synthetic/baseline"
    endorsements = from_files(vek=place / "vcek.der", chain=VECTORS / "synthetic/_roots")
    appraisal = verify_snp((place / "report.bin").read_bytes(), endorsements, SHOW, Expected(), AT)
    assert failed(appraisal) == {"trusted-root"}
    assert appraisal.vector["hardware"] == 99


def test_vmpl_2_passes_where_the_profile_lets_it() -> None:
    assert appraise("synthetic/vmpl2", "[report]\nvmpls = [0, 1, 2]").affirming


@pytest.mark.parametrize(("name", "outcome"), [("empty.crl", set()), ("ask-revoked.crl", {"revocation"})])
def test_revocation_lists_are_judged(name: str, outcome: set[str]) -> None:
    appraisal = appraise("synthetic/baseline", crls=(VECTORS / "synthetic/_crl" / name,))
    assert failed(appraisal) == outcome
    assert "revocation" not in appraisal.not_judged


def test_an_old_list_is_refused_where_the_profile_says_how_old() -> None:
    crls = (VECTORS / "synthetic/_crl/empty.crl",)
    assert failed(appraise("synthetic/baseline", "[revocation]\nmax-age-days = 30", crls=crls)) == {"revocation-list"}


def test_another_roots_list_says_nothing() -> None:
    appraisal = appraise("snp/genoa-v3-azure", crls=(VECTORS / "synthetic/_crl/ask-revoked.crl",))
    assert failed(appraisal) == {"revocation-list"}  # it bears the name of AMD's root, but not its signature
    assert appraise("snp/milan-v3-azure", crls=(VECTORS / "synthetic/_crl/ask-revoked.crl",)).affirming


def test_no_nonce_is_not_fresh() -> None:
    appraisal = appraise("snp/milan-v3-aci", expected=Expected(report_data=b"\x01".ljust(64, b"\0")))
    assert failed(appraisal) == {"freshness"}


def test_a_nonce_is_fresh() -> None:
    nonce = b"attest-test-fixture-2026".ljust(64, b"\0")
    appraisal = appraise("snp/milan-v3-dstack", expected=Expected(report_data=nonce))
    assert appraisal.affirming
    assert "freshness" not in appraisal.not_judged


def test_any_byte_of_a_real_report_flipped_is_not_affirmed() -> None:
    place = VECTORS / "snp/milan-v2-virtee"
    endorsements = from_files(vek=place / "vcek.der", chain=VECTORS / "amd-ca")
    report = (place / "report.bin").read_bytes()
    for offset in range(len(report)):
        raw = report[:offset] + bytes([report[offset] ^ 1]) + report[offset + 1 :]
        appraisal = verify_snp(raw, endorsements, SHOW, Expected(), AT)
        assert appraisal.status == "contraindicated", f"offset 0x{offset:03x}"


@pytest.mark.parametrize("name", ACCEPT)
def test_real_reports_survive_the_object(name: str) -> None:
    raw = (VECTORS / "snp" / name / "report.bin").read_bytes()
    assert encode_report(parse_report(raw)) == raw


def test_json_evidence_is_rebuilt_and_brings_its_key() -> None:
    place = VECTORS / "snp/genoa-v3-siena-model-a0"
    evidence = parse_guest_components(json.loads((place / "evidence.json").read_text()))
    assert evidence.report == (place / "report.bin").read_bytes()
    authorities = from_files(chain=VECTORS / "amd-ca").intermediates
    endorsements = from_certificate_table(evidence.certificates, intermediates=authorities)
    assert verify_snp(evidence.report, endorsements, SHOW, Expected(), AT).affirming


@pytest.mark.parametrize(
    ("name", "extra_data"),
    [
        ("milan-v3-azure/evidence-v0.json", b"challenge"),
        ("milan-v3-azure/evidence-v1.json", b"challenge"),
        ("genoa-v3-azure/evidence-genoa.json", None),
    ],
)
def test_azure_evidence_is_fresh_by_its_quote(name: str, extra_data: bytes | None) -> None:
    evidence = parse_azure_evidence(json.loads((VECTORS / "snp" / name).read_text()))
    assert evidence.quote is not None
    nonce = (extra_data or evidence.quote.extra_data).ljust(64, b"\0")
    authorities = from_files(chain=VECTORS / "amd-ca")
    appraisal = verify_hcl(evidence, authorities, SHOW, Expected(report_data=nonce), AT)
    assert appraisal.affirming, appraisal.failures
    assert "freshness" not in appraisal.not_judged
    assert failed(verify_hcl(evidence, authorities, SHOW, Expected(report_data=bytes(64)), AT)) == {"freshness"}
    assert failed(verify_hcl(replace(evidence, quote=None), authorities, SHOW, Expected(report_data=nonce), AT)) == {
        "freshness"
    }


def test_a_broker_demands_every_judgement() -> None:
    place = VECTORS / "snp/genoa-v3-azure"
    report = (place / "report.bin").read_bytes()
    endorsements = from_files(vek=place / "vcek.der", chain=VECTORS / "amd-ca")
    appraisal = verify_snp(report, endorsements, BROKER, Expected(), AT)
    assert failed(appraisal) == {"measurement", "freshness", "init-data", "revocation"}
    assert all(failure.value == "not judged" for failure in appraisal.failures)


def chain_of(name: str, *, alone: bool = False) -> Endorsements:
    return from_files(vek=VECTORS / "certs-only" / name, chain=None if alone else VECTORS / "amd-ca")


def test_the_aws_vlek_has_a_chain_within_its_year() -> None:
    chain = resolve_chain(chain_of("milan_vlek_aws_us-east-2.der"), AMD_ROOTS)
    assert chain.failures == ()
    assert chain.extensions is not None
    assert chain.extensions.csp_id == "CN=cc-us-east-2.amazonaws.com"
    assert chain.extensions.tcb.microcode == 217
    ends = min(validity.until for validity in chain.validities if validity.until is not None)
    assert ends - timedelta(days=366) < datetime(2025, 12, 10, tzinfo=UTC) < ends


def test_the_turin_vcek_has_a_chain() -> None:
    chain = resolve_chain(chain_of("turin_vcek_virtee.der"), AMD_ROOTS)
    assert chain.failures == ()
    assert chain.extensions is not None
    assert chain.extensions.tcb.fmc == 0
    assert len(chain.extensions.hwid or b"") == 8


@pytest.mark.parametrize("name", ["test-vcek-invalid-legacy.der", "test-vcek-invalid-new.der"])
def test_a_vcek_with_another_hardware_id_is_read_but_not_believed(name: str) -> None:
    chain = resolve_chain(chain_of(name), AMD_ROOTS)
    assert chain.extensions is not None
    assert chain.extensions.hwid == bytes(range(64))
    assert {failure.check for failure in chain.failures} == {"chain-signatures"}


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.replace(b"CERTIFICATE-----\n", b"CERTIFICATE-----\nA", 1),
        lambda found: found[: len(found) // 2],
        lambda found: b"",
    ],
)
def test_damaged_authorities_are_unusable_not_a_crash(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    broken = tmp_path / "ask.pem"
    broken.write_bytes(change((VECTORS / "amd-ca/milan_ask.pem").read_bytes()))
    with pytest.raises(Exception, match=r"ask\.pem"):
        from_files(chain=broken)


def test_without_authorities_nothing_is_proved() -> None:
    chain = resolve_chain(chain_of("turin_vcek_virtee.der", alone=True), AMD_ROOTS)
    assert {failure.check for failure in chain.failures} == {"chain-signatures", "trusted-root"}
