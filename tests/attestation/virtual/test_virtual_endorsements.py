"""Vendor and chips: AMD's certificate profile field by field, keys closed, and every product and version verifiable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import crl, pem, x509

from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.errors import MalformedEvidence, PlatformUnusable
from attestation.evidence.report import VERSIONS, Product, parse_report
from attestation.evidence.tcb import Tcb, encode_tcb
from attestation.verifier import SHOW, Expected, verify_snp, with_virtual_roots
from attestation.virtual.certificates import key_identifier
from attestation.virtual.chip import Chip, certify, create_chip, load_chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import SERIALS, Vendor, create_vendor, load_vendor
from policies.errors import UnusableKey

REAL = Path(os.environ.get("SEAL_VECTORS", Path(__file__).resolve().parents[4] / "shared/vectors"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real certificates at hand (SEAL_VECTORS)")


def real(name: str) -> x509.Certificate:
    raw = (REAL / name).read_bytes()
    return x509.Certificate.load(pem.unarmor(raw)[2] if pem.detect(raw) else raw)


def shape(certificate: x509.Certificate) -> dict[str, Any]:
    """Return what must be the same in our certificate and in AMD's: all but names, times, keys and values."""
    body = certificate["tbs_certificate"]
    return {
        "version": body["version"].native,
        "serial": body["serial_number"].native,
        "algorithm": body["signature"].native,
        "outer algorithm": certificate["signature_algorithm"].native,
        "key": body["subject_public_key_info"]["algorithm"].dump(),
        "key bits": body["subject_public_key_info"].bit_size,
        "extensions": [
            (extension["extn_id"].native, extension["critical"].native, len(extension["extn_value"].native or b""))
            for extension in body["extensions"]
            if extension["extn_id"].native.startswith("1.3.6.1.4.1.3704")
        ],
        "order": [
            extension["extn_id"].native
            for extension in body["extensions"]
            if extension["extn_id"].native != "crl_distribution_points"
        ],
        "critical": {
            extension["extn_id"].native: extension["critical"].native
            for extension in body["extensions"]
            if extension["extn_id"].native != "crl_distribution_points"
        },
    }


@needs_real
@pytest.mark.parametrize("product", list(Product))
def test_authorities_have_amds_shape(virtual_vendor: Vendor, product: Product) -> None:
    authority = virtual_vendor.authority(product)
    for ours, name in ((authority.ark, "ark"), (authority.ask, "ask")):
        assert shape(x509.Certificate.load(ours)) == shape(real(f"amd-ca/{product.value.lower()}_{name}.pem"))


@needs_real
@pytest.mark.parametrize(("product", "name"), [(Product.MILAN, "snp/milan-v2-virtee"), (Product.TURIN, "snp/turin-v5")])
def test_vceks_have_amds_shape(virtual_chips: Mapping[Product, Chip], product: Product, name: str) -> None:
    ours, theirs = shape(x509.Certificate.load(virtual_chips[product].vcek)), shape(real(f"{name}/vcek.der"))
    for one in (ours, theirs):  # levels of 128 and more, and the product's name, take other lengths
        one["extensions"] = [entry for entry in one["extensions"] if entry[0].endswith((".1.1", ".1.4"))]
    assert ours == theirs


@needs_real
def test_key_identifiers_are_made_as_amds() -> None:
    ark = real("amd-ca/milan_ark.pem")
    assert key_identifier(ark.public_key.dump()) == ark.key_identifier


@pytest.mark.parametrize("product", list(Product))
def test_everything_says_virtual(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], product: Product
) -> None:
    authority = virtual_vendor.authority(product)
    for der in (authority.ark, authority.ask, virtual_chips[product].vcek):
        certificate = x509.Certificate.load(der)
        for name in (certificate.subject, certificate.issuer):
            assert "Virtual" in name.native["common_name"]
            assert name.native["organization_name"] == "Sealwright Virtual Platform"
    assert b"Advanced Micro" not in authority.ark + authority.ask + authority.crl + virtual_chips[product].vcek


@pytest.mark.parametrize("product", list(Product))
@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_reports_of_every_product_and_version_verify(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], product: Product, version: int
) -> None:
    chip = virtual_chips[product]
    raw = sign_report(chip, report_data=b"d" * 64, version=version, measurement=b"m" * 48)
    report = parse_report(raw)
    assert (report.version, report.report_data, report.measurement) == (version, b"d" * 64, b"m" * 48)
    assert (report.cpuid_fam_id is None) == (version == 2)
    assert (report.current_mit_vector is None) == (version < 5)
    pins = [RootPin(one.product, one.ark_spki_sha256, virtual=True) for one in virtual_vendor.authorities.values()]
    appraisal = verify_snp(
        raw,
        from_certificate_table(chip.certificate_table(virtual_vendor)),
        with_virtual_roots(SHOW, pins),
        Expected(report_data=b"d" * 64),
        datetime.now(UTC),
    )
    assert appraisal.affirming, appraisal.failures
    assert appraisal.claims["product"] == product.value


