"""Chains: what holds, what does not, and that OpenSSL's path builder agrees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import crypto

from attestation.endorsements.certificates import load_certificate, load_crl, split_pem
from attestation.endorsements.chain import Chain, Endorsements, VekKind, resolve_chain
from attestation.endorsements.roots import AMD_ROOTS, RootPin
from attestation.endorsements.sources import from_certificate_table, from_files
from attestation.endorsements.vek import read_vek_extensions
from attestation.errors import MalformedEndorsement, MalformedEvidence
from attestation.evidence.certificate_table import VCEK_GUID, VLEK_GUID, encode_certificate_table
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from attestation.virtual.certificates import issue_certificate
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor

NOW = datetime.now(UTC)
MILAN, GENOA, TURIN = Product.MILAN, Product.GENOA, Product.TURIN
OID = "1.3.6.1.4.1.3704.1"

Extensions = dict[str, bytes]


def pins(vendor: Vendor) -> tuple[RootPin, ...]:
    return tuple(RootPin(product, one.ark_spki_sha256, virtual=True) for product, one in vendor.authorities.items())


def honest(vendor: Vendor, chip: Chip) -> Endorsements:
    return from_certificate_table(chip.certificate_table(vendor))


def failed(chain: Chain) -> set[str]:
    return {failure.check for failure in chain.failures}


@pytest.mark.parametrize("product", list(Product))
def test_an_honest_chain_holds(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], product: Product) -> None:
    chip = virtual_chips[product]
    chain = resolve_chain(honest(virtual_vendor, chip), pins(virtual_vendor))
    assert chain.failures == ()
    assert (chain.kind, chain.product, chain.virtual) == (VekKind.VCEK, product, True)
    assert chain.extensions is not None
    assert chain.extensions.tcb == chip.tcb
    assert chain.extensions.hwid == chip.chip_id[: 8 if product is TURIN else 64]
    assert len(chain.validities) == 3
    assert len(chain.lists) == 1
    assert chain.revoked == ()


def test_a_chain_is_proved_once(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    endorsements = honest(virtual_vendor, virtual_chips[MILAN])
    first = resolve_chain(endorsements, pins(virtual_vendor))
    assert resolve_chain(replace(endorsements), pins(virtual_vendor)) is first
    assert resolve_chain(endorsements, AMD_ROOTS) is not first  # what is trusted is part of the question
    assert resolve_chain(replace(endorsements, crls=()), pins(virtual_vendor)) is not first


def test_digests_keep_parts_apart() -> None:
    one = Endorsements(b"ab", (b"c",), ())
    assert one.digest() != Endorsements(b"a", (b"bc",), ()).digest()
    assert one.digest() != Endorsements(b"ab", (), (b"c",)).digest()


def test_openssl_agrees(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    """Our walk against OpenSSL's: chain without CRL flags, then the ASK as leaf with them (the ASK has no list)."""
    authority = virtual_vendor.authority(MILAN)
    revoking = virtual_vendor.revocation_list(MILAN, [0x10001], NOW - timedelta(hours=1))

    def store(crl: bytes | None) -> crypto.X509Store:
        trusted = crypto.X509Store()
        trusted.add_cert(crypto.X509.from_cryptography(load_certificate(authority.ark)))
        if crl is not None:
            trusted.add_crl(load_crl(crl))
            trusted.set_flags(crypto.X509StoreFlags.CRL_CHECK)
        return trusted

    ask = crypto.X509.from_cryptography(load_certificate(authority.ask))
    vek = crypto.X509.from_cryptography(load_certificate(virtual_chips[MILAN].vcek))
    crypto.X509StoreContext(store(None), vek, [ask]).verify_certificate()
    crypto.X509StoreContext(store(authority.crl), ask).verify_certificate()
    with pytest.raises(crypto.X509StoreContextError, match="revoked"):
        crypto.X509StoreContext(store(revoking), ask).verify_certificate()
    forged = crypto.X509.from_cryptography(load_certificate(virtual_chips[GENOA].vcek))
    with pytest.raises(crypto.X509StoreContextError):
        crypto.X509StoreContext(store(None), forged, [ask]).verify_certificate()
    endorsements = replace(honest(virtual_vendor, virtual_chips[MILAN]), crls=(revoking,))
    assert resolve_chain(endorsements, pins(virtual_vendor)).revoked == ("ASK or ASVK",)


