"""A virtual chip: an identity, a firmware state, and the key that signs its reports.

A chip is a folder: `chip.json`, `vcek.key.pem` (0600) and `vcek.pem`. The VCEK certificate states the TCB that the
chip reports; a chip with newer firmware is certified anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from asn1crypto import core, x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.errors import PlatformUnusable
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    CRL_GUID,
    VCEK_GUID,
    encode_certificate_table,
)
from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb
from attestation.virtual.certificates import issue_certificate
from attestation.virtual.folders import armor, read_bounded, unarmor, write_file
from attestation.virtual.vendor import Vendor
from policies.keys import read_secret, write_secret

OID = "1.3.6.1.4.1.3704.1"
"""AMD's arc of VCEK extensions (publication 57230, table "VCEK certificate extensions")."""

VCEK_YEARS = 7

CPUID: Mapping[Product, tuple[int, int, int]] = {
    Product.MILAN: (0x19, 0x01, 1),
    Product.GENOA: (0x19, 0x11, 1),
    Product.TURIN: (0x1A, 0x02, 1),
}
"""Display family, model and stepping of each product, as real reports give them."""

DEFAULT_TCB: Mapping[Product, Tcb] = {
    Product.MILAN: Tcb(bootloader=4, tee=0, snp=24, microcode=219),
    Product.GENOA: Tcb(bootloader=10, tee=0, snp=23, microcode=84),
    Product.TURIN: Tcb(bootloader=1, tee=1, snp=4, microcode=80, fmc=1),
}

DEFAULT_VERSION: Mapping[Product, int] = {Product.MILAN: 3, Product.GENOA: 5, Product.TURIN: 5}
"""The newest ATTESTATION_REPORT version that was seen from each product."""

_Level = Annotated[int, Field(ge=0, le=255)]


