"""Signed JSON: JWS compact (RFC 7515) with Ed25519 (RFC 9864), one header form, canonical payloads.

Each use has its own `typ`, so that a signature made for one purpose is worth nothing for another. The header is exactly
`alg`, `kid`, `typ`; `alg` is "Ed25519" and nothing else; a key is never taken from a token. With one algorithm and one
header there is nothing to choose, and the signature is the library's own call; joserfc reads the same tokens (tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from attestation.canonical import b64url, canonical_bytes, read_canonical, unb64url
from policies.errors import Refused, Unusable

ALGORITHM = "Ed25519"
MAX_TOKEN = 256 * 1024
"""Bytes of the longest token that is read."""


def sign_jws(payload: Mapping[str, Any], key: Ed25519PrivateKey, *, kid: str, typ: str) -> str:
    """Sign the canonical form of `payload` as a compact JWS."""
    header = {"alg": ALGORITHM, "kid": kid, "typ": typ}
    signed = f"{b64url(canonical_bytes(header))}.{b64url(canonical_bytes(payload))}"
    return f"{signed}.{b64url(key.sign(signed.encode('ascii')))}"


def read_jws_header(token: str, *, typ: str) -> str:
    """The `kid` of a token of this `typ`, before any key is known. Raises Unusable."""
    where = f"{typ} token"
    if len(token) > MAX_TOKEN or token.count(".") != 2:
        raise Unusable("this is no compact JWS", where=where, do="Send the token as it was made.")
    return _kid(token.partition(".")[0], typ)


@lru_cache(maxsize=256)
def _kid(encoded: str, typ: str) -> str:
    """The `kid` of a header, which all tokens of one signer for one purpose have in common."""
    where = f"{typ} token"
    header = read_canonical(unb64url(encoded, where=where), where=where, limit=1024)
    kid = header.get("kid")
    if header != {"alg": ALGORITHM, "kid": kid, "typ": typ} or not isinstance(kid, str):
        raise Unusable(
            f"the token's header is not exactly alg {ALGORITHM}, kid, typ {typ}",
            where=where,
            do="Send a token that was made for this purpose.",
        )
    return kid


def read_jws(token: str, key: Ed25519PublicKey, *, typ: str) -> dict[str, Any]:
    """The payload of a token of this `typ` signed by `key`. Raises Unusable (form) or Refused (signature)."""
    where = f"{typ} token"
    read_jws_header(token, typ=typ)
    signed, _, signature = token.rpartition(".")
    raw = unb64url(signed.partition(".")[2], where=where)
    try:
        key.verify(unb64url(signature, where=where), signed.encode("ascii"))
    except InvalidSignature as error:
        raise Refused(
            "the signature does not verify", where=where, do="Use the token as its signer made it, unchanged."
        ) from error
    return read_canonical(raw, where=where, limit=MAX_TOKEN)


@lru_cache(maxsize=256)
def ed25519_public_key(pem: str) -> Ed25519PublicKey:
    """Load a PEM Ed25519 public key. Raises Unusable for any other kind."""
    try:
        key = load_pem_public_key(pem.encode("ascii"))
    except (ValueError, UnicodeError, UnsupportedAlgorithm) as error:
        raise Unusable("this is no PEM public key", where="public key", do="Give an Ed25519 key in PEM.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise Unusable("this public key is not Ed25519", where="public key", do="Give an Ed25519 key in PEM.")
    return key
