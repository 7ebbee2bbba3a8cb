"""For every check, its attack: a validly signed report of a certified chip that violates that check and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from asn1crypto import core
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from virtual_hcl import Paravisor

from attestation.endorsements.chain import Endorsements
from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.hcl import HclEvidence, HclReport, parse_hcl_report
from attestation.evidence.id_block import IdBlock, encode_id_block, key_digest, sign_id_block
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb, encode_tcb
from attestation.verifier import (
    SHOW,
    Appraisal,
    Expected,
    Profile,
    load_profile,
    verify_hcl,
    verify_snp,
    with_virtual_roots,
)
from attestation.verifier.profile import SWITCHABLE
from attestation.verifier.snp import ALWAYS, ORDERED
from attestation.virtual.certificates import authority_extensions, issue_certificate
from attestation.virtual.chip import Chip, certify
from attestation.virtual.processor import POLICY, sign_report
from attestation.virtual.vendor import Vendor
from policies.keys import read_secret

NOW = datetime.now(UTC)
MILAN, GENOA, TURIN = Product.MILAN, Product.GENOA, Product.TURIN
OID = "1.3.6.1.4.1.3704.1"
NOTHING_EXPECTED = Expected()


@dataclass(frozen=True)
class Platform:
    vendor: Vendor
    chips: Mapping[Product, Chip]

    def endorsements(self, product: Product) -> Endorsements:
        return from_certificate_table(self.chips[product].certificate_table(self.vendor))

    def profile(self, text: str = "") -> Profile:
        pins = [RootPin(product, one.ark_spki_sha256, virtual=True) for product, one in self.vendor.authorities.items()]
        return with_virtual_roots(load_profile(text), pins)

    def ark_key(self, product: Product) -> rsa.RSAPrivateKey:
        pem = read_secret(self.vendor.folder / product.value / "ark.key.pem")
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return key


@pytest.fixture(scope="module")
def platform(virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]) -> Platform:
    return Platform(virtual_vendor, virtual_chips)


@dataclass(frozen=True)
class Attack:
    """What the attacker makes of an honest report, its certificates, or the moment; `also` fails with it."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[int, bytes] = field(default_factory=dict)
    unsigned: Mapping[int, bytes] = field(default_factory=dict)
    profile: str = ""
    expected: Expected = NOTHING_EXPECTED
    endorse: Callable[[Platform, Endorsements], Endorsements] = lambda _, honest: honest
    product: Product = MILAN
    at: datetime = NOW
    also: frozenset[str] = frozenset()
    trust: Profile | None = None
    wrap: Callable[[Paravisor], HclEvidence] | None = None

    def appraise(self, platform: Platform, extra: str = "") -> Appraisal:
        chip = platform.chips[self.product]
        if self.wrap is not None:
            evidence = self.wrap(Paravisor(chip, tpm_key()))
            profile = platform.profile(f"{extra}\n{self.profile}")
            return verify_hcl(evidence, platform.endorsements(self.product), profile, self.expected, self.at)
        report = sign_report(chip, patches=self.patches, unsigned_patches=self.unsigned, **self.fields)
        endorsements = self.endorse(platform, platform.endorsements(self.product))
        profile = self.trust or platform.profile(f"{extra}\n{self.profile}")
        return verify_snp(report, endorsements, profile, self.expected, self.at)


@cache
def tpm_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def one_byte_more(paravisor: Paravisor) -> HclReport:
    """Variable data that the report does not vouch for."""
    bound = parse_hcl_report(paravisor.blob()).report
    return parse_hcl_report(paravisor.blob(variable_data=paravisor.variable_data() + b" ", report=bound))


def milan(bootloader: int = 4, tee: int = 0, snp: int = 24, microcode: int = 219) -> bytes:
    """A TCB in Milan's layout; the default is the virtual chip's."""
    return encode_tcb(Tcb(bootloader, tee, snp, microcode), MILAN)


def other_names(platform: Platform, honest: Endorsements) -> Endorsements:
    """A VCEK with the names of hardware under the virtual platform's ASK."""
    chip = platform.chips[MILAN]
    return replace(honest, vek=issue_vek(platform, chip, "SEV-VCEK", "SEV-Virtual-Milan"))