class _TcbDocument(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bootloader: _Level
    tee: _Level
    snp: _Level
    microcode: _Level
    fmc: _Level | None = None


class _ChipDocument(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    platform: Literal["virtual"]
    product: Literal["Milan", "Genoa", "Turin"]
    chip_id: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    tcb: _TcbDocument
    cpuid: Annotated[list[_Level], Field(min_length=3, max_length=3)]
    firmware: Annotated[list[_Level], Field(min_length=3, max_length=3)]
    report_version: Annotated[int, Field(ge=2, le=5)]


@dataclass(frozen=True, slots=True)
class Chip:
    """A virtual secure processor: what it is, and its signing key.

    `chip_id` is 64 bytes (Turin's are 8 and zeros); `cpuid` is display family, model and stepping; `firmware` is major,
    minor and build; `vcek` is the DER certificate for `key`.
    """

    product: Product
    chip_id: bytes
    tcb: Tcb
    cpuid: tuple[int, int, int]
    firmware: tuple[int, int, int]
    report_version: int
    vcek: bytes
    key: ec.EllipticCurvePrivateKey

    def certificate_table(self, vendor: Vendor) -> bytes:
        """Return the table that the chip's host hands out: VCEK, ASK, ARK and revocation list."""
        authority = vendor.authority(self.product)
        return encode_certificate_table(
            ((VCEK_GUID, self.vcek), (ASK_GUID, authority.ask), (ARK_GUID, authority.ark), (CRL_GUID, authority.crl))
        )


def create_chip(
    vendor: Vendor,
    folder: Path,
    product: Product = Product.MILAN,
    *,
    seed: str | None = None,
    tcb: Tcb | None = None,
    firmware: tuple[int, int, int] = (1, 55, 40),
    report_version: int | None = None,
    at: datetime | None = None,
) -> Chip:
    """Make a chip of `product`, certified by `vendor`, in `folder`, and return it.

    The chip id follows from `seed` (default: the folder's name). The key is new each time. The certificate is valid
    from a day before `at` (default: now) for seven years.
    """
    digest = hashlib.sha512(b"sealwright-virtual-chip\0" + (seed or folder.name).encode()).digest()
    chip_id = digest[:8].ljust(64, b"\x00") if product is Product.TURIN else digest
    levels = tcb or DEFAULT_TCB[product]
    key = ec.generate_private_key(ec.SECP384R1())
    vcek = certify(vendor, product, key.public_key(), chip_id, levels, at=at)
    document = _ChipDocument(
        platform="virtual",
        product=product.value,
        chip_id=chip_id.hex(),
        tcb=_TcbDocument(**levels.as_dict()),
        cpuid=list(CPUID[product]),
        firmware=list(firmware),
        report_version=report_version or DEFAULT_VERSION[product],
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_secret(
        folder / "vcek.key.pem",
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    write_file(folder / "vcek.pem", armor("CERTIFICATE", vcek))
    write_file(folder / "chip.json", json.dumps(document.model_dump(exclude_none=True), indent=2).encode() + b"\n")
    return load_chip(folder)


def load_chip(folder: Path) -> Chip:
    """Read a chip's folder. Raises PlatformUnusable if it is none, or its key is open to others or not its own."""
    try:
        document = _ChipDocument.model_validate_json(read_bounded(folder / "chip.json"))
        vcek = unarmor("CERTIFICATE", read_bounded(folder / "vcek.pem"))
        certified = x509.Certificate.load(vcek, strict=True).public_key.dump()
        key = serialization.load_pem_private_key(read_secret(folder / "vcek.key.pem"), None)
    except (ValidationError, ValueError) as error:
        raise PlatformUnusable(
            "the virtual chip cannot be read", where=str(folder), do="Create the chip again."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or _spki(key.public_key()) != certified:
        raise PlatformUnusable(
            "the chip's key is not the certified one", where=str(folder), do="Create the chip again."
        )
    cpuid, firmware = document.cpuid, document.firmware
    return Chip(
        product=Product(document.product),
        chip_id=bytes.fromhex(document.chip_id),
        tcb=Tcb(**document.tcb.model_dump()),
        cpuid=(cpuid[0], cpuid[1], cpuid[2]),
        firmware=(firmware[0], firmware[1], firmware[2]),
        report_version=document.report_version,
        vcek=vcek,
        key=key,
    )


def certify(
    vendor: Vendor,
    product: Product,
    key: ec.EllipticCurvePublicKey,
    chip_id: bytes,
    tcb: Tcb,
    *,
    at: datetime | None = None,
    years: int = VCEK_YEARS,
) -> bytes:
    """Return the DER VCEK of a chip with this id at this TCB, valid from a day before `at` (default: now)."""
    return issue_certificate(
        subject="SEV-VCEK-Virtual",
        issuer=f"SEV-Virtual-{product.value}",
        serial=0,
        valid_from=(at or datetime.now(UTC)) - timedelta(days=1),
        years=years,
        public_key=_spki(key),
        extensions=_vcek_extensions(product, chip_id, tcb),
        issuer_key=vendor.ask_key(product),
    )


def _vcek_extensions(product: Product, chip_id: bytes, tcb: Tcb) -> Iterable[tuple[str, bool, bytes]]:
    """Yield AMD's extensions in AMD's order (Turin has FMC first, and lacks the reserved `.3.4`)."""
    turin = product is Product.TURIN
    name = core.IA5String(f"Virtual-{product.value}").dump()
    levels = {"1": tcb.bootloader, "2": tcb.tee, "3": tcb.snp, "8": tcb.microcode, "9": tcb.fmc or 0}
    order = ("9", "1", "2", "3", "5", "6", "7", "8") if turin else ("1", "2", "4", "5", "6", "7", "3", "8")
    yield f"{OID}.1", False, core.Integer(1 if turin else 0).dump()
    yield f"{OID}.2", False, name
    for part in order:
        yield f"{OID}.3.{part}", False, core.Integer(levels.get(part, 0)).dump()
    yield f"{OID}.4", False, chip_id[:8] if turin else chip_id


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
