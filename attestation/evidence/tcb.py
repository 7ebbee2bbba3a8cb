"""TCB_VERSION: the security patch levels of the parts under a guest, eight bytes laid out by product.

The layout follows the product, not the report's version: a Genoa report of version 5 still has the older one.
Levels are compared part by part. One 64-bit comparison would let a new microcode hide an old bootloader.
"""

from __future__ import annotations

from dataclasses import dataclass

from attestation.errors import MalformedEvidence
from attestation.evidence.report import Product

TCB_SIZE = 8

# Byte positions: bootloader, tee, snp, microcode, fmc; AMD 56860, "TCB_VERSION structure" and its Turin form.
_CLASSIC = (0, 1, 6, 7, None)
_TURIN = (1, 2, 3, 7, 0)
_CLASSIC_RESERVED, _TURIN_RESERVED = slice(2, 6), slice(4, 7)


@dataclass(frozen=True, slots=True)
class Tcb:
    """Patch levels, 0 to 255 each; `fmc` (the first mutable code) exists on Turin only and is None elsewhere."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    def at_least(self, floor: Tcb) -> bool:
        """True if every part is at least the floor's; a floor for FMC is not met by a product without one."""
        return (
            self.bootloader >= floor.bootloader
            and self.tee >= floor.tee
            and self.snp >= floor.snp
            and self.microcode >= floor.microcode
            and (not floor.fmc or (self.fmc is not None and self.fmc >= floor.fmc))
        )

    def __str__(self) -> str:
        fmc = "" if self.fmc is None else f"fmc {self.fmc}, "
        return f"{fmc}bootloader {self.bootloader}, tee {self.tee}, snp {self.snp}, microcode {self.microcode}"

    def as_dict(self) -> dict[str, int]:
        """The levels by name, `fmc` left out where there is none."""
        levels = {"bootloader": self.bootloader, "tee": self.tee, "snp": self.snp, "microcode": self.microcode}
        return levels if self.fmc is None else {"fmc": self.fmc} | levels


def nonzero_tcb_reserved(raw: bytes, product: Product) -> bool:
    """True if a byte that this product's layout reserves is not zero."""
    return any(raw[_TURIN_RESERVED if product is Product.TURIN else _CLASSIC_RESERVED])


def decode_tcb(raw: bytes, product: Product, *, strict: bool = True) -> Tcb:
    """Read eight bytes in the product's layout; `strict` refuses reserved bytes that are not zero.

    Raises:
        MalformedEvidence: not eight bytes, or (strict) a reserved byte is not zero.
    """
    if len(raw) != TCB_SIZE:
        raise MalformedEvidence(
            f"a TCB has {TCB_SIZE} bytes, not {len(raw)}", where="TCB_VERSION", do="Give the eight bytes of the report."
        )
    if strict and nonzero_tcb_reserved(raw, product):
        raise MalformedEvidence(
            f"reserved bytes are not zero in {raw.hex()}",
            where=f"TCB_VERSION of {product.value}",
            do="Check which product the report is from.",
        )
    if product is Product.TURIN:
        return Tcb(raw[1], raw[2], raw[3], raw[7], raw[0])
    return Tcb(raw[0], raw[1], raw[6], raw[7], None)


def encode_tcb(tcb: Tcb, product: Product) -> bytes:
    """The eight bytes of these levels in the product's layout.

    Raises:
        MalformedEvidence: a level is outside 0 to 255, or FMC is given for a product without it (or missing on Turin).
    """
    if (tcb.fmc is not None) != (product is Product.TURIN):
        raise MalformedEvidence(
            "only Turin has an FMC level, and it always has one",
            where="TCB_VERSION",
            do=f"Correct it for {product.value}.",
        )
    raw = bytearray(TCB_SIZE)
    levels = (tcb.bootloader, tcb.tee, tcb.snp, tcb.microcode, tcb.fmc)
    for level, position in zip(levels, _TURIN if product is Product.TURIN else _CLASSIC, strict=True):
        if level is None or position is None:
            continue
        if not 0 <= level <= 255:
            raise MalformedEvidence(f"level {level} does not fit in a byte", where="TCB_VERSION", do="Use 0 to 255.")
        raw[position] = level
    return bytes(raw)
