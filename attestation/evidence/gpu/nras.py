"""Tokens of NVIDIA's remote attestation service (NRAS): a detached EAT bundle (RFC 9711), read without believing it.

Form: `[["JWT", overall], {"GPU-0": token, …}]`; each token is a compact
JWS whose header says ES384 and names a key. Keys come from a JWKS that the relying party holds, never from a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey, EllipticCurvePublicNumbers

from attestation.canonical import read_json_object, unb64url
from attestation.errors import MalformedEndorsement, MalformedEvidence
from policies.errors import Unusable

MAX_BUNDLE_SIZE = 1 << 20
MAX_TOKEN_SIZE = 128 << 10
MAX_DEVICES = 64
MAX_JWKS_SIZE = 256 << 10
MAX_KEYS = 64

_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KID = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True, slots=True)
class NrasToken:
    """One token, taken apart.

    Attributes:
        compact: As it was received.
        kid: The key it says it was signed with.
        claims: Its payload.
        signed: The bytes that the signature covers.
        signature: r || s, 48 bytes each.
    """

    compact: str
    kid: str
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class NrasBundle:
    """The overall token and one token for each device, by the name that the bundle gives it."""

    overall: NrasToken
    devices: Mapping[str, NrasToken]


def parse_nras_bundle(raw: bytes) -> NrasBundle:
    """Take a bundle apart.

    Raises:
        MalformedEvidence: another form, a header with more than alg, kid and typ, no or more than 64 devices.
    """
    if len(raw) > MAX_BUNDLE_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_BUNDLE_SIZE} that are read")
    try:
        # `read_json_object` reads objects: the array is wrapped into one.
        document = read_json_object(b'{"bundle":' + raw + b"}", where="NRAS bundle", limit=MAX_BUNDLE_SIZE + 16)
    except Unusable as error:
        raise _malformed("this is no JSON document") from error
    pair = document["bundle"]
    if len(document) != 1 or not (
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and isinstance(pair[1], dict)
    ):
        raise _malformed("it is no pair of an overall token and an object of device tokens")
    (kind, overall), devices = (pair[0] if len(pair[0]) == 2 else (None, None)), pair[1]
    if kind != "JWT" or not 1 <= len(devices) <= MAX_DEVICES or not all(_DEVICE.fullmatch(name) for name in devices):
        raise _malformed("it holds no overall token, or no or too many devices")
    return NrasBundle(
        parse_token(overall), MappingProxyType({name: parse_token(token) for name, token in devices.items()})
    )


def parse_token(token: object) -> NrasToken:
    """Take one compact JWS apart. Raises MalformedEvidence."""
    if not isinstance(token, str) or len(token) > MAX_TOKEN_SIZE or token.count(".") != 2 or not token.isascii():
        raise _malformed("a token is no compact JWS of at most 128 KiB")
    head, payload, tail = token.split(".")
    try:
        header = read_json_object(unb64url(head, where="NRAS token"), where="NRAS token", limit=4096)
        claims = read_json_object(unb64url(payload, where="NRAS token"), where="NRAS token", limit=MAX_TOKEN_SIZE)
        signature = unb64url(tail, where="NRAS token")
    except Unusable as error:
        raise _malformed(f"a token cannot be read: {error.what}") from error
    kid = header.get("kid")
    if header.get("alg") != "ES384" or set(header) - {"alg", "kid", "typ"} or header.get("typ", "JWT") != "JWT":
        raise _malformed("a token's header is not alg ES384, kid and at most typ JWT")
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None or len(signature) != 96:
        raise _malformed("a token names no key, or its signature has another length")
    return NrasToken(token, kid, MappingProxyType(claims), f"{head}.{payload}".encode("ascii"), signature)


def parse_jwks(raw: bytes) -> Mapping[str, EllipticCurvePublicKey]:
    """The P-384 keys of a JWKS by their id; keys of other kinds are left out.

    Raises:
        MalformedEndorsement: no JWKS, a broken or private P-384 key, an id twice, or no P-384 key at all.
    """
    try:
        entries = read_json_object(raw, where="JWKS", limit=MAX_JWKS_SIZE).get("keys")
    except Unusable as error:
        raise _bad_jwks(error.what) from error
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise _bad_jwks(f"there is no list of at most {MAX_KEYS} keys")
    keys: dict[str, EllipticCurvePublicKey] = {}
    for entry in entries:
        if not isinstance(entry, dict) or (entry.get("kty"), entry.get("crv")) != ("EC", "P-384"):
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or _KID.fullmatch(kid) is None or kid in keys or "d" in entry:
            raise _bad_jwks("a P-384 key has no id, one that is taken, or a private part")
        if entry.get("use", "sig") != "sig" or entry.get("alg", "ES384") != "ES384":
            continue
        keys[kid] = _key(entry)
    if not keys:
        raise _bad_jwks("it holds no P-384 key for signatures")
    return MappingProxyType(keys)


def _key(entry: Mapping[str, Any]) -> EllipticCurvePublicKey:
    try:
        x, y = (unb64url(str(entry[name]), where="JWKS") for name in ("x", "y"))
        if len(x) != 48 or len(y) != 48:
            raise _bad_jwks("a P-384 key's coordinates have not 48 bytes")
        numbers = EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), SECP384R1())
        return numbers.public_key()
    except (KeyError, ValueError) as error:
        raise _bad_jwks("a P-384 key has no point on the curve") from error
    except MalformedEndorsement:
        raise
    except Unusable as error:
        raise _bad_jwks("a P-384 key's coordinates are no base64url") from error


def encode_nras_bundle(overall: str, devices: Mapping[str, str]) -> bytes:
    """The bundle of these compact tokens."""
    return json.dumps([["JWT", overall], dict(devices)]).encode("ascii")


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="NRAS bundle", do="Give the service's answer as it came.")


def _bad_jwks(what: str) -> MalformedEndorsement:
    return MalformedEndorsement(what, where="JWKS", do="Give the service's /.well-known/jwks.json, fetched over TLS.")
