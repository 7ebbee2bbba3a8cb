"""Sealing to a hybrid post-quantum key: HPKE (RFC 9180) with ML-KEM-768 and X25519, HKDF-SHA256 and AES-256-GCM.

One form for every sealed thing: keys that a broker releases to a guest, results that a server seals to their owner.
A public key travels as its raw bytes, ML-KEM-768 encapsulation key then X25519; a private key as the 64-byte ML-KEM
seed then the X25519 scalar. `info` names what is sealed and for what, so that a sealed thing cannot be used as another.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from policies.errors import Refused, Unusable

PUBLIC_SIZE = 1184 + 32
PRIVATE_SIZE = 64 + 32

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class HybridPrivateKey:
    """A key to which things are sealed. It never prints itself."""

    def __init__(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._mlkem = mlkem
        self._x25519 = x25519

    @classmethod
    def generate(cls) -> HybridPrivateKey:
        """Make a new key from the operating system's randomness."""
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> HybridPrivateKey:
        """Read a private key of PRIVATE_SIZE bytes. Raises Unusable."""
        if len(raw) != PRIVATE_SIZE:
            raise Unusable(
                f"a hybrid private key has {PRIVATE_SIZE} bytes, not {len(raw)}",
                where="private key",
                do="Give the key's own file.",
            )
        return cls(MLKEM768PrivateKey.from_seed_bytes(raw[:64]), X25519PrivateKey.from_private_bytes(raw[64:]))

    def private_bytes(self) -> bytes:
        """The key as PRIVATE_SIZE secret bytes."""
        return self._mlkem.private_bytes_raw() + self._x25519.private_bytes_raw()

    def public_bytes(self) -> bytes:
        """The public key as PUBLIC_SIZE bytes."""
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self._mlkem.public_key().public_bytes(*raw) + self._x25519.public_key().public_bytes(*raw)

    def open(self, sealed: bytes, *, info: bytes) -> bytes:
        """Open what `seal` made for this key with the same `info`. Raises Refused for anything else."""
        key = MLKEM768X25519PrivateKey(self._mlkem, self._x25519)
        try:
            return _SUITE.decrypt(sealed, key, info=info)
        except (InvalidTag, ValueError) as error:
            raise Refused(
                "the sealed bytes do not open: they were made for another key or purpose, or were changed",
                where="sealed bytes",
                do="Ask for them again, with the key that they were sealed to.",
            ) from error


def seal(plaintext: bytes, public_key: bytes, *, info: bytes) -> bytes:
    """Seal `plaintext` to the raw `public_key` for the purpose `info`. Raises Unusable for a key that is none."""
    if len(public_key) != PUBLIC_SIZE:
        raise Unusable(
            f"a hybrid public key has {PUBLIC_SIZE} bytes, not {len(public_key)}",
            where="public key",
            do="Give the recipient's own key.",
        )
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public_key[:1184]), X25519PublicKey.from_public_bytes(public_key[1184:])
        )
        return _SUITE.encrypt(plaintext, key, info=info)
    except ValueError as error:
        raise Unusable(
            "the hybrid public key is malformed", where="public key", do="Give the recipient's own key."
        ) from error
