"""The keys that sign an image: the builder's over its manifest, the ID key's (and author key's) over its ID blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from attestation.evidence.id_block import IdKey
from cvm_image.errors import UnusableImage
from cvm_image.statement import BuilderKey
from policies.keys import generate_ed25519, load_private_key, public_pem, read_secret, write_secret
from policies.token import (
    generate_token_key,
    generate_token_p384,
    open_token_key,
    open_token_p384,
    parse_token_uri,
    token_uri,
)

BUILDER = "builder.key.pem"
ID_KEY = "id.key.pem"
AUTHOR_KEY = "author.key.pem"
PUBLIC = "builder.pem"
ELSEWHERE = "token.txt"
"""Names the keys of a PKCS#11 token, one a line; then there are no key files."""


@dataclass(frozen=True, slots=True)
class SigningKeys:
    """`builder` signs manifests (Ed25519); `id_key` signs ID blocks and `author_key`, if any, the ID key (P-384).

    Keys in memory sign deterministically. A token's P-384 keys do not: `id-auth` and what names its digest then differ
    from build to build, and nothing else.
    """

    builder: BuilderKey
    id_key: IdKey
    author_key: IdKey | None = None


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


def create_token_keys(folder: Path, uri: str, pin_file: Path | None) -> SigningKeys:
    """Make the keys in the PKCS#11 token that `uri` names, and in a new folder write where each is.

    The `object` of the URI is their common name. Raises UnusableKey for a token that cannot be used, or has them.
    """
    address = parse_token_uri(uri)
    named = {part: token_uri(replace(address, key=f"{address.key}-{part}")) for part in ("builder", "id", "author")}
    builder = generate_token_key(named["builder"], pin_file)
    for part in ("id", "author"):
        generate_token_p384(named[part], pin_file)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_secret(folder / ELSEWHERE, "".join(f"{part} {where}\n" for part, where in named.items()).encode())
    (folder / PUBLIC).write_text(public_pem(builder.public), "ascii")
    return load_signing_keys(folder, pin_file)


def load_signing_keys(folder: Path, pin_file: Path | None = None) -> SigningKeys:
    """Read the keys that `create_signing_keys` or `create_token_keys` made; an author key in a file may be missing."""
    if (folder / ELSEWHERE).exists():
        return _load_token_keys(folder / ELSEWHERE, pin_file)
    author = folder / AUTHOR_KEY
    return SigningKeys(
        builder=load_private_key(folder / BUILDER),
        id_key=_load_p384(folder / ID_KEY),
        author_key=_load_p384(author) if author.exists() else None,
    )


def _load_token_keys(path: Path, pin_file: Path | None) -> SigningKeys:
    named = dict(line.partition(" ")[::2] for line in read_secret(path).decode("utf-8", "replace").splitlines())
    if set(named) != {"builder", "id", "author"}:
        raise UnusableImage("this names no three keys of a token", where=str(path), do="Make it by `seal image keys`.")
    return SigningKeys(
        builder=open_token_key(named["builder"], pin_file),
        id_key=open_token_p384(named["id"], pin_file),
        author_key=open_token_p384(named["author"], pin_file),
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