def issue_vek(platform: Platform, chip: Chip, subject: str, issuer: str, **changes: Any) -> bytes:
    levels = {"1": 4, "2": 0, "3": 24, "4": 0, "5": 0, "6": 0, "7": 0, "8": 219}
    extensions = [
        (f"{OID}.1", False, core.Integer(0).dump()),
        (f"{OID}.2", False, core.IA5String("Virtual-Milan").dump()),
        *((f"{OID}.3.{part}", False, core.Integer(level).dump()) for part, level in levels.items()),
        (f"{OID}.4", False, chip.chip_id),
    ]
    key = chip.key.public_key()
    values: dict[str, Any] = {
        "subject": subject,
        "issuer": issuer,
        "serial": 0,
        "valid_from": NOW - timedelta(days=1),
        "years": 7,
        "public_key": key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        "extensions": extensions,
        "issuer_key": platform.vendor.ask_key(MILAN),
    }
    return issue_certificate(**(values | changes))


def unknown_extension(platform: Platform, honest: Endorsements) -> Endorsements:
    """A VCEK with an extension in AMD's arc that is not known."""
    chip = platform.chips[MILAN]
    extensions = [(f"{OID}.1", False, core.Integer(0).dump()), (f"{OID}.77", False, core.Integer(0).dump())]
    vek = issue_vek(platform, chip, "SEV-VCEK-Virtual", "SEV-Virtual-Milan", extensions=extensions)
    return replace(honest, vek=vek)


def self_made_vek(platform: Platform, honest: Endorsements) -> Endorsements:
    """A VCEK with every name right, signed by a key of the attacker's (here: Genoa's) instead of Milan's ASK."""
    chip = platform.chips[MILAN]
    forged = platform.vendor.ask_key(GENOA)
    vek = issue_vek(platform, chip, "SEV-VCEK-Virtual", "SEV-Virtual-Milan", issuer_key=forged)
    return replace(honest, vek=vek)


def long_path(platform: Platform, honest: Endorsements) -> Endorsements:
    """An ASK that may sign further authorities."""
    public = platform.vendor.ask_key(MILAN).public_key()
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ask = issue_certificate(
        subject="SEV-Virtual-Milan",
        issuer="ARK-Virtual-Milan",
        serial=0x10001,
        valid_from=NOW - timedelta(days=1),
        years=25,
        public_key=spki,
        extensions=authority_extensions(spki, None),  # an ARK's: no path length
        issuer_key=platform.ark_key(MILAN),
    )
    return replace(honest, intermediates=(ask, platform.vendor.authority(MILAN).ark))


def revoked_ask(platform: Platform, honest: Endorsements) -> Endorsements:
    return replace(honest, crls=(platform.vendor.revocation_list(MILAN, [0x10001], NOW - timedelta(hours=1)),))


def stale_list(platform: Platform, honest: Endorsements) -> Endorsements:
    return replace(honest, crls=(platform.vendor.revocation_list(MILAN, [], NOW - timedelta(days=90)),))


@cache
def provider_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)


def vlek(platform: Platform, honest: Endorsements) -> Endorsements:
    """A key lent to a cloud provider: VLEK under an ASVK. The chip's key stands in for the provider's."""
    provider = provider_key()
    spki = provider.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    ark = platform.vendor.authority(MILAN).ark
    asvk = issue_certificate(
        subject="SEV-VLEK-Virtual-Milan",
        issuer="ARK-Virtual-Milan",
        serial=0x10101,
        valid_from=NOW - timedelta(days=1),
        years=25,
        public_key=spki,
        extensions=authority_extensions(spki, spki),
        issuer_key=platform.ark_key(MILAN),
    )
    levels = {"1": 4, "2": 0, "3": 24, "8": 219}
    extensions = [
        (f"{OID}.1", False, core.Integer(0).dump()),
        (f"{OID}.2", False, core.IA5String("Virtual-Milan").dump()),
        *((f"{OID}.3.{part}", False, core.Integer(level).dump()) for part, level in levels.items()),
        (f"{OID}.5", False, core.IA5String("CN=another-provider.example").dump()),
    ]
    chip = platform.chips[MILAN]
    vek = issue_vek(
        platform,
        chip,
        "SEV-VLEK-Virtual",
        "SEV-VLEK-Virtual-Milan",
        extensions=extensions,
        years=1,
        issuer_key=provider,
    )
    return replace(honest, vek=vek, intermediates=(asvk, ark))


