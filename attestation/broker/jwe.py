"""The JWE in which a KBS 0.4.0 answer carries a resource: for the key in the guest's runtime data, and for no other.

Flattened JSON (RFC 7516), A256GCM. The stock client parses the protected header, writes it anew and takes that as the
AAD, so the header has one byte form only: `alg`, `enc`, then `epk` with its keys sorted, no blanks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from attestation.canonical import b64url, unb64url
from policies.errors import Unusable

ECDH: Final = "ECDH-ES+A256KW"
RSA_OAEP: Final = "RSA-OAEP-256"
_CURVES: Final[dict[str, tuple[type[ec.EllipticCurve], int]]] = {
    "P-256": (ec.SECP256R1, 32),
    "P-521": (ec.SECP521R1, 66),
}

TeeKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def load_tee_key(jwk: Mapping[str, Any]) -> TeeKey:
    """The public key in a guest's `tee-pubkey`: P-256 or P-521 with ECDH-ES+A256KW, or RSA with RSA-OAEP-256.

    Raises Unusable for any other kind, RSA1_5 among them, and for a key that is malformed, weak or private.
    """
    where, do = "tee-pubkey", "Send an EC key (P-256, P-521; ECDH-ES+A256KW) or an RSA key (RSA-OAEP-256)."
    kind, algorithm = jwk.get("kty"), jwk.get("alg")
    if "d" in jwk:
        raise Unusable("the key is a private one", where=where, do="Send the public half alone.")
    if kind == "EC" and algorithm == ECDH and jwk.get("crv") in _CURVES:
        curve, size = _CURVES[jwk["crv"]]
        x, y = (_number(jwk, name, size, size) for name in ("x", "y"))
        try:
            return ec.EllipticCurvePublicNumbers(x, y, curve()).public_key()
        except ValueError as error:
            raise Unusable("the key is no point of its curve", where=where, do=do) from error
    if kind == "RSA" and algorithm == RSA_OAEP:
        n, e = _number(jwk, "n", 256, 1024), _number(jwk, "e", 1, 4)
        try:
            key = rsa.RSAPublicNumbers(e, n).public_key()
        except ValueError as error:
            raise Unusable("the RSA key is malformed", where=where, do=do) from error
        if key.key_size >= 2048:
            return key
        raise Unusable(f"the RSA key has {key.key_size} bits, fewer than 2048", where=where, do=do)
    raise Unusable(f"the key is {str(kind)[:20]} for {str(algorithm)[:20]}", where=where, do=do)


def encrypt_jwe(value: bytes, key: TeeKey) -> dict[str, str]:
    """Encrypt `value` to the guest's key: `protected`, `encrypted_key`, `iv`, `ciphertext`, `tag`."""
    content_key = AESGCM.generate_key(256)
    if isinstance(key, rsa.RSAPublicKey):
        header: dict[str, Any] = {"alg": RSA_OAEP, "enc": "A256GCM"}
        oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
        encrypted_key = key.encrypt(content_key, oaep)
    else:
        ephemeral = ec.generate_private_key(key.curve)
        header = {"alg": ECDH, "enc": "A256GCM", "epk": _epk(ephemeral.public_key())}
        encrypted_key = aes_key_wrap(_derive(ephemeral.exchange(ec.ECDH(), key)), content_key)
    protected = b64url(json.dumps(header, separators=(",", ":")).encode("ascii"))
    nonce = os.urandom(12)
    sealed = AESGCM(content_key).encrypt(nonce, value, protected.encode("ascii"))
    return {
        "protected": protected,
        "encrypted_key": b64url(encrypted_key),
        "iv": b64url(nonce),
        "ciphertext": b64url(sealed[:-16]),
        "tag": b64url(sealed[-16:]),
    }


def _derive(shared: bytes) -> bytes:
    """Concat KDF of RFC 7518 section 4.6.2: AlgorithmID "ECDH-ES+A256KW", no party information, 256 bits."""
    name = ECDH.encode("ascii")
    info = len(name).to_bytes(4, "big") + name + bytes(4) + bytes(4) + (256).to_bytes(4, "big")
    return ConcatKDFHash(hashes.SHA256(), 32, info).derive(shared)


def _epk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    name, size = next((name, size) for name, (curve, size) in _CURVES.items() if isinstance(key.curve, curve))
    numbers = key.public_numbers()
    return {
        "crv": name,
        "kty": "EC",
        "x": b64url(numbers.x.to_bytes(size, "big")),
        "y": b64url(numbers.y.to_bytes(size, "big")),
    }


def _number(jwk: Mapping[str, Any], name: str, least: int, most: int) -> int:
    text = jwk.get(name)
    if not isinstance(text, str) or len(text) > 2 * most:
        raise Unusable(f"the key's {name} is missing or too long", where="tee-pubkey", do="Send a JWK (RFC 7517).")
    raw = unb64url(text, where=f"tee-pubkey.{name}")
    if not least <= len(raw) <= most:
        raise Unusable(f"the key's {name} has {len(raw)} bytes", where="tee-pubkey", do="Send a JWK (RFC 7518).")
    return int.from_bytes(raw, "big")
