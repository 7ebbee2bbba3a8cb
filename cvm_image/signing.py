"""The keys that sign an image: the builder's over its manifest, the ID key's (and author key's) over its ID blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cvm_image.errors import UnusableImage
from policies.keys import generate_ed25519, load_private_key, public_pem, read_secret, write_secret

BUILDER = "builder.key.pem"
ID_KEY = "id.key.pem"
AUTHOR_KEY = "author.key.pem"
PUBLIC = "builder.pem"


@dataclass(frozen=True, slots=True)
class SigningKeys:
    """`builder` signs manifests (Ed25519); `id_key` signs ID blocks and `author_key`, if any, the ID key (P-384)."""

    builder: Ed25519PrivateKey
    id_key: ec.EllipticCurvePrivateKey
    author_key: ec.EllipticCurvePrivateKey | None = None


def create_signing_keys(folder: Path) -> SigningKeys:
    """Make the keys in a new folder (0700, keys 0600) and the public half of the builder's beside them."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    builder = generate_ed25519(folder / BUILDER)
    for name in (ID_KEY, AUTHOR_KEY):
        write_secret(
            folder / name,
            ec.generate_private_key(ec.SECP384R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
    (folder / PUBLIC).write_text(public_pem(builder), "ascii")
    return load_signing_keys(folder)


def load_signing_keys(folder: Path) -> SigningKeys:
    """Read the keys that `create_signing_keys` made; the author key may be missing."""
    author = folder / AUTHOR_KEY
    return SigningKeys(
        builder=load_private_key(folder / BUILDER),
        id_key=_load_p384(folder / ID_KEY),
        author_key=_load_p384(author) if author.exists() else None,
    )


def _load_p384(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_secret(path), None)
    except ValueError as error:
        raise UnusableImage(
            "this is no private key in PEM", where=str(path), do="Make it by `seal image keys`."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UnusableImage("an ID key is an EC key on P-384", where=str(path), do="Make it by `seal image keys`.")
    return key