@cache
def maker_keys() -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePrivateKey]:
    """An image maker's ID key and author key."""
    return ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())


def maker_block(**changes: Any) -> tuple[bytes, bytes]:
    """An ID block, signed, for the honest report's measurement."""
    id_key, author_key = maker_keys()
    values: dict[str, Any] = {
        "measurement": bytes(48),
        "family_id": bytes(16),
        "image_id": bytes(16),
        "guest_svn": 0,
        "policy": POLICY,
    }
    block = encode_id_block(IdBlock(**(values | changes)))
    return block, sign_id_block(block, id_key, author_key)


A48, B48, A32, B32 = "aa" * 48, "bb" * 48, "aa" * 32, "bb" * 32

ATTACKS: dict[str, Attack] = {
    "report-signature": Attack(unsigned={0x90: b"\x01"}),
    "vek-profile": Attack(endorse=other_names, also=frozenset({"trusted-root"})),
    "vek-extensions": Attack(endorse=unknown_extension),
    "chain-signatures": Attack(endorse=self_made_vek),
    "chain-profile": Attack(endorse=long_path),
    "trusted-root": Attack(trust=SHOW),
    "certificate-validity": Attack(
        at=NOW.replace(month=1, day=1, year=NOW.year + 9), also=frozenset({"revocation-list"})
    ),
    "revocation": Attack(endorse=revoked_ask),
    "revocation-list": Attack(endorse=stale_list, profile="[revocation]\nmax-age-days = 30"),
    "certificate-tcb": Attack({"reported_tcb": milan(microcode=200)}),
    "report-version": Attack(patches={0x000: b"\x06"}),
    "reserved-bytes": Attack(patches={0x208: b"\x01"}),
    "signature-padding": Attack(unsigned={0x330: b"\x01"}),
    "signature-algorithm": Attack({"signature_algo": 2}),
    "key-info-reserved": Attack({"key_info": 1 << 5}),
    "tcb-reserved": Attack(patches={0x1F3: b"\x01"}),
    "signing-key": Attack({"key_info": 1 << 2}),
    "masked-chip-key": Attack({"key_info": 1 << 1}),
    "product": Attack({"cpuid_mod_id": 0x11}),
    "allowed-product": Attack(profile='[report]\nproducts = ["Genoa", "Turin"]'),
    "hardware-id": Attack({"chip_id": b"\x01" * 64}),
    "chip-id-present": Attack({"chip_id": bytes(64)}, also=frozenset({"hardware-id"})),
    "chip": Attack(expected=Expected(chips=frozenset({b"\x01" * 64}))),
    "provider": Attack(
        {"key_info": 1 << 2}, endorse=vlek, profile='[providers]\ncsp-ids = ["CN=cc-us-east-2.amazonaws.com"]'
    ),
    "tcb-order": Attack({"committed_tcb": milan(snp=25)}, also=frozenset({"provisional-firmware"})),
    "provisional-firmware": Attack({"committed_tcb": milan(snp=23)}),
    "reported-tcb-floor": Attack(profile="[tcb.Milan]\nreported = { microcode = 220 }"),
    "current-tcb-floor": Attack(profile="[tcb.Milan]\ncurrent = { bootloader = 5 }"),
    "committed-tcb-floor": Attack(profile="[tcb.Milan]\ncommitted = { snp = 25 }"),
    "launch-tcb-floor": Attack(
        {"launch_tcb": milan(snp=8)}, profile="[tcb.Milan]\nlaunch = { bootloader = 4, snp = 24, microcode = 219 }"
    ),
    "current-firmware-floor": Attack(profile='[tcb.Milan]\ncurrent-firmware = "1.56.0"'),
    "committed-firmware-floor": Attack(profile='[tcb.Milan]\ncommitted-firmware = "2.0.0"'),
    "launch-mitigations": Attack({"launch_mit_vector": 2}, profile="[mitigations]\nlaunch = 3", product=GENOA),
    "current-mitigations": Attack(profile="[mitigations]\ncurrent = 1"),
    "policy-reserved": Attack({"policy": POLICY & ~(1 << 17)}),
    "policy-abi": Attack({"policy": POLICY | 0x0137}, profile='[policy]\nminimum-abi = "1.56"'),
    "policy-smt": Attack(profile='[policy]\nsmt = "clear"'),
    "policy-migrate-ma": Attack({"policy": POLICY | 1 << 18}),
    "policy-debug": Attack({"policy": POLICY | 1 << 19}),
    "policy-single-socket": Attack(profile='[policy]\nsingle-socket = "set"'),
    "policy-cxl-allow": Attack({"policy": POLICY | 1 << 21}),
    "policy-mem-aes-256-xts": Attack(profile='[policy]\nmem-aes-256-xts = "set"'),
    "policy-rapl-dis": Attack(profile='[policy]\nrapl-dis = "set"'),
    "policy-ciphertext-hiding-dram": Attack(profile='[policy]\nciphertext-hiding-dram = "set"'),
    "policy-page-swap-disable": Attack(profile='[policy]\npage-swap-disable = "set"'),
    "platform-unknown-bits": Attack({"platform_info": 0x125}),
    "platform-smt": Attack(profile='[platform]\nsmt = "clear"'),
    "platform-tsme": Attack(profile='[platform]\ntsme = "set"'),
    "platform-ecc": Attack({"platform_info": 0x21}, profile='[platform]\necc = "set"'),
    "platform-rapl-dis": Attack(profile='[platform]\nrapl-dis = "set"'),
    "platform-ciphertext-hiding-dram": Attack(profile='[platform]\nciphertext-hiding-dram = "set"'),
    "platform-alias-check": Attack({"platform_info": 0x05}),
    "platform-iommu-write-safe": Attack(profile='[platform]\niommu-write-safe = "set"'),
    "platform-tio": Attack({"platform_info": 0xA5}, profile='[platform]\ntio = "clear"'),
    "smt-consistency": Attack({"policy": POLICY & ~(1 << 16)}),
    "rapl-consistency": Attack({"policy": POLICY | 1 << 23}),
    "ciphertext-hiding-consistency": Attack({"policy": POLICY | 1 << 24}),
    "vmpl": Attack({"vmpl": 2}),
    "migration-agent": Attack({"report_id_ma": bytes(32)}),
    "measurement": Attack(expected=Expected(measurements=frozenset({b"\x01" * 48}))),
    "freshness": Attack(expected=Expected(report_data=b"\x01" * 64)),
    "init-data": Attack(expected=Expected(host_data=b"\x01" * 32)),
    "id-block": Attack(
        {"id_key_digest": key_digest(maker_keys()[0].public_key())}, expected=Expected(id_block=maker_block())
    ),
    "id-key": Attack({"id_key_digest": bytes.fromhex(A48)}, profile=f'[id-block]\nid-keys = ["{B48}"]'),
    "author-key": Attack({"author_key_digest": bytes.fromhex(A48)}, profile=f'[id-block]\nauthor-keys = ["{A48}"]'),
    "family-id": Attack(
        {"id_key_digest": bytes.fromhex(A48)}, profile=f'[id-block]\nid-keys = ["{A48}"]\nfamily-id = "{"01" * 16}"'
    ),
    "image-id": Attack(
        {"id_key_digest": bytes.fromhex(A48)}, profile=f'[id-block]\nid-keys = ["{A48}"]\nimage-id = "{"01" * 16}"'
    ),
    "guest-svn": Attack(
        {"id_key_digest": bytes.fromhex(A48), "guest_svn": 6},
        profile=f'[id-block]\nid-keys = ["{A48}"]\nminimum-guest-svn = 7',
    ),
    "vtpm-binding": Attack(wrap=lambda one: replace(one.evidence(b"n"), hcl=one_byte_more(one))),
    "vtpm-quote": Attack(wrap=lambda one: replace(one.evidence(b"n"), quote=one.quote(b"n", pcrs=(bytes(32),) * 24))),
    "vtpm-registers": Attack(
        wrap=lambda one: one.evidence(b"n"), profile=f'[[vtpm.registers]]\nnumber = 11\nvalues = ["{A32}"]'
    ),
    "report-id": Attack(profile=f'[reference]\nreport-id = "{A32}"'),
    "report-id-ma": Attack(profile=f'[reference]\nreport-id-ma = "{A32}"'),
}


