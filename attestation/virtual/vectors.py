"""`python -m attestation.virtual.vectors OUT`: a small set of virtual evidence for this verifier and for others.

A vendor and one chip of each product are made, sign what is listed here, and are thrown away: what is left in OUT are
certificates, reports of 1184 bytes, a verifier's profile that pins the virtual roots, and `vectors.json` with the
outcome of each. Everything but keys and signatures is the same in each run, so the set is made once and kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from attestation.endorsements.roots import RootPin
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb, encode_tcb
from attestation.verifier.profile import SHOW, with_virtual_roots
from attestation.verifier.profile_toml import profile_to_toml
from attestation.virtual.chip import Chip, certify, create_chip
from attestation.virtual.folders import armor, write_file
from attestation.virtual.processor import POLICY, sign_report
from attestation.virtual.vendor import Vendor, create_vendor

MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)
"""When the certificates begin (a day before this)."""

VERIFY_AT = datetime(2026, 6, 1, tzinfo=UTC)
EXPIRED_AT = datetime(2034, 6, 1, tzinfo=UTC)

REPORT_DATA = bytes(range(64))
MEASUREMENT = bytes.fromhex("5ea1" * 24)
HOST_DATA = bytes.fromhex("da7a" * 16)
REPORT_ID = bytes.fromhex("1d" * 32)


@dataclass(frozen=True, slots=True)
class Vector:
    """One report and what a verifier makes of it.

    `fields`, `patches` and `unsigned` are as in `sign_report`. `vek`, `crl` and `at` name what it is verified with;
    `failures` are the checks that fail, none if it is affirmed. `report_data` is what the verifier expects.
    """

    product: Product = Product.MILAN
    fields: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[int, bytes] = field(default_factory=dict)
    unsigned: Mapping[int, bytes] = field(default_factory=dict)
    vek: str = "vcek.pem"
    crl: str = "crl.pem"
    at: datetime = VERIFY_AT
    report_data: bytes = REPORT_DATA
    failures: tuple[str, ...] = ()


def _tcb(**levels: int) -> bytes:
    return encode_tcb(Tcb(**({"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219} | levels)), Product.MILAN)


VECTORS: Mapping[str, Vector] = {
    "milan-v2": Vector(fields={"version": 2}),
    "milan-v3": Vector(),
    "milan-v4": Vector(fields={"version": 4}),
    "genoa-v3": Vector(Product.GENOA, {"version": 3}),
    "genoa-v5": Vector(Product.GENOA),
    "turin-v5": Vector(Product.TURIN),
    "turin-bit-6": Vector(Product.TURIN, {"platform_info": 0x65}),
    "reported-tcb-lags": Vector(
        fields={"reported_tcb": _tcb(), "current_tcb": _tcb(microcode=220), "committed_tcb": _tcb(microcode=220)}
    ),
    "version-6": Vector(patches={0x000: b"\x06"}, failures=("report-version",)),
    "reserved-byte": Vector(patches={0x208: b"\x01"}, failures=("reserved-bytes",)),
    "signature-flipped": Vector(unsigned={0x2A0: b"\x00\x00"}, failures=("report-signature",)),
    "measurement-flipped": Vector(unsigned={0x090: b"\x00"}, failures=("report-signature", "measurement")),
    "unsigned-tail": Vector(unsigned={0x49F: b"\x01"}, failures=("signature-padding",)),
    "algorithm-2": Vector(fields={"signature_algo": 2}, failures=("signature-algorithm",)),
    "masked-chip-key": Vector(fields={"key_info": 1 << 1}, failures=("masked-chip-key",)),
    "says-vlek": Vector(fields={"key_info": 1 << 2}, failures=("signing-key",)),
    "says-no-key": Vector(fields={"key_info": 7 << 2}, failures=("signing-key",)),
    "other-product": Vector(fields={"cpuid_mod_id": 0x11}, failures=("product",)),
    "other-chip": Vector(fields={"chip_id": b"\x01" * 64}, failures=("hardware-id",)),
    "other-tcb": Vector(fields={"reported_tcb": _tcb(microcode=218)}, failures=("certificate-tcb",)),
    "other-tcb-turin-fmc": Vector(
        Product.TURIN,
        {"reported_tcb": encode_tcb(Tcb(bootloader=1, tee=1, snp=4, microcode=80, fmc=0), Product.TURIN)},
        failures=("certificate-tcb",),
    ),
    "provisional-firmware": Vector(fields={"committed_tcb": _tcb(snp=23)}, failures=("provisional-firmware",)),
    "policy-bit-17-clear": Vector(fields={"policy": POLICY & ~(1 << 17)}, failures=("policy-reserved",)),
    "debug": Vector(fields={"policy": POLICY | 1 << 19}, failures=("policy-debug",)),
    "migration-allowed": Vector(fields={"policy": POLICY | 1 << 18}, failures=("policy-migrate-ma",)),
    "smt-against-policy": Vector(fields={"policy": POLICY & ~(1 << 16)}, failures=("smt-consistency",)),
    "no-alias-check": Vector(fields={"platform_info": 0x05}, failures=("platform-alias-check",)),
    "unknown-platform-bit": Vector(fields={"platform_info": 0x125}, failures=("platform-unknown-bits",)),
    "vmpl-2": Vector(fields={"vmpl": 2}, failures=("vmpl",)),
    "migration-agent": Vector(fields={"report_id_ma": bytes(32)}, failures=("migration-agent",)),
    "other-report-data": Vector(report_data=bytes(64), failures=("freshness",)),
    "certificate-expired": Vector(at=EXPIRED_AT, failures=("certificate-validity", "revocation-list")),
    "ask-revoked": Vector(crl="crl-revoked.pem", failures=("revocation",)),
    "vcek-of-another-chip": Vector(vek="vcek-stranger.pem", failures=("report-signature", "hardware-id")),
    "several-at-once": Vector(
        fields={"policy": POLICY | 1 << 19, "vmpl": 3, "key_info": 2},
        failures=("masked-chip-key", "policy-debug", "vmpl"),
    ),
}


def write_vectors(out: Path, vendor: Vendor) -> None:
    """Write the whole set, certified by `vendor`, into the folder `out`. No private key is written."""
    with tempfile.TemporaryDirectory(prefix="sealwright-vectors-") as scratch:
        chips = {
            product: create_chip(vendor, Path(scratch) / f"chip-{product.value}", product, at=MADE_AT)
            for product in Product
        }
        stranger = create_chip(vendor, Path(scratch) / "stranger", at=MADE_AT)
        for product, chip in chips.items():
            _write_certificates(out / product.value, vendor, chip)
        vek = certify(vendor, Product.MILAN, stranger.key.public_key(), stranger.chip_id, stranger.tcb, at=MADE_AT)
        write_file(out / "Milan/vcek-stranger.pem", armor("CERTIFICATE", vek))
        revoked = vendor.revocation_list(Product.MILAN, [0x10001], MADE_AT - timedelta(days=1))
        write_file(out / "Milan/crl-revoked.pem", armor("X509 CRL", revoked))
        (out / "reports").mkdir(parents=True, exist_ok=True)
        for name, vector in VECTORS.items():
            write_file(out / f"reports/{name}.bin", _sign(chips[vector.product], vector))
    pins = [RootPin(it.product, it.ark_spki_sha256, virtual=True) for it in vendor.authorities.values()]
    write_file(out / "profile.toml", profile_to_toml(with_virtual_roots(SHOW, pins)).encode())
    write_file(out / "vectors.json", json.dumps(_index(), indent=1).encode() + b"\n")


def _write_certificates(folder: Path, vendor: Vendor, chip: Chip) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    authority = vendor.authority(chip.product)
    write_file(folder / "ark.pem", armor("CERTIFICATE", authority.ark))
    write_file(folder / "ask.pem", armor("CERTIFICATE", authority.ask))
    write_file(folder / "crl.pem", armor("X509 CRL", authority.crl))
    write_file(folder / "vcek.pem", armor("CERTIFICATE", chip.vcek))


def _sign(chip: Chip, vector: Vector) -> bytes:
    fields: dict[str, Any] = {
        "measurement": MEASUREMENT,
        "host_data": HOST_DATA,
        "report_id": REPORT_ID,
        **vector.fields,
    }
    return sign_report(
        chip, report_data=REPORT_DATA, patches=vector.patches, unsigned_patches=vector.unsigned, **fields
    )


def _index() -> dict[str, Any]:
    return {
        "platform": "virtual",
        "measurement": MEASUREMENT.hex(),
        "host-data": HOST_DATA.hex(),
        "profile": "profile.toml",
        "vectors": [
            {
                "name": name,
                "report": f"reports/{name}.bin",
                "vek": f"{vector.product.value}/{vector.vek}",
                "chain": [f"{vector.product.value}/ask.pem", f"{vector.product.value}/ark.pem"],
                "crl": f"{vector.product.value}/{vector.crl}",
                "at": vector.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "report-data": vector.report_data.hex(),
                "status": "contraindicated" if vector.failures else "affirming",
                "failures": sorted(vector.failures),
            }
            for name, vector in VECTORS.items()
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the vectors into the folder that is the only argument."""
    parser = argparse.ArgumentParser(prog="python -m attestation.virtual.vectors", description="Write virtual vectors.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write to")
    out = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory(prefix="sealwright-vendor-") as scratch:
        write_vectors(out, create_vendor(Path(scratch), at=MADE_AT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
