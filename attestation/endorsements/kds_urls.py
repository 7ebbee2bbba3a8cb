"""Where AMD's Key Distribution Service (KDS) keeps what: AMD publication 57230, chapter "KDS interface"."""

from __future__ import annotations

from typing import Literal

from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb

KDS = "https://kdsintf.amd.com"

Line = Literal["vcek", "vlek"]
"""Which intermediate: `vcek` is the ASK's, `vlek` the ASVK's."""

HWID_SIZE = {Product.MILAN: 64, Product.GENOA: 64, Product.TURIN: 8}
"""Bytes of a chip's id as the KDS takes it."""


def vcek_path(product: Product, chip_id: bytes, tcb: Tcb) -> str:
    """The path of one chip's VCEK at one TCB; levels are decimal, two digits at least."""
    levels = [("blSPL", tcb.bootloader), ("teeSPL", tcb.tee), ("snpSPL", tcb.snp), ("ucodeSPL", tcb.microcode)]
    if tcb.fmc is not None:
        levels.insert(0, ("fmcSPL", tcb.fmc))
    query = "&".join(f"{name}={level:02d}" for name, level in levels)
    return f"/vcek/v1/{product.value}/{chip_id[: HWID_SIZE[product]].hex()}?{query}"


def chain_path(line: Line, product: Product) -> str:
    """The path of the chain: ASK or ASVK, then ARK, in PEM."""
    return f"/{line}/v1/{product.value}/cert_chain"


def crl_path(line: Line, product: Product) -> str:
    """The path of the ARK's revocation list, in DER."""
    return f"/{line}/v1/{product.value}/crl"
