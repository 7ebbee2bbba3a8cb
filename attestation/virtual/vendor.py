"""The virtual vendor: the root and intermediate keys from which virtual chips are certified.

A vendor is a folder: `vendor.json`, and for each product a folder with `ark.pem ask.pem crl.pem` and the two private
keys. It plays AMD's part, and nothing accepts it that does not name its root: see docs/explanation/virtual-platform.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from asn1crypto import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from attestation.errors import PlatformUnusable
from attestation.evidence.report import Product
from attestation.virtual.certificates import authority_extensions, issue_certificate, issue_revocation_list
from attestation.virtual.folders import armor, read_bounded, unarmor, write_file
from policies.keys import read_secret, write_secret

SERIALS: Mapping[Product, tuple[int, int]] = {
    Product.MILAN: (0x10000, 0x10001),
    Product.GENOA: (0x20000, 0x20002),
    Product.TURIN: (0x30000, 0x30001),
}
"""Serial numbers of ARK and ASK, as AMD numbers its own."""

AUTHORITY_YEARS = 25
REVOCATION_YEARS = 7


@dataclass(frozen=True, slots=True)
class Authority:
    """One product's chain: DER certificates of ARK and ASK, and the ARK's revocation list over its intermediates."""

    product: Product
    ark: bytes
    ask: bytes
    crl: bytes

    @property
    def ark_spki_sha256(self) -> str:
        """Hex SHA-256 of the root's public key: what a charter pins (`VirtualRoot.ark_spki_sha256`)."""
        return hashlib.sha256(x509.Certificate.load(self.ark).public_key.dump()).hexdigest()


@dataclass(frozen=True, slots=True)
class Vendor:
    """A vendor's folder with the chains in it. Private keys stay on disk and are read when a chip is certified."""

    folder: Path
    authorities: Mapping[Product, Authority]

    def authority(self, product: Product) -> Authority:
        """Return the chain of `product`. Raises PlatformUnusable if this vendor was created without it."""
        if product not in self.authorities:
            raise PlatformUnusable(
                f"the virtual vendor has no root for {product.value}",
                where=str(self.folder),
                do="Create the vendor with this product.",
            )
        return self.authorities[product]

    def ask_key(self, product: Product) -> rsa.RSAPrivateKey:
        """Read the private key that certifies the chips of `product`."""
        return _load_rsa(self.folder / product.value / "ask.key.pem")

    def revocation_list(self, product: Product, serials: Sequence[int], at: datetime) -> bytes:
        """Return a DER list that revokes the intermediates with these serial numbers, signed by the ARK."""
        return _revocation_list(product, _load_rsa(self.folder / product.value / "ark.key.pem"), serials, at)


def create_vendor(folder: Path, products: Sequence[Product] = tuple(Product), *, at: datetime | None = None) -> Vendor:
    """Make a vendor's roots and intermediates for `products` in `folder`, and return it.

    Certificates are valid from a day before `at` (default: now), so that a clock that is a little behind accepts them.
    Products that are there already are kept: a vendor is extended by asking for more. About a second a product.
    """
    valid_from = (at or datetime.now(UTC)).replace(microsecond=0) - timedelta(days=1)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [product for product in products if not (folder / product.value / "ask.pem").exists()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        made = list(pool.map(lambda _: rsa.generate_private_key(65537, 4096), range(2 * len(missing))))
    for index, product in enumerate(missing):
        _write_authority(folder / product.value, product, made[2 * index], made[2 * index + 1], valid_from)
    present = [product for product in Product if (folder / product.value / "ask.pem").exists()]
    vendor = Vendor(folder, {product: _read_authority(folder / product.value, product) for product in present})
    write_file(
        folder / "vendor.json",
        json.dumps(
            {
                "platform": "virtual",
                "roots": [
                    {"product": product.value, "ark_spki_sha256": authority.ark_spki_sha256}
                    for product, authority in vendor.authorities.items()
                ],
            },
            indent=2,
        ).encode()
        + b"\n",
    )
    return vendor


def load_vendor(folder: Path) -> Vendor:
    """Read a vendor's folder (no private key is touched). Raises PlatformUnusable if it is none."""
    present = [product for product in Product if (folder / product.value / "ask.pem").is_file()]
    if not present:
        raise PlatformUnusable("there is no virtual vendor", where=str(folder), do="Create one with create_vendor.")
    return Vendor(folder, {product: _read_authority(folder / product.value, product) for product in present})


def _write_authority(
    folder: Path, product: Product, ark_key: rsa.RSAPrivateKey, ask_key: rsa.RSAPrivateKey, valid_from: datetime
) -> None:
    ark_serial, ask_serial = SERIALS[product]
    ark_name, ask_name = f"ARK-Virtual-{product.value}", f"SEV-Virtual-{product.value}"
    ark_public, ask_public = _public_key(ark_key.public_key()), _public_key(ask_key.public_key())
    ark = issue_certificate(
        subject=ark_name,
        issuer=ark_name,
        serial=ark_serial,
        valid_from=valid_from,
        years=AUTHORITY_YEARS,
        public_key=ark_public,
        extensions=authority_extensions(ark_public, None),
        issuer_key=ark_key,
    )
    ask = issue_certificate(
        subject=ask_name,
        issuer=ark_name,
        serial=ask_serial,
        valid_from=valid_from,
        years=AUTHORITY_YEARS,
        public_key=ask_public,
        extensions=authority_extensions(ask_public, ark_public),
        issuer_key=ark_key,
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    write_secret(folder / "ark.key.pem", _private_pem(ark_key))
    write_secret(folder / "ask.key.pem", _private_pem(ask_key))
    write_file(folder / "crl.pem", armor("X509 CRL", _revocation_list(product, ark_key, (), valid_from)))
    write_file(folder / "ark.pem", armor("CERTIFICATE", ark))
    write_file(folder / "ask.pem", armor("CERTIFICATE", ask))


def _read_authority(folder: Path, product: Product) -> Authority:
    return Authority(
        product,
        ark=unarmor("CERTIFICATE", read_bounded(folder / "ark.pem")),
        ask=unarmor("CERTIFICATE", read_bounded(folder / "ask.pem")),
        crl=unarmor("X509 CRL", read_bounded(folder / "crl.pem")),
    )


def _revocation_list(product: Product, ark_key: rsa.RSAPrivateKey, serials: Sequence[int], at: datetime) -> bytes:
    return issue_revocation_list(
        issuer=f"ARK-Virtual-{product.value}",
        issuer_key=ark_key,
        issuer_public_key=_public_key(ark_key.public_key()),
        serials=serials,
        at=at,
        years=REVOCATION_YEARS,
    )


def _load_rsa(path: Path) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(read_secret(path), None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise PlatformUnusable("this is no RSA key", where=str(path), do="Create the vendor again.")
    return key


def _public_key(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _private_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
