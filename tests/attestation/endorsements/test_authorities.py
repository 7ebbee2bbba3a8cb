"""Authorities and revocation lists of another shape than the vendor's are refused, each for what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from asn1crypto import core
from asn1crypto import crl as asn1_crl
from asn1crypto import x509 as asn1_x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from attestation.endorsements.chain import Endorsements, resolve_chain
from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.report import Product
from attestation.verifier import SHOW, Expected, verify_snp, with_virtual_roots
from attestation.virtual import certificates
from attestation.virtual.certificates import authority_extensions, issue_certificate, issue_revocation_list
from attestation.virtual.chip import Chip
from attestation.virtual.processor import sign_report
from attestation.virtual.vendor import Vendor
from policies.keys import read_secret

NOW = datetime.now(UTC)
MILAN, GENOA = Product.MILAN, Product.GENOA

CA, USAGE, SUBJECT_KEY = "2.5.29.19", "2.5.29.15", "2.5.29.14"


def spki(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def ark_key(vendor: Vendor, product: Product) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(read_secret(vendor.folder / product.value / "ark.key.pem"), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


@cache
def short_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 3072)


def extensions(**changes: tuple[bool, bytes] | None) -> list[tuple[str, bool, bytes]]:
    """An ASK's extensions: basic constraints and key usage, changed or left out by name."""
    standard: dict[str, tuple[bool, bytes] | None] = {
        CA: (True, asn1_x509.BasicConstraints({"ca": True, "path_len_constraint": 0}).dump()),
        USAGE: (True, asn1_x509.KeyUsage({"key_cert_sign"}).dump()),
    }
    named = {"ca": CA, "usage": USAGE, "more": "1.2.3.4"}
    for name, value in changes.items():
        standard[named[name]] = value
    return [(oid, *value) for oid, value in standard.items() if value is not None]


def ask(vendor: Vendor, **changes: Any) -> bytes:
    """An ASK of Milan's, issued by its ARK."""
    values: dict[str, Any] = {
        "subject": "SEV-Virtual-Milan",
        "issuer": "ARK-Virtual-Milan",
        "serial": 0x10001,
        "valid_from": NOW - timedelta(days=1),
        "years": 25,
        "public_key": spki(vendor.ask_key(MILAN)),
        "extensions": extensions(),
        "issuer_key": ark_key(vendor, MILAN),
    }
    return issue_certificate(**(values | changes))


def pins(vendor: Vendor) -> tuple[RootPin, ...]:
    return tuple(RootPin(product, one.ark_spki_sha256, virtual=True) for product, one in vendor.authorities.items())


def failures(vendor: Vendor, endorsements: Endorsements) -> dict[str, str]:
    """Every failed check with all that was said of it."""
    found: dict[str, str] = {}
    for failure in resolve_chain(endorsements, pins(vendor)).failures:
        found[failure.check] = f"{found.get(failure.check, '')}{failure}\n"
    return found


def test_a_plain_ask_is_believed(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    ark = virtual_vendor.authority(MILAN).ark
    assert failures(virtual_vendor, Endorsements(virtual_chips[MILAN].vcek, (ask(virtual_vendor), ark))) == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"extensions": extensions(ca=(True, asn1_x509.BasicConstraints({"ca": False}).dump()))}, "no CA"),
        (
            {
                "extensions": extensions(
                    ca=(False, asn1_x509.BasicConstraints({"ca": True, "path_len_constraint": 0}).dump())
                )
            },
            "no CA",
        ),
        ({"extensions": extensions(ca=(True, asn1_x509.BasicConstraints({"ca": True}).dump()))}, "path length None"),
        ({"extensions": extensions(ca=None)}, "missing or unreadable"),
        ({"extensions": extensions(usage=None)}, "missing or unreadable"),
        ({"extensions": extensions(usage=(True, asn1_x509.KeyUsage({"crl_sign"}).dump()))}, "may not sign"),
        ({"extensions": extensions(usage=(False, asn1_x509.KeyUsage({"key_cert_sign"}).dump()))}, "may not sign"),
        ({"extensions": extensions(more=(True, core.Null().dump()))}, "unknown critical"),
    ],
)
def test_an_ask_that_is_no_authority_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], changes: dict[str, Any], why: str
) -> None:
    ark = virtual_vendor.authority(MILAN).ark
    endorsements = Endorsements(virtual_chips[MILAN].vcek, (ask(virtual_vendor, **changes), ark))
    found = failures(virtual_vendor, endorsements)
    assert set(found) == {"chain-profile"}
    assert why in found["chain-profile"]