def failed(appraisal: Appraisal) -> set[str]:
    return {failure.check for failure in appraisal.failures}


def test_every_check_has_its_attack() -> None:
    assert set(ATTACKS) == {one.name for one in ORDERED}
    assert set(SWITCHABLE) == {one.name for one in ORDERED} - ALWAYS


@pytest.mark.parametrize("product", list(Product))
def test_an_honest_report_is_affirmed(platform: Platform, product: Product) -> None:
    appraisal = Attack(product=product).appraise(platform)
    assert appraisal.affirming, appraisal.failures
    assert appraisal.claims["platform"] == "virtual"
    assert appraisal.claims["product"] == product.value


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_refused_for_its_reason_alone(platform: Platform, name: str) -> None:
    attack = ATTACKS[name]
    appraisal = attack.appraise(platform)
    assert failed(appraisal) == {name} | attack.also
    assert appraisal.status == "contraindicated"
    assert all(failure.value and failure.expected for failure in appraisal.failures)
    assert max(appraisal.vector.values()) >= 96


@pytest.mark.parametrize("name", [name for name in ATTACKS if name in SWITCHABLE])
def test_its_setting_turns_the_refusal_into_a_warning_or_off(platform: Platform, name: str) -> None:
    attack = ATTACKS[name]

    def with_setting(setting: str) -> Appraisal:
        lines = "".join(f'{one} = "{setting}"\n' for one in {name} | attack.also)
        return attack.appraise(platform, f"[checks]\n{lines}")

    warned = with_setting("warn")
    assert warned.status == "warning"
    assert failed(warned) == {name} | attack.also
    assert 32 in warned.vector.values()
    assert max(warned.vector.values()) == 32
    allowed = with_setting("allow")
    assert allowed.affirming, allowed.failures
    assert name not in allowed.not_judged