def test_any_field_can_be_set_and_is_signed(virtual_chips: Mapping[Product, Chip]) -> None:
    chip = virtual_chips[Product.GENOA]
    fields = {"policy": 0xB0000, "vmpl": 3, "key_info": 2, "platform_info": 0, "guest_svn": 9, "chip_id": bytes(64)}
    report = parse_report(sign_report(chip, **fields))
    assert {name: getattr(report, name) for name in fields} == fields
    with pytest.raises(MalformedEvidence):
        sign_report(chip, measurement=b"short")
    with pytest.raises(TypeError):
        sign_report(chip, no_such_field=1)


def test_the_same_report_is_signed_the_same(virtual_chips: Mapping[Product, Chip]) -> None:
    chip = virtual_chips[Product.MILAN]
    assert sign_report(chip, report_data=bytes(64)) == sign_report(chip, report_data=bytes(64))


def test_a_chip_is_certified_anew_for_newer_firmware(virtual_vendor: Vendor, tmp_path: Path) -> None:
    newer = Tcb(bootloader=5, tee=0, snp=25, microcode=220)
    chip = create_chip(virtual_vendor, tmp_path / "chip", seed="one", tcb=newer, firmware=(1, 56, 1), report_version=2)
    report = parse_report(sign_report(chip))
    assert report.version == 2
    assert report.reported_tcb == encode_tcb(newer, Product.MILAN)
    assert (report.current_major, report.current_minor, report.current_build) == (1, 56, 1)
    older = certify(virtual_vendor, Product.MILAN, chip.key.public_key(), chip.chip_id, chip.tcb)
    assert older != chip.vcek  # signatures are random; the content is the same
    assert create_chip(virtual_vendor, tmp_path / "again", seed="one").chip_id == chip.chip_id


def test_keys_are_closed_and_must_stay_so(virtual_vendor: Vendor, tmp_path: Path) -> None:
    create_chip(virtual_vendor, tmp_path / "chip")
    key = tmp_path / "chip/vcek.key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "chip").stat().st_mode & 0o777 == 0o700
    for name in ("ark.key.pem", "ask.key.pem"):
        assert (virtual_vendor.folder / "Milan" / name).stat().st_mode & 0o777 == 0o600
    key.chmod(0o640)
    with pytest.raises(UnusableKey, match="others may read"):
        load_chip(tmp_path / "chip")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chip.json", b"{}", "cannot be read"),
        ("chip.json", b"\xff", "cannot be read"),
        ("vcek.pem", b"none", "no PEM"),
        ("vcek.key.pem", b"none", "cannot be read"),
    ],
)
def test_a_chip_that_is_none_is_refused(
    virtual_chips: Mapping[Product, Chip], shared_folder: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    copy = Path(shutil.copytree(shared_folder / "chip-Milan", tmp_path / "chip"))
    (copy / name).write_bytes(content)
    with pytest.raises(PlatformUnusable, match=words):
        load_chip(copy)


def test_a_chip_with_another_chips_key_is_refused(
    virtual_chips: Mapping[Product, Chip], shared_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shared_folder / "chip-Milan", tmp_path / "chip"))
    shutil.copyfile(shared_folder / "chip-Genoa/vcek.key.pem", copy / "vcek.key.pem")
    with pytest.raises(PlatformUnusable, match="not the certified one"):
        load_chip(copy)


def test_a_vendor_has_the_products_that_were_asked_for(tmp_path: Path) -> None:
    at = datetime(2026, 5, 17, tzinfo=UTC)
    vendor = create_vendor(tmp_path, [Product.TURIN], at=at)
    assert set(load_vendor(tmp_path).authorities) == {Product.TURIN}
    with pytest.raises(PlatformUnusable, match="no root for Milan"):
        vendor.authority(Product.MILAN)
    ark = x509.Certificate.load(vendor.authority(Product.TURIN).ark)
    assert ark.serial_number == SERIALS[Product.TURIN][0]
    assert ark.not_valid_before == at - timedelta(days=1)
    assert ark.not_valid_after == datetime(2051, 5, 16, tzinfo=UTC)
    kept = vendor.authority(Product.TURIN)
    assert create_vendor(tmp_path, [Product.TURIN]).authority(Product.TURIN) == kept
    (tmp_path / "Turin/ask.pem").write_bytes((tmp_path / "Turin/crl.pem").read_bytes())
    with pytest.raises(PlatformUnusable, match="x509 crl, not a certificate"):
        load_vendor(tmp_path)


def test_a_revocation_list_names_what_is_revoked(virtual_vendor: Vendor) -> None:
    made = virtual_vendor.revocation_list(Product.MILAN, [0x10001], datetime.now(UTC))
    revoked = crl.CertificateList.load(made)["tbs_cert_list"]["revoked_certificates"]
    assert [entry["user_certificate"].native for entry in revoked] == [0x10001]


def test_a_folder_that_is_no_vendor_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlatformUnusable, match="no virtual vendor"):
        load_vendor(tmp_path)