def test_an_extension_that_is_not_critical_is_let_through(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    more = ask(virtual_vendor, extensions=extensions(more=(False, core.Null().dump())))
    endorsements = Endorsements(virtual_chips[MILAN].vcek, (more, virtual_vendor.authority(MILAN).ark))
    assert failures(virtual_vendor, endorsements) == {}


@pytest.mark.parametrize("key", [short_key, lambda: ec.generate_private_key(ec.SECP384R1())])
def test_an_ask_with_another_kind_of_key_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], key: Callable[[], Any]
) -> None:
    weak = ask(virtual_vendor, public_key=spki(key()))
    endorsements = Endorsements(virtual_chips[MILAN].vcek, (weak, virtual_vendor.authority(MILAN).ark))
    found = failures(virtual_vendor, endorsements)
    assert "RSA with 4096 bits" in found["chain-profile"]
    assert "chain-signatures" in found


def test_an_authority_of_another_organisation_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "ORGANIZATION", "Advanced Micro Devices")
    posing = ask(virtual_vendor)
    endorsements = Endorsements(virtual_chips[MILAN].vcek, (posing, virtual_vendor.authority(MILAN).ark))
    assert set(failures(virtual_vendor, endorsements)) == {"chain-signatures", "trusted-root"}


def test_an_ark_that_did_not_sign_itself_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    """The pinned key in a certificate that another key signed."""
    public = spki(ark_key(virtual_vendor, MILAN))
    forged = issue_certificate(
        subject="ARK-Virtual-Milan",
        issuer="ARK-Virtual-Milan",
        serial=0x10000,
        valid_from=NOW - timedelta(days=1),
        years=25,
        public_key=public,
        extensions=authority_extensions(public, None),
        issuer_key=ark_key(virtual_vendor, GENOA),
    )
    endorsements = Endorsements(virtual_chips[MILAN].vcek, (virtual_vendor.authority(MILAN).ask, forged))
    assert set(failures(virtual_vendor, endorsements)) == {"chain-signatures"}


def milan_list(vendor: Vendor, **changes: Any) -> bytes:
    key = ark_key(vendor, MILAN)
    values: dict[str, Any] = {
        "issuer": "ARK-Virtual-Milan",
        "issuer_key": key,
        "issuer_public_key": spki(key),
        "serials": [],
        "at": NOW - timedelta(hours=1),
        "years": 1,
    }
    return issue_revocation_list(**(values | changes))


def with_list(vendor: Vendor, chip: Chip, *lists: bytes) -> Endorsements:
    return replace(from_certificate_table(chip.certificate_table(vendor)), crls=lists)


def test_a_list_that_another_key_signed_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    forged = milan_list(virtual_vendor, issuer_key=ark_key(virtual_vendor, GENOA))
    found = failures(virtual_vendor, with_list(virtual_vendor, virtual_chips[MILAN], forged))
    assert set(found) == {"revocation-list"}
    assert "does not verify" in found["revocation-list"]


def test_a_partial_list_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A critical extension narrows what a list speaks of: silent on the chain, it must not pass for a clean one."""

    class Partial(asn1_crl.TbsCertList):  # type: ignore[misc]  # asn1crypto has no types
        def __init__(self, value: dict[str, Any]) -> None:
            narrowed = {"extn_id": "issuing_distribution_point", "critical": True}
            content = core.ParsableOctetString(
                asn1_crl.IssuingDistributionPoint({"only_contains_user_certs": True}).dump()
            )
            value["crl_extensions"] = [*value["crl_extensions"], {**narrowed, "extn_value": content}]
            super().__init__(value)

    monkeypatch.setattr(certificates.crl, "TbsCertList", Partial)
    partial = milan_list(virtual_vendor)
    found = failures(virtual_vendor, with_list(virtual_vendor, virtual_chips[MILAN], partial))
    assert set(found) == {"revocation-list"}
    assert "partial" in found["revocation-list"]


def appraised(vendor: Vendor, chip: Chip, *lists: bytes) -> set[str]:
    profile = with_virtual_roots(SHOW, pins(vendor))
    appraisal = verify_snp(sign_report(chip), with_list(vendor, chip, *lists), profile, Expected(), NOW)
    return {failure.check for failure in appraisal.failures}


def test_dates_of_lists_are_judged(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    chip = virtual_chips[MILAN]
    fresh = milan_list(virtual_vendor)
    ended = milan_list(virtual_vendor, at=NOW - timedelta(days=800))
    future = milan_list(virtual_vendor, at=NOW + timedelta(days=2))
    assert appraised(virtual_vendor, chip, fresh) == set()
    assert appraised(virtual_vendor, chip, ended) == {"revocation-list"}
    assert appraised(virtual_vendor, chip, future) == {"revocation-list"}
    assert appraised(virtual_vendor, chip, ended, fresh) == set()


def test_an_ended_list_still_revokes(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    """What was revoked stays so: a fresh list beside an older one takes nothing back."""
    revoking = milan_list(virtual_vendor, at=NOW - timedelta(days=800), serials=[0x10001])
    assert appraised(virtual_vendor, virtual_chips[MILAN], revoking, milan_list(virtual_vendor)) == {"revocation"}


def test_a_revoked_root_is_a_revoked_chain(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    revoking = milan_list(virtual_vendor, serials=[0x10000])
    assert appraised(virtual_vendor, virtual_chips[MILAN], revoking) == {"revocation"}