def test_failures_are_all_listed(platform: Platform) -> None:
    attack = Attack({"policy": POLICY | 1 << 19, "vmpl": 3, "key_info": 2, "platform_info": 0x125})
    found = failed(attack.appraise(platform))
    assert found == {"policy-debug", "vmpl", "masked-chip-key", "platform-unknown-bits"}


def test_any_byte_flipped_is_not_affirmed(platform: Platform) -> None:
    report = sign_report(platform.chips[TURIN])
    endorsements, profile = platform.endorsements(TURIN), platform.profile()
    for offset in range(len(report)):
        raw = bytearray(report)
        raw[offset] ^= 0x80
        appraisal = verify_snp(bytes(raw), endorsements, profile, Expected(), NOW)
        assert not appraisal.affirming, f"offset 0x{offset:03x}"
        assert failed(appraisal) & {"report-signature", "signature-padding"}


def test_the_other_signature_of_the_same_report_is_the_same_report(platform: Platform) -> None:
    """(R, n - S) verifies as well: whoever keeps reports apart must not look at the signature."""
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    raw = bytearray(sign_report(platform.chips[MILAN]))
    s = int.from_bytes(raw[0x2E8:0x330], "little")
    raw[0x2E8:0x330] = (order - s).to_bytes(72, "little")
    assert verify_snp(bytes(raw), platform.endorsements(MILAN), platform.profile(), Expected(), NOW).affirming


def test_ids_without_a_pinned_id_key_are_not_believed(platform: Platform) -> None:
    for line in (f'family-id = "{"00" * 16}"', f'image-id = "{"00" * 16}"', "minimum-guest-svn = 0"):
        appraisal = Attack(profile=f"[id-block]\n{line}").appraise(platform)
        assert "no ID key is pinned" in str(appraisal.failures[0])
        assert not appraisal.affirming


