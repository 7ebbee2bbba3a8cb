"""The root keys that evidence may end in, pinned by the SHA-256 of their SubjectPublicKeyInfo.

A pin decides, never the place a certificate came from: the same ARK may come from the host, a folder or the KDS.
AMD publishes the three ARKs at https://kdsintf.amd.com/vcek/v1/{Milan,Genoa,Turin}/cert_chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from attestation.evidence.report import Product


@dataclass(frozen=True, slots=True)
class RootPin:
    """One trusted root key.

    Attributes:
        product: The only product line that this root vouches for.
        spki_sha256: SHA-256 of the root certificate's SubjectPublicKeyInfo (DER), lower-case hex.
        virtual: A root of the virtual platform: its chain must bear virtual names, and every verdict says `virtual`.
    """

    product: Product
    spki_sha256: str
    virtual: bool = False


AMD_ROOTS: tuple[RootPin, ...] = (
    RootPin(Product.MILAN, "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9"),
    RootPin(Product.GENOA, "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831"),
    RootPin(Product.TURIN, "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08"),
)
"""AMD's root keys (ARK) of the SEV product lines."""