def test_authorities_of_other_products_do_no_harm(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    every = [one for authority in virtual_vendor.authorities.values() for one in (authority.ark, authority.ask)]
    lists = tuple(authority.crl for authority in virtual_vendor.authorities.values())
    for chip in virtual_chips.values():
        chain = resolve_chain(Endorsements(chip.vcek, tuple(every), lists), pins(virtual_vendor))
        assert chain.failures == ()
        assert len(chain.lists) == 1


@pytest.mark.parametrize("missing", ["ask", "ark", "both", "vek"])
def test_a_missing_link_is_named(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], missing: str) -> None:
    authority = virtual_vendor.authority(MILAN)
    vek = None if missing == "vek" else virtual_chips[MILAN].vcek
    left = {"ask": (authority.ark,), "ark": (authority.ask,), "both": ()}.get(missing, (authority.ask, authority.ark))
    chain = resolve_chain(Endorsements(vek, left), pins(virtual_vendor))
    expected = {"vek-profile"} if missing == "vek" else {"chain-signatures", "trusted-root"}
    assert failed(chain) == expected


def test_a_root_of_one_product_vouches_for_no_other(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    milan = virtual_vendor.authority(MILAN).ark_spki_sha256
    wrong = (RootPin(GENOA, milan, virtual=True),)
    assert failed(resolve_chain(honest(virtual_vendor, virtual_chips[MILAN]), wrong)) == {"trusted-root"}


def test_virtual_names_are_refused_under_a_hardware_root(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    posing = (RootPin(MILAN, virtual_vendor.authority(MILAN).ark_spki_sha256, virtual=False),)
    chain = resolve_chain(honest(virtual_vendor, virtual_chips[MILAN]), posing)
    assert failed(chain) == {"trusted-root"}
    assert "virtual names under a hardware root" in str(chain.failures[0])


def test_a_forged_authority_beside_the_real_one_does_not_matter(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> None:
    """Whoever fills the certificate table cannot hide the real ASK behind another with its name."""
    key = virtual_vendor.ask_key(GENOA)
    forged = certificate(virtual_vendor, virtual_chips[MILAN], subject="SEV-Virtual-Milan", issuer_key=key)
    endorsements = honest(virtual_vendor, virtual_chips[MILAN])
    crowded = replace(endorsements, intermediates=(forged, *endorsements.intermediates, forged))
    assert resolve_chain(crowded, pins(virtual_vendor)).failures == ()


def test_too_many_certificates_are_refused(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    endorsements = honest(virtual_vendor, virtual_chips[MILAN])
    with pytest.raises(MalformedEndorsement, match="too many"):
        resolve_chain(replace(endorsements, intermediates=endorsements.intermediates * 40), pins(virtual_vendor))


def test_a_table_with_both_kinds_of_keys_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="a VCEK and a VLEK"):
        from_certificate_table(encode_certificate_table([(VCEK_GUID, b"a"), (VLEK_GUID, b"b")]))


@pytest.mark.parametrize("raw", [b"", b"text", b"\x30\x03\x02\x01\x01", b"-----BEGIN CERTIFICATE-----\nAA\n-----END"])
def test_what_is_no_certificate_is_unusable(raw: bytes) -> None:
    with pytest.raises(MalformedEndorsement):
        load_certificate(raw)
    with pytest.raises(MalformedEndorsement):
        load_crl(raw)


def test_trailing_bytes_are_refused(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    with pytest.raises(MalformedEndorsement):
        load_certificate(virtual_chips[MILAN].vcek + b"\0")
    with pytest.raises(MalformedEndorsement):
        load_crl(virtual_vendor.authority(MILAN).crl + b"\0")


def test_a_bundle_is_split(virtual_vendor: Vendor) -> None:
    authority = virtual_vendor.authority(MILAN)
    pem = b"".join(
        load_certificate(one).public_bytes(serialization.Encoding.PEM) for one in (authority.ask, authority.ark)
    )
    blocks = split_pem(b"a comment\n" + pem, "CERTIFICATE")
    assert [load_certificate(block).subject for block in blocks] == [
        load_certificate(authority.ask).subject,
        load_certificate(authority.ark).subject,
    ]
    with pytest.raises(MalformedEndorsement, match="0 blocks"):
        split_pem(pem, "X509 CRL")


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_certificate_or_refused(raw: bytes) -> None:
    with pytest.raises(MalformedEndorsement):
        load_certificate(raw)


# Extensions of a VCEK, one by one.


def standard(hwid: bytes = bytes(range(64))) -> Extensions:
    levels = {"1": 4, "2": 0, "3": 24, "4": 0, "5": 0, "6": 0, "7": 0, "8": 219}
    return {
        f"{OID}.1": core.Integer(0).dump(),
        f"{OID}.2": core.IA5String("Virtual-Milan").dump(),
        **{f"{OID}.3.{part}": core.Integer(level).dump() for part, level in levels.items()},
        f"{OID}.4": hwid,
    }


def certificate(vendor: Vendor, chip: Chip, **changes: Any) -> bytes:
    key = chip.key.public_key()
    values: dict[str, Any] = {
        "subject": "SEV-VCEK-Virtual",
        "issuer": "SEV-Virtual-Milan",
        "serial": 0,
        "valid_from": NOW - timedelta(days=1),
        "years": 7,
        "public_key": key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        "extensions": [(oid, False, value) for oid, value in standard().items()],
        "issuer_key": vendor.ask_key(MILAN),
    }
    return issue_certificate(**(values | changes))


def with_extensions(extensions: Iterable[tuple[str, bool, bytes]]) -> x509.Certificate:
    """A certificate with these extensions; who signed it does not matter to the reader."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=1))
    for oid, critical, value in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical)
    return builder.sign(key, hashes.SHA256())


def read(extensions: Extensions) -> Any:
    return read_vek_extensions(with_extensions((oid, False, value) for oid, value in extensions.items()))


def test_extensions_are_read() -> None:
    read_back = read(standard())
    assert read_back.tcb == Tcb(4, 0, 24, 219)
    assert read_back.hwid == bytes(range(64))
    assert read_back.product is MILAN
    assert read_back.virtual
    assert read(standard(b"\x04\x40" + bytes(64))).hwid == bytes(64)


@pytest.mark.parametrize(
    ("oid", "value"),
    [
        (f"{OID}.1", None),
        (f"{OID}.1", b"\x02\x01\x01"),  # Turin's structure
        (f"{OID}.2", None),
        (f"{OID}.2", core.IA5String("Rome").dump()),
        (f"{OID}.2", core.IA5String("Virtual-Milan ").dump()),
        (f"{OID}.2", core.UTF8String("Virtual-Milan").dump()),
        (f"{OID}.2", b"\x16\x00"),
        (f"{OID}.3.1", None),
        (f"{OID}.3.3", None),
        (f"{OID}.3.8", None),
        (f"{OID}.3.8", b"\x02\x02\x01\x00"),  # 256
        (f"{OID}.3.8", b"\x02\x01\x80"),  # -128
        (f"{OID}.3.8", b"\x02\x02\x00\x7f"),  # not the shortest form
        (f"{OID}.3.8", b"\x02\x00"),
        (f"{OID}.3.8", b"\x02\x01\x01\x00"),  # trailing byte
        (f"{OID}.3.8", b"\x04\x01\x01"),
        (f"{OID}.3.8", b"\x02"),
        (f"{OID}.3.5", b"\x02\x02\x01\x00"),
        (f"{OID}.3.9", b"\x02\x01\x00"),  # only Turin has FMC
        (f"{OID}.4", None),
        (f"{OID}.4", bytes(63)),
        (f"{OID}.4", bytes(65)),
        (f"{OID}.4", bytes(8)),
        (f"{OID}.4", b"\x04\x3f" + bytes(64)),
        (f"{OID}.5", core.IA5String("CN=provider").dump()),  # beside a hardware id
        (f"{OID}.6", b"\x02\x01\x00"),  # unknown
        (f"{OID}.3.10", b"\x02\x01\x00"),  # unknown
    ],
)
def test_an_extension_that_breaks_a_rule_is_refused(oid: str, value: bytes | None) -> None:
    extensions = standard()
    if value is None:
        del extensions[oid]
    else:
        extensions[oid] = value
    with pytest.raises(MalformedEndorsement):
        read(extensions)


def test_an_extension_twice_there_is_refused(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> None:
    doubled = [(oid, False, value) for oid, value in standard().items()]
    doubled.append((f"{OID}.3.8", False, core.Integer(255).dump()))
    vek = certificate(virtual_vendor, virtual_chips[MILAN], extensions=doubled)
    with pytest.raises(MalformedEndorsement, match="twice"):
        read_vek_extensions(load_certificate(vek))
    endorsements = replace(honest(virtual_vendor, virtual_chips[MILAN]), vek=vek)
    assert "vek-extensions" in failed(resolve_chain(endorsements, pins(virtual_vendor)))


@given(level=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_every_level_is_read_as_it_is(level: int) -> None:
    assert read(standard() | {f"{OID}.3.3": core.Integer(level).dump()}).tcb.snp == level


@given(value=st.binary(max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_level_bytes_are_read_or_refused(value: bytes) -> None:
    try:
        level = read(standard() | {f"{OID}.3.2": value}).tcb.tee
    except MalformedEndorsement:
        return
    assert core.Integer(level).dump() == value


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"subject": "SEV-VCEK"}, "vek-profile"),
        ({"subject": "SEV-VLEK-Virtual"}, "vek-profile"),
        ({"subject": "SEV-Virtual-Milan"}, "vek-profile"),
        ({"extensions": [(oid, True, value) for oid, value in standard().items()]}, "vek-profile"),
        (
            {
                "public_key": ec.generate_private_key(ec.SECP256R1())
                .public_key()
                .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            },
            "vek-profile",
        ),
        ({"extensions": []}, "vek-extensions"),
        (
            {
                "extensions": [
                    (oid, False, value)
                    for oid, value in (standard() | {f"{OID}.2": core.IA5String("Virtual-Genoa").dump()}).items()
                ]
            },
            "vek-extensions",
        ),
        (
            {
                "extensions": [
                    (oid, False, value)
                    for oid, value in (standard() | {f"{OID}.2": core.IA5String("Milan-B0").dump()}).items()
                ]
            },
            "vek-extensions",
        ),
    ],
)
def test_a_vek_of_another_shape_is_refused(
    virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], changes: dict[str, Any], check: str
) -> None:
    vek = certificate(virtual_vendor, virtual_chips[MILAN], **changes)
    endorsements = replace(honest(virtual_vendor, virtual_chips[MILAN]), vek=vek)
    assert check in failed(resolve_chain(endorsements, pins(virtual_vendor)))


def test_a_folder_of_authorities_may_hold_other_files(virtual_vendor: Vendor, tmp_path: Path) -> None:
    authority = virtual_vendor.authority(MILAN)
    (tmp_path / "ark.der").write_bytes(authority.ark)
    (tmp_path / "bundle.pem").write_bytes(
        b"".join(
            load_certificate(one).public_bytes(serialization.Encoding.PEM) for one in (authority.ask, authority.ark)
        )
    )
    (tmp_path / "list.pem").write_bytes(load_crl(authority.crl).public_bytes(serialization.Encoding.PEM))
    (tmp_path / "notes.txt").write_text("no certificate")
    assert len(from_files(chain=tmp_path).intermediates) == 3
    assert len(from_files(crls=[tmp_path / "list.pem"]).crls) == 1
    (tmp_path / "broken.der").write_bytes(b"no certificate")
    with pytest.raises(MalformedEndorsement, match=r"broken\.der"):
        from_files(chain=tmp_path)


def test_a_file_with_two_certificates_is_no_vek(virtual_vendor: Vendor, tmp_path: Path) -> None:
    pem = load_certificate(virtual_vendor.authority(MILAN).ask).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "vek.pem").write_bytes(pem * 2)
    with pytest.raises(MalformedEndorsement, match="2 certificates"):
        from_files(vek=tmp_path / "vek.pem")