def test_an_id_block_is_judged_with_its_signatures(platform: Platform) -> None:
    id_key, author_key = (key_digest(key.public_key()) for key in maker_keys())
    launched = {"id_key_digest": id_key, "author_key_digest": author_key, "key_info": 1}
    block, authentication = maker_block()
    honest = Attack(launched, expected=Expected(id_block=(block, authentication)))
    assert honest.appraise(platform).affirming
    for changes in (
        {"guest_svn": 1},
        {"measurement": b"\x01" * 48},
        {"policy": POLICY | 1 << 19},
        {"image_id": b"i" * 16},
    ):
        other = Attack(launched, expected=Expected(id_block=maker_block(**changes)))
        assert failed(other.appraise(platform)) == {"id-block"}
    forged = bytearray(authentication)
    forged[0x40] ^= 1
    for pair in ((block, bytes(forged)), (block, b""), (b"", authentication)):
        assert failed(Attack(launched, expected=Expected(id_block=pair)).appraise(platform)) == {"id-block"}
    without_author = {**launched, "key_info": 0}
    assert failed(Attack(without_author, expected=honest.expected).appraise(platform)) == {"id-block"}


def test_a_vlek_is_judged_by_its_provider(platform: Platform) -> None:
    trusted = '[providers]\ncsp-ids = ["CN=another-provider.example"]'
    appraisal = Attack({"key_info": 1 << 2}, endorse=vlek, profile=trusted).appraise(platform)
    assert appraisal.affirming, appraisal.failures
    assert appraisal.claims["csp_id"] == "CN=another-provider.example"
    as_vcek = Attack({"key_info": 0}, endorse=vlek, profile=trusted).appraise(platform)
    assert failed(as_vcek) == {"signing-key"}
    masked = Attack({"key_info": 1 << 2, "chip_id": bytes(64)}, endorse=vlek).appraise(platform)
    assert masked.affirming
    listed = Attack(
        {"key_info": 1 << 2, "chip_id": bytes(64)}, endorse=vlek, profile=f'[chips]\ndeny = ["{"01" * 64}"]'
    ).appraise(platform)
    assert failed(listed) == {"chip-id-present"}


def test_a_wrapper_is_fresh_only_with_its_quote(platform: Platform) -> None:
    nonce = b"fresh nonce"
    asked = Expected(report_data=nonce.ljust(64, b"\0"))
    quoted = Attack(wrap=lambda one: one.evidence(nonce), expected=asked).appraise(platform)
    assert quoted.affirming, quoted.failures
    assert quoted.claims["vtpm"]["configuration"]["secure-boot"] is True
    assert quoted.claims["vtpm"]["registers"]["7"] == "07" * 32
    replayed = Attack(wrap=lambda one: one.evidence(b"older nonce"), expected=asked).appraise(platform)
    assert failed(replayed) == {"freshness"}
    bare = Attack(wrap=lambda one: one.evidence(None), expected=asked).appraise(platform)
    assert failed(bare) == {"freshness"}
    unasked = Attack(wrap=lambda one: one.evidence(None)).appraise(platform)
    assert unasked.affirming
    assert {"freshness", "vtpm-quote"} <= set(unasked.not_judged)


def test_a_quote_by_another_tpm_is_refused(platform: Platform) -> None:
    stranger = rsa.generate_private_key(65537, 2048)
    nonce = b"fresh nonce"

    def relayed(one: Paravisor) -> HclEvidence:
        return replace(one.evidence(nonce), quote=replace(one, key=stranger).quote(nonce))

    assert failed(Attack(wrap=relayed).appraise(platform)) == {"vtpm-quote"}


def test_registers_are_judged_where_the_profile_names_them(platform: Platform) -> None:
    named = f'[[vtpm.registers]]\nnumber = 11\nvalues = ["{"0b" * 32}", "{A32}"]'
    assert Attack(wrap=lambda one: one.evidence(b"n"), profile=named).appraise(platform).affirming
    for attack in (Attack(wrap=lambda one: one.evidence(None), profile=named), Attack(profile=named)):
        assert failed(attack.appraise(platform)) == {"vtpm-registers"}


def test_a_vcek_for_another_key_is_no_key_of_the_report(platform: Platform) -> None:
    chip = platform.chips[MILAN]
    stranger = ec.generate_private_key(ec.SECP384R1()).public_key()
    vek = certify(platform.vendor, MILAN, stranger, chip.chip_id, chip.tcb)
    appraisal = Attack(endorse=lambda _, honest: replace(honest, vek=vek)).appraise(platform)
    assert failed(appraisal) == {"report-signature"}
    assert appraisal.vector["hardware"] == 99
